"""Norms whose scale and shift each sample has for itself, as in diffusion transformers."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..reference import modulated_norm as reference
from .core.apply import call
from .core.arguments import check_float_tensor
from .core.backends import use_triton
from .core.catalog import Normal, Sample, operation
from .core.gradients import gradients
from .core.lazy_imports import lazy_module
from .core.norm import check_norm
from .core.registration import kernel_op
from .core.sharding import Sharding

if TYPE_CHECKING:
    from ..kernels.norm import modulated as kernels
else:
    kernels = lazy_module("fastattn.kernels.norm.modulated")


def _samples_or_tokens(
    rows_in: Sequence[int], each_in: Sequence[int], rows_out: Sequence[int], each_out: Sequence[int]
) -> Sharding:
    """The rule: what has rows (B, tokens, cols) is sharded over samples, or over tokens.

    Args:
        rows_in, rows_out: places of the arguments and outputs that are made of rows.
        each_in, each_out: places of those that each sample has once (B, cols). Over tokens the
            arguments are replicated, and the outputs sums.
    """

    def rule(*args: Any) -> list[tuple[list[Any], list[Any]]]:
        from torch.distributed.tensor import Partial, Replicate, Shard

        def place(rows: Any, each: Any, summed: Any) -> tuple[list[Any], list[Any]]:
            outputs = {**dict.fromkeys(rows_out, rows), **dict.fromkeys(each_out, summed)}
            inputs = {**dict.fromkeys(rows_in, rows), **dict.fromkeys(each_in, each)}
            return [outputs[i] for i in range(len(outputs))], list(
                map(inputs.get, range(len(args)))
            )

        return [
            place(Replicate(), Replicate(), Replicate()),
            place(Shard(0), Shard(0), Shard(0)),
            place(Shard(1), Replicate(), Partial()),
        ]

    return rule


@kernel_op(kernels.modulated_norm_forward, sharding=_samples_or_tokens((0,), (1, 2), (0, 1), ()))
def modulated_norm_forward(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float, centered: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, statistics of the rows), see modulated_norm_forward in kernels/norm/modulated.py."""
    shape = (*x.shape[:-1], 2 if centered else 1)
    statistics = x.new_empty(shape, dtype=torch.promote_types(x.dtype, torch.float32))
    return x.new_empty(x.shape), statistics


@kernel_op(
    kernels.modulated_norm_backward, sharding=_samples_or_tokens((0, 1, 3), (2,), (0,), (1, 2))
)
def modulated_norm_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    scale: torch.Tensor,
    statistics: torch.Tensor,
    scale_dtype: torch.dtype | None,
    shift_dtype: torch.dtype | None,
    centered: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """(dx, dscale, dshift), see modulated_norm_backward in kernels/norm/modulated.py."""
    return (
        x.new_empty(x.shape),
        None if scale_dtype is None else x.new_empty(scale.shape, dtype=scale_dtype),
        None if shift_dtype is None else x.new_empty(scale.shape, dtype=shift_dtype),
    )


class ModulatedNormFunction(torch.autograd.Function):
    """(y, statistics) of modulated_norm_forward, of which y is differentiable."""

    returned = 1

    @staticmethod
    def forward(
        x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float, centered: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return modulated_norm_forward(x, scale, shift, eps, int(centered))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        x, scale, shift, ctx.eps, ctx.centered = inputs
        ctx.shift_dtype = shift.dtype
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, scale, output[1])

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor, *_: None) -> tuple[torch.Tensor | None, ...]:
        x, scale, statistics = ctx.saved_tensors
        needs_scale, needs_shift = ctx.needs_input_grad[1:3]
        scale_dtype = scale.dtype if needs_scale else None
        shift_dtype = ctx.shift_dtype if needs_shift else None
        dx, dscale, dshift = gradients(
            modulated_norm_backward,
            _backward_formula,
            (dy, x, scale, statistics),
            (scale_dtype, shift_dtype, ctx.centered),
            (ctx.eps,),
        )
        return dx, dscale, dshift, None, None


