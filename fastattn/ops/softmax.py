"""softmax and log_softmax over the last dimension."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from .. import reference
from .core.apply import call
from .core.arguments import check_float_tensor, refuse_nested
from .core.backends import use_triton
from .core.catalog import Normal, Sample, operation
from .core.gradients import gradients
from .core.lazy_imports import lazy_module
from .core.registration import kernel_op
from .core.sharding import rowwise

if TYPE_CHECKING:
    from ..kernels import softmax as kernels
else:
    kernels = lazy_module("fastattn.kernels.softmax")


def _sharding(x: Any, mask: Any, scale: float, y_dtype: Any, causal: bool, log: bool) -> list:
    """By rows; but causal rows need their place among the queries, and a mask all of x."""
    replicate, *sharded = rowwise(rows_in=(0,), rows_out=(0,))(x, mask, scale, y_dtype, causal, log)
    if mask is not None:
        return [replicate]
    return [replicate, *(sharded[:-1] if causal else sharded)]


@kernel_op(kernels.softmax_forward, sharding=_sharding)
def softmax_forward(
    x: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    y_dtype: torch.dtype,
    causal: bool,
    log: bool,
) -> torch.Tensor:
    """y, see softmax_forward in kernels/softmax.py."""
    return x.new_empty(x.shape, dtype=y_dtype)


@kernel_op(kernels.softmax_backward, sharding=rowwise(rows_in=(0, 1), rows_out=(0,)))
def softmax_backward(
    dy: torch.Tensor, y: torch.Tensor, scale: float, x_dtype: torch.dtype, log: bool
) -> torch.Tensor:
    """dx, see softmax_backward in kernels/softmax.py."""
    return y.new_empty(y.shape, dtype=x_dtype)


class SoftmaxFunction(torch.autograd.Function):
    """softmax_forward; `settings` are its scale, y_dtype, causal and log."""

    @staticmethod
    def forward(x: torch.Tensor, mask: torch.Tensor | None, settings: tuple) -> torch.Tensor:
        return softmax_forward(x, mask, *settings)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
        x, _, ctx.settings = inputs
        ctx.x_dtype = x.dtype
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple:
        (y,) = ctx.saved_tensors
        scale, _, _, log = ctx.settings
        options = (scale, ctx.x_dtype, log)
        dx = gradients(softmax_backward, _softmax_backward_formula, (dy, y), options)
        return dx, None, None


def _softmax_backward_formula(
    dy: torch.Tensor, y: torch.Tensor, scale: float, x_dtype: torch.dtype, log: bool
) -> torch.Tensor:
    """What softmax_backward computes, in PyTorch: a function of y, which has a history itself."""
    computed = torch.promote_types(y.dtype, torch.float32)
    dy, y = dy.to(computed), y.to(computed)
    if log:
        dx = dy - y.exp() * dy.sum(-1, keepdim=True)
    else:
        dx = y * (dy - (y * dy).sum(-1, keepdim=True))
    return (dx * scale).to(x_dtype)


def make_mask(*shape: int) -> Callable[[str | torch.device], torch.Tensor]:
    """For samples: a mask that keeps two of three columns, and none in its first row."""

    def make(device: str | torch.device) -> torch.Tensor:
        mask = torch.arange(torch.Size(shape).numel()).reshape(shape) % 3 != 0
        mask.view(-1, shape[-1])[0] = False
        return mask.to(device)

    return make


@operation(
    reference=reference.softmax,
    samples=(
        Sample("smallest", x=(2, 5), scale=0.7),
        Sample("causal and masked", x=(2, 3, 5, 40), causal=True, mask=make_mask(5, 40), scale=0.3),
        Sample("several rows a tile", x=(3, 7, 64)),
        Sample("more queries than keys", x=(2, 9, 5), causal=True),
        Sample("mask by batch", x=(2, 3, 4, 33), mask=make_mask(2, 1, 1, 33)),
        Sample("mask by row", x=(2, 3, 4, 33), mask=make_mask(3, 4, 1)),
        Sample("mask of five dimensions", x=(2, 2, 3, 4, 17), mask=make_mask(2, 1, 3, 1, 17)),
        Sample("one dimension", x=(33,)),
        Sample("one element a row", x=(5, 1)),
        Sample("large values", x=Normal((64, 50), scale=4.0, mean=100.0)),
        Sample("wide backward", x=(2, 9001)),
        Sample("wide", x=(2, 20001), scale=2.0),
        Sample("wide, causal and masked", x=(2, 20001), causal=True, mask=make_mask(2, 20001)),
        Sample("float32 result", x=(9, 72), dtype=torch.float32),
        Sample("no rows", x=(0, 16)),
    ),
)
def softmax(
    x: torch.Tensor,
    *,
    causal: bool = False,
    mask: torch.Tensor | None = None,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """exp(scale * x) over its sum along the last dimension, over the columns that are kept.

    Computed in float32 (float64 for float64) whatever x's dtype; autocast does not change it. A row
    in which nothing is kept, or nothing but -inf, is 0 under `causal` or a `mask`, and its gradient
    too; without either it is NaN, as in torch.

    Args:
        x: (..., M, N), any number of dimensions from one, float16, bfloat16, float32 or float64.
            Any strides; rows with a unit last stride at one common distance are read in place,
            other layouts are copied.
        causal: keep for row i of the last two dimensions the columns up to i + N - M.
        mask: booleans that broadcast to x's shape, True where a column is kept. Read by strides,
            never expanded in memory, but for one copy where x has more than four dimensions and
            the leading ones cannot be folded.
        scale: multiplies x.
        dtype: the dtype of the result; None is x's.

    Returns:
        A tensor shaped like x, any number of times differentiable in x.

    Raises:
        TypeError: an argument is no tensor or of an unsupported dtype.
        ValueError: a shape or device does not fit.

    Example:
        >>> fastattn.softmax(torch.zeros(2, 2), causal=True).tolist()
        [[1.0, 0.0], [0.5, 0.5]]
    """
    _check("softmax", x, dtype)
    if causal and x.dim() < 2:
        raise ValueError("softmax: x must have at least two dimensions to be causal, got one")
    if mask is not None:
        _check_mask(mask, x)
    if not use_triton(x):
        return reference.softmax(x, causal=causal, mask=mask, scale=scale, dtype=dtype)
    return call(SoftmaxFunction, x, mask, (float(scale), dtype or x.dtype, causal, False))


@operation(
    reference=reference.log_softmax,
    samples=(
        Sample("smallest", x=(2, 5)),
        Sample("several rows a tile", x=(3, 7, 64)),
        Sample("one dimension", x=(33,)),
        Sample("one element a row", x=(5, 1)),
        Sample("large values", x=Normal((64, 50), scale=4.0, mean=100.0)),
        Sample("wide backward", x=(2, 9001)),
        Sample("wide", x=(2, 20001)),
        Sample("float32 result", x=(9, 72), dtype=torch.float32),
        Sample("no rows", x=(0, 16)),
    ),
)
def log_softmax(x: torch.Tensor, *, dtype: torch.dtype | None = None) -> torch.Tensor:
    """x - log(sum(exp(x))) along the last dimension.

    Args:
        x: (..., N), as in `softmax`.
        dtype: the dtype of the result; None is x's.

    Returns:
        A tensor shaped like x, any number of times differentiable in x.

    Raises:
        TypeError, ValueError: an argument does not fit.

    Example:
        >>> fastattn.log_softmax(torch.zeros(1, 4)).exp().tolist()
        [[0.25, 0.25, 0.25, 0.25]]
    """
    _check("log_softmax", x, dtype)
    if not use_triton(x):
        return reference.log_softmax(x, dtype=dtype)
    return call(SoftmaxFunction, x, None, (1.0, dtype or x.dtype, False, True))


def _check(op: str, x: torch.Tensor, dtype: torch.dtype | None) -> None:
    check_float_tensor(op, "x", x)
    if x.dim() == 0:
        raise ValueError(f"{op}: x must have at least one dimension, got a scalar")
    if dtype is not None:
        check_float_tensor(op, "dtype", x.new_empty(0, dtype=dtype), like=x)


def _check_mask(mask: torch.Tensor, x: torch.Tensor) -> None:
    if not isinstance(mask, torch.Tensor) or mask.dtype is not torch.bool:
        got = mask.dtype if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise TypeError(f"softmax: mask must be a tensor of booleans, got {got}")
    if mask.device != x.device:
        raise ValueError(f"softmax: mask must be on {x.device}, got {mask.device}")
    if mask.is_nested:
        refuse_nested("softmax", "mask")
    fits = mask.dim() <= x.dim() and all(
        size in (1, wanted)
        for size, wanted in zip(reversed(mask.shape), reversed(x.shape), strict=False)
    )
    if not fits:
        raise ValueError(
            f"softmax: mask must broadcast to {tuple(x.shape)}, got {tuple(mask.shape)}"
        )
