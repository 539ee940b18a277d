"""torch's layers without a loss or scores: products, dropout, norms and softmax."""

import math
from collections.abc import Callable, Sequence

import torch

from .. import ops
from ..kernels import private
from ..ops.core.tensor_kinds import is_foreign
from ..reference import torch_functions as F
from .choice import is_for_torch


def linear(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`torch.nn.functional.linear`: see `fastattn.linear`.

    Example:
        >>> fastattn.functional.linear(torch.randn(2, 8), torch.randn(4, 8)).shape
        torch.Size([2, 4])
    """
    if is_for_torch(input) or is_foreign(weight):
        return F.linear(input, weight, bias)
    return ops.linear(input, weight, bias)


def dropout(
    input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> torch.Tensor:
    """`torch.nn.functional.dropout`: see `fastattn.dropout`.

    Random numbers in the kernels are not those of PyTorch's own dropout, but follow
    `torch.manual_seed` as it does. `inplace=True` writes the result over `input`.

    Example:
        >>> fastattn.functional.dropout(torch.ones(2), 0.5, training=False).tolist()
        [1.0, 1.0]
    """
    if is_for_torch(input):
        return F.dropout(input, p, training, inplace)
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout: p must be in [0, 1], got {p}")
    if not training or p == 0.0:
        return input
    output = torch.zeros_like(input) * input if p == 1.0 else ops.dropout(input, p)
    return input.copy_(output) if inplace else output


def layer_norm(
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """`torch.nn.functional.layer_norm`: see `fastattn.layer_norm`.

    Where torch's own runs, on a CPU, the weight's gradient of rows of one large number has rounding
    errors of that size, which `fastattn.layer_norm` has not.

    Example:
        >>> fastattn.functional.layer_norm(torch.randn(2, 8), (8,)).shape
        torch.Size([2, 8])
    """
    # Of a single column all rows are of one number.
    if is_for_torch(input, weight, bias) and (input.is_nested or input.shape[-1:] != (1,)):
        return F.layer_norm(input, list(normalized_shape), weight, bias, eps)
    x, weight, bias = _join_dimensions("layer_norm", input, normalized_shape, weight, bias)
    return _restore_shape(ops.layer_norm(x, weight, bias, eps), input.shape)


def rms_norm(
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    eps: float | None = None,
) -> torch.Tensor:
    """`torch.nn.functional.rms_norm`: see `fastattn.rms_norm`.

    Example:
        >>> fastattn.functional.rms_norm(torch.randn(2, 8), (8,)).shape
        torch.Size([2, 8])
    """
    if is_for_torch(input, weight):
        return F.rms_norm(input, list(normalized_shape), weight, eps)
    x, weight, _ = _join_dimensions("rms_norm", input, normalized_shape, weight, None)
    return _restore_shape(ops.rms_norm(x, weight, eps), input.shape)


def softmax(
    input: torch.Tensor,
    dim: int | None = None,
    _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """`torch.nn.functional.softmax`: see `fastattn.softmax`.

    A dimension other than the last is copied to the end first.

    Example:
        >>> fastattn.functional.softmax(torch.zeros(1, 2), -1).tolist()
        [[0.5, 0.5]]
    """
    if is_for_torch(input):
        return F.softmax(input, dim, _stacklevel + 1, dtype)
    return _apply_along("softmax", ops.softmax, input, dim, _stacklevel, dtype)


def log_softmax(
    input: torch.Tensor,
    dim: int | None = None,
    _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """`torch.nn.functional.log_softmax`: see `fastattn.log_softmax`.

    A dimension other than the last is copied to the end first.

    Example:
        >>> fastattn.functional.log_softmax(torch.zeros(1, 2), -1).exp().tolist()
        [[0.5, 0.5]]
    """
    if is_for_torch(input):
        return F.log_softmax(input, dim, _stacklevel + 1, dtype)
    return _apply_along("log_softmax", ops.log_softmax, input, dim, _stacklevel, dtype)


def _join_dimensions(
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


def _restore_shape(y: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """`y` itself where it has the shape: a view that is written in place loses FSDP2's hooks."""
    return y if y.shape == shape else y.view(shape)


def _apply_along(
    name: str,
    op: Callable[..., torch.Tensor],
    input: torch.Tensor,
    dim: int | None,
    stacklevel: int,
    dtype: torch.dtype | None,
) -> torch.Tensor:
    """Apply an op of the last dimension to dimension `dim`, with torch's meaning of `dtype`."""
    # torch's own rule where none is given, with its warning.
    place: int = private.softmax_dim(name, input.dim(), stacklevel + 1) if dim is None else dim
    if dtype is not None and not (input.element_size() == 2 and dtype is torch.float32):
        input = input.to(dtype)
    if input.dim() == 0:
        return op(input[None], dtype=dtype)[0]
    return op(input.movedim(place, -1), dtype=dtype).movedim(-1, place)
