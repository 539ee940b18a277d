"""What the ops of log-probabilities refuse of their arguments."""

from typing import Any, TypedDict

import torch

from .core.arguments import check_float_tensor, check_shape, read_softcap
from .core.sharding import is_distributed


class LogProbOptions(TypedDict, total=False):
    """What `log_prob` takes by name besides what it is to return; see there."""

    temperature: float
    softcap: float | None
    logit_scale: float
    ignore_index: int


class LinearLogProbOptions(LogProbOptions, total=False):
    """What `linear_log_prob` takes by name besides what it is to return; see there."""

    chunk_rows: int | None


def check_log_prob(logits: torch.Tensor, target: torch.Tensor) -> None:
    """What log_prob is given, but for its options."""
    op = "log_prob"
    check_float_tensor(op, "logits", logits)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(
            f"{op}: logits must have at least one class in their last dimension, "
            f"got the shape {tuple(logits.shape)}"
        )
    check_target(op, target, logits)


def check_linear_log_prob(
    x: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None,
    chunk_rows: int | None,
) -> None:
    """What linear_log_prob is given, but for the options of log_prob."""
    op = "linear_log_prob"
    check_float_tensor(op, "x", x)
    if x.dim() == 0:
        raise ValueError(f"{op}: x must have at least one dimension, got a scalar")
    check_head(op, "x", x, "weight", weight)
    if bias is not None:
        check_float_tensor(op, "bias", bias, like=x)
        check_shape(op, "bias", bias, weight.shape[:1])
    check_target(op, target, x)
    check_chunk_rows(op, chunk_rows)


def check_head(op: str, x_name: str, x: torch.Tensor, name: str, weight: torch.Tensor) -> None:
    """The weight of a linear layer to classes, all of which every rank has."""
    check_float_tensor(op, name, weight, like=x)
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"{op}: {name} must have shape (V, {x.shape[-1]}) with at least one class, as the last "
            f"dimension of {x_name} is {x.shape[-1]}, got {tuple(weight.shape)}"
        )
    if is_distributed(weight) and any(p.is_shard(0) for p in placements_of(weight)):
        raise ValueError(
            f"{op}: {name} is sharded over its classes, which no rank can normalise by itself: "
            f"gather it, {name}.redistribute(placements=[Replicate()] * mesh.ndim)"
        )


def placements_of(tensor: Any) -> tuple[Any, ...]:
    """The placements of a DTensor."""
    return tensor.placements


def check_target(op: str, target: torch.Tensor, rows: torch.Tensor) -> None:
    """A class index for each row of the last dimension."""
    if not isinstance(target, torch.Tensor):
        raise TypeError(f"{op}: target must be a tensor, got {type(target).__name__}")
    if target.dtype is not torch.int64:
        raise TypeError(f"{op}: target must be int64 class indices, got {target.dtype}")
    if target.device != rows.device:
        raise ValueError(f"{op}: target must be on {rows.device}, got {target.device}")
    check_shape(op, "target", target, rows.shape[:-1])


def check_target_mask(op: str, target_mask: torch.Tensor | None, rows: torch.Tensor) -> None:
    """A bool for each row of the last dimension, or None."""
    if target_mask is None:
        return
    if not isinstance(target_mask, torch.Tensor) or target_mask.dtype is not torch.bool:
        kind = getattr(target_mask, "dtype", type(target_mask).__name__)
        raise TypeError(f"{op}: target_mask must be a tensor of bools, got {kind}")
    if target_mask.device != rows.device:
        raise ValueError(f"{op}: target_mask must be on {rows.device}, got {target_mask.device}")
    check_shape(op, "target_mask", target_mask, rows.shape[:-1])


def check_chunk_rows(op: str, chunk_rows: int | None) -> None:
    """Chunks have rows."""
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"{op}: chunk_rows must be positive, got {chunk_rows}")


def check_same_dtypes(op: str, x: torch.Tensor, **others: torch.Tensor | None) -> None:
    """The operands of a product have one dtype, which autocast sees to where it is on."""
    for name, tensor in others.items():
        if tensor is not None and tensor.dtype is not x.dtype:
            raise TypeError(f"{op}: {name} must have x's dtype {x.dtype}, got {tensor.dtype}")


def check_log_prob_options(
    op: str, temperature: float, softcap: float | None, logit_scale: float
) -> None:
    """The arguments of a log-probability that are no tensors."""
    limits = torch.finfo(torch.float32)
    both = ("logit_scale", logit_scale), ("temperature", temperature)
    for name, value in (*both, ("logit_scale / temperature", _ratio(logit_scale, temperature))):
        if not limits.tiny <= value <= limits.max:
            raise ValueError(
                f"{op}: {name} must be a positive number that float32 holds, got {value}"
            )
    read_softcap(op, softcap, torch.float32)


def _ratio(a: float, b: float) -> float:
    """a / b; of 0 there is none to speak of."""
    return a / b if b else 0.0