def _backward_formula(
    dy: torch.Tensor,
    x: torch.Tensor,
    scale: torch.Tensor,
    statistics: torch.Tensor,
    scale_dtype: torch.dtype | None,
    shift_dtype: torch.dtype | None,
    centered: bool,
    eps: float,
) -> tuple[torch.Tensor | None, ...]:
    """What modulated_norm_backward computes, in PyTorch; statistics are a function of x here."""
    norm = reference.modulated_layer_norm if centered else reference.modulated_rms_norm

    def modulated(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        return norm(x, shift, scale, eps)

    # The shift counts for nothing but its own gradient.
    shift = torch.zeros_like(scale, dtype=shift_dtype or scale.dtype)
    _, pullback, *_ = torch.func.vjp(modulated, x, scale, shift)
    dx, dscale, dshift = pullback(dy)
    return dx, dscale if scale_dtype else None, dshift if shift_dtype else None


SAMPLES = (
    Sample("smallest", x=(2, 3, 5), shift=(2, 5), scale=(2, 5)),
    Sample("several rows a tile", x=(3, 37, 64), shift=(3, 64), scale=(3, 64)),
    Sample("several dimensions, odd width", x=(2, 3, 5, 130), shift=(2, 130), scale=(2, 130)),
    Sample("one token", x=(7, 96), shift=(7, 96), scale=(7, 96), eps=1e-5),
    Sample(
        "float32 modulation",
        x=(2, 9, 40),
        shift=Normal((2, 1, 40), torch.float32),
        scale=Normal((2, 1, 40), torch.float32),
    ),
    Sample("wide", x=(2, 2, 9000), shift=(2, 9000), scale=(2, 9000)),
    Sample("no tokens", x=(2, 0, 16), shift=(2, 16), scale=(2, 16)),
)


@operation(reference=reference.modulated_layer_norm, samples=SAMPLES)
def modulated_layer_norm(
    x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float = 1e-6
) -> torch.Tensor:
    """Layer normalization with a scale and a shift of each sample: adaLN.

    y = (x - mean(x)) / sqrt(var(x) + eps) * (1 + scale) + shift in one kernel, computed in float32
    (float64 for float64) whatever the inputs' dtype; autocast does not change it. The gradients of
    scale and shift are sums over a sample's tokens, with the same bits every time.

    Args:
        x: (B, ..., cols), float16, bfloat16, float32 or float64. Any strides; rows with a unit last
            stride at one common distance are read in place, other layouts are copied.
        shift: (B, cols), or with ones between, of any float dtype. Slices of a wider product, as
            `chunk` gives them, are read in place.
        scale: likewise.
        eps: added to the variance.

    Returns:
        y, shaped like x, any number of times differentiable in x, shift and scale.

    Raises:
        TypeError: an argument is no tensor or of an unsupported dtype.
        ValueError: a shape, device or value does not fit.

    Source: Peebles and Xie, "Scalable Diffusion Models with Transformers" (2022).

    Example:
        >>> x, condition = torch.randn(2, 16, 8), torch.randn(2, 16)
        >>> shift, scale = condition.chunk(2, dim=1)
        >>> fastattn.modulated_layer_norm(x, shift, scale).shape
        torch.Size([2, 16, 8])
    """
    return _modulated("modulated_layer_norm", x, shift, scale, eps, centered=True)


@operation(reference=reference.modulated_rms_norm, samples=SAMPLES)
def modulated_rms_norm(
    x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float = 1e-6
) -> torch.Tensor:
    """RMSNorm with a scale and a shift of each sample: x / rms(x) * (1 + scale) + shift.

    Args:
        x, shift, scale, eps: as in `fastattn.modulated_layer_norm`.

    Returns:
        y, shaped like x, any number of times differentiable in x, shift and scale.

    Raises:
        TypeError, ValueError: as in `fastattn.modulated_layer_norm`.

    Source: Peebles and Xie, "Scalable Diffusion Models with Transformers" (2022), with the norm of
    Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019).

    Example:
        >>> shift, scale = torch.zeros(2, 2, 8)
        >>> fastattn.modulated_rms_norm(torch.randn(2, 16, 8), shift, scale).shape
        torch.Size([2, 16, 8])
    """
    return _modulated("modulated_rms_norm", x, shift, scale, eps, centered=False)


def _modulated(
    op: str, x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float, centered: bool
) -> torch.Tensor:
    check_norm(op, x, None, None, eps)
    if x.dim() < 2:
        raise ValueError(f"{op}: x must be (B, ..., cols), got {tuple(x.shape)}")
    wanted = (x.shape[0], x.shape[-1])
    for name, t in (("shift", shift), ("scale", scale)):
        check_float_tensor(op, name, t, like=x)
        between = t.shape[1:-1]
        fits = 2 <= t.dim() <= x.dim() and (t.shape[0], t.shape[-1]) == wanted
        if not fits or any(size != 1 for size in between):
            raise ValueError(
                f"{op}: {name} must be {wanted}, or with ones between, got {tuple(t.shape)}"
            )
    if not use_triton(x):
        norm = reference.modulated_layer_norm if centered else reference.modulated_rms_norm
        return norm(x, shift, scale, eps)
    # Dimensions of one size go as views; of x too where its rows lie at one distance.
    shift, scale = (t.reshape(wanted) for t in (shift, scale))
    rows = x.reshape(wanted[0], math.prod(x.shape[1:-1]), wanted[1])
    y, *_ = call(ModulatedNormFunction, rows, scale, shift, float(eps), centered)
    return y.reshape(x.shape)
