"""The names and signatures of torch.nn.functional, on fastattn's ops.

`import fastattn.functional as F` serves where `import torch.nn.functional as F` did, for what is
listed in `__all__`.
"""

import math
from collections.abc import Sequence

import torch

from . import ops

__all__ = ["dropout", "layer_norm", "rms_norm"]


def layer_norm(
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """`torch.nn.functional.layer_norm`: see `fastattn.layer_norm`."""
    x, weight, bias = _as_one_dimension("layer_norm", input, normalized_shape, weight, bias)
    return ops.layer_norm(x, weight, bias, eps).view(input.shape)


def rms_norm(
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    eps: float | None = None,
) -> torch.Tensor:
    """`torch.nn.functional.rms_norm`: see `fastattn.rms_norm`."""
    x, weight, _ = _as_one_dimension("rms_norm", input, normalized_shape, weight, None)
    return ops.rms_norm(x, weight, eps).view(input.shape)


def dropout(
    input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> torch.Tensor:
    """`torch.nn.functional.dropout`: see `fastattn.dropout`.

    Random numbers are not those of PyTorch's own dropout, but follow `torch.manual_seed` as
    it does. `inplace=True` writes the result over `input`.
    """
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout: p must be in [0, 1], got {p}")
    if not training or p == 0.0:
        return input
    output = torch.zeros_like(input) * input if p == 1.0 else ops.dropout(input, p)
    return input.copy_(output) if inplace else output


def _as_one_dimension(
    op: str,
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Fold the normalized dimensions, one or more, into one."""
    shape = tuple(normalized_shape)
    if not shape or tuple(input.shape[-len(shape) :]) != shape:
        raise ValueError(
            f"{op}: normalized_shape must be the last dimensions of input, got {shape} for an "
            f"input of shape {tuple(input.shape)}"
        )
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.shape != shape:
            raise ValueError(
                f"{op}: {name} must have the shape {shape} of normalized_shape, "
                f"got {tuple(parameter.shape)}"
            )
    if len(shape) == 1:
        return input, weight, bias
    cols = math.prod(shape)
    return (
        input.reshape(*input.shape[: -len(shape)], cols),
        None if weight is None else weight.reshape(cols),
        None if bias is None else bias.reshape(cols),
    )
