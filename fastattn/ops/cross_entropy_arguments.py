"""What both cross entropies refuse of their arguments."""

from typing import TypedDict

import torch

from .core.arguments import check_choice, check_float_tensor, check_shape, read_softcap
from .core.sharding import is_distributed


class LossOptions(TypedDict, total=False):
    """What both cross entropies take by name besides return_lse."""

    ignore_index: int
    reduction: str
    label_smoothing: float
    z_loss: float
    logit_scale: float
    softcap: float | None


class CrossEntropyOptions(LossOptions, total=False):
    """What `cross_entropy` takes by name besides return_lse; see there."""

    weight: torch.Tensor | None
    inplace_backward: bool


class LinearCrossEntropyOptions(LossOptions, total=False):
    """What `linear_cross_entropy` takes by name besides return_lse; see there."""

    class_weight: torch.Tensor | None
    chunk_rows: int | None


def check_cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
) -> None:
    """What cross_entropy is given, but for the options that both have."""
    op = "cross_entropy"
    check_float_tensor(op, "logits", logits)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(
            f"{op}: logits must have at least one class in their last dimension, "
            f"got the shape {tuple(logits.shape)}"
        )
    if not isinstance(target, torch.Tensor):
        raise TypeError(f"{op}: target must be a tensor, got {type(target).__name__}")
    if target.dtype is not torch.int64 and not target.is_floating_point():
        raise TypeError(
            f"{op}: target must be int64 class indices or float class probabilities, "
            f"got {target.dtype}"
        )
    if target.device != logits.device:
        raise ValueError(f"{op}: target must be on {logits.device}, got {target.device}")
    check_shape(
        op, "target", target, logits.shape if target.is_floating_point() else logits.shape[:-1]
    )
    check_class_weight(op, "weight", weight, logits.shape[-1], logits.device)


def check_overwritable(logits: torch.Tensor) -> None:
    """Writing over the logits harms nobody who does not ask for them again."""
    if is_distributed(logits):
        raise ValueError("cross_entropy: inplace_backward does not work on a DTensor")
    if not logits.is_contiguous():
        raise ValueError(
            "cross_entropy: inplace_backward needs contiguous logits, got the strides "
            f"{logits.stride()} for the shape {tuple(logits.shape)}"
        )
    if logits.is_leaf and logits.requires_grad:
        raise ValueError(
            "cross_entropy: inplace_backward would write over a leaf that requires a gradient"
        )


def check_linear_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None,
    class_weight: torch.Tensor | None,
    chunk_rows: int | None,
) -> None:
    """What linear_cross_entropy is given, but for the options that both have."""
    op = "linear_cross_entropy"
    check_float_tensor(op, "x", x)
    if x.dim() == 0:
        raise ValueError(f"{op}: x must have at least one dimension, got a scalar")
    check_float_tensor(op, "weight", weight, like=x)
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"{op}: weight must have shape (V, {x.shape[-1]}) with at least one class, as the last "
            f"dimension of x is {x.shape[-1]}, got {tuple(weight.shape)}"
        )
    if bias is not None:
        check_float_tensor(op, "bias", bias, like=x)
        check_shape(op, "bias", bias, weight.shape[:1])
    if not isinstance(target, torch.Tensor):
        raise TypeError(f"{op}: target must be a tensor, got {type(target).__name__}")
    if target.dtype is not torch.int64:
        raise TypeError(
            f"{op}: target must be int64 class indices, got {target.dtype}; for class "
            "probabilities there is cross_entropy"
        )
    if target.device != x.device:
        raise ValueError(f"{op}: target must be on {x.device}, got {target.device}")
    check_shape(op, "target", target, x.shape[:-1])
    check_class_weight(op, "class_weight", class_weight, weight.shape[0], x.device)
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"{op}: chunk_rows must be positive, got {chunk_rows}")


def check_dtypes(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """The operands of a product have one dtype, which autocast sees to where it is on."""
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype is not x.dtype:
            raise TypeError(
                f"linear_cross_entropy: {name} must have x's dtype {x.dtype}, got {tensor.dtype}"
            )


def check_class_weight(
    op: str, name: str, weight: torch.Tensor | None, classes: int, device: torch.device
) -> None:
    """Class weights are a number a class, constants, on the device of everything else."""
    if weight is None:
        return
    check_float_tensor(op, name, weight)
    check_shape(op, name, weight, (classes,))
    if weight.device != device:
        raise ValueError(f"{op}: {name} must be on {device}, got {weight.device}")
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op}: {name} must not require a gradient, for it would get none")


def check_loss_options(
    op: str,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    logit_scale: float,
    softcap: float | None,
) -> None:
    """The arguments of a cross entropy that are no tensors."""
    check_choice(op, "reduction", reduction, ("mean", "sum", "none"))
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{op}: label_smoothing must be in [0, 1], got {label_smoothing}")
    if not z_loss >= 0.0:
        raise ValueError(f"{op}: z_loss must be non-negative, got {z_loss}")
    limits = torch.finfo(torch.float32)
    if not limits.tiny <= logit_scale <= limits.max:
        raise ValueError(
            f"{op}: logit_scale must be a positive number that float32 holds, got {logit_scale}"
        )
    read_softcap(op, softcap, torch.float32)


def check_range(op: str, target: torch.Tensor, classes: int, ignore_index: int) -> None:
    """Every index names a class, where looking at the numbers costs no synchronisation."""
    if type(target) is not torch.Tensor or target.device.type != "cpu":
        return
    if target.is_floating_point() or torch.compiler.is_compiling():
        return
    wrong = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if wrong.any():
        raise ValueError(
            f"{op}: target must be in [0, {classes}) or ignore_index ({ignore_index}), "
            f"got {target[wrong][0].item()}"
        )
