"""Cross entropy over the last dimension of logits."""

from typing import TYPE_CHECKING, Any, Literal, overload

import torch

from .. import reference
from .core.apply import call
from .core.arguments import read_softcap
from .core.backends import use_triton
from .core.catalog import operation
from .core.gradients import gradients
from .core.lazy_imports import lazy_module
from .core.precision import cast_to
from .core.registration import kernel_op
from .core.sharding import rowwise
from .cross_entropy_arguments import (
    CrossEntropyOptions,
    check_cross_entropy,
    check_loss_options,
    check_overwritable,
    check_range,
)
from .cross_entropy_samples import SAMPLES

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..kernels import cross_entropy as kernels
else:
    kernels = lazy_module("fastattn.kernels.cross_entropy")


@kernel_op(kernels.cross_entropy_forward, sharding=rowwise(rows_in=(0, 1), rows_out=(0, 1, 2, 3)))
def cross_entropy_forward(
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    logit_scale: float,
    softcap: float | None,
    loss_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, lse, its error, the target's weight) of rows, see kernels/cross_entropy.py."""

    def make_numbers(dtype: torch.dtype) -> torch.Tensor:
        return logits.new_empty(logits.shape[:-1], dtype=dtype)

    computed = torch.promote_types(logits.dtype, torch.float32)
    return (
        make_numbers(loss_dtype),
        make_numbers(computed),
        make_numbers(computed),
        make_numbers(computed),
    )


@kernel_op(
    kernels.cross_entropy_backward, sharding=rowwise(rows_in=(2, 0, 1, 3, 5, 6), rows_out=(0,))
)
def cross_entropy_backward(
    dloss: torch.Tensor,
    dlse: torch.Tensor | None,
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    lse: torch.Tensor,
    lse_error: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    logit_scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """dlogits, see cross_entropy_backward in kernels/cross_entropy.py."""
    return logits.new_empty(logits.shape)


class CrossEntropyFunction(torch.autograd.Function):
    """(loss, lse, lse_error, total weight), of which loss and lse are differentiable in logits.

    `settings` are ignore_index, label_smoothing, z_loss, logit_scale and softcap. The kernels know
    of rows only: their losses are reduced here, by sums in PyTorch, whose order is fixed.
    """

    returned = 2

    @staticmethod
    def forward(
        logits: torch.Tensor,
        target: torch.Tensor,
        weight: torch.Tensor | None,
        reduction: str,
        overwrite: bool,
        settings: tuple,
    ) -> tuple:
        computed = torch.promote_types(logits.dtype, torch.float32)
        loss_dtype = logits.dtype if reduction == "none" else computed
        loss, lse, lse_error, row_weight = cross_entropy_forward(
            logits, target, weight, *settings, loss_dtype
        )
        total = None
        if reduction != "none":
            loss = loss.sum()
        if reduction == "mean":
            total = row_weight.sum()
            loss = loss / total
        return cast_to(loss, logits.dtype), lse, lse_error, total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        logits, target, weight, _, ctx.overwrite, ctx.settings = inputs
        ctx.overwritten = False
        _, lse, lse_error, total = output
        ctx.set_materialize_grads(False)
        if total is None:
            ctx.mark_non_differentiable(lse_error)
        else:
            ctx.mark_non_differentiable(lse_error, total)
        ctx.save_for_backward(logits, target, weight, lse, lse_error, total)

    @staticmethod
    def backward(
        ctx: Any, dloss: torch.Tensor | None, dlse: torch.Tensor | None, *_: None
    ) -> tuple:
        if ctx.overwritten:
            raise RuntimeError(
                "cross_entropy: the gradient has taken the place of the logits "
                "(inplace_backward=True), so there can be no second backward"
            )
        logits, target, weight, lse, lse_error, total = ctx.saved_tensors
        if dloss is None and dlse is None:
            return (None,) * 6
        dlosses = torch.zeros_like(lse)
        if dloss is not None:
            dlosses = (dloss if total is None else dloss / total).expand(lse.shape)
        # The saved lse is an output, whose history must not be walked: it is a function of logits.
        tensors = (dlosses, dlse, logits, target, weight, lse.detach(), lse_error)
        if ctx.overwrite:
            dlogits = _overwrite(tensors, ctx.settings)
            ctx.overwritten = True
        else:
            dlogits = gradients(
                cross_entropy_backward, _cross_entropy_backward_formula, tensors, ctx.settings
            )
        return dlogits, None, None, None, None, None


def _overwrite(tensors: tuple, settings: tuple) -> torch.Tensor:
    """The gradient in the memory of the logits, whose version is bumped."""
    # Not through the registered op, which must not change its arguments.
    from ..kernels import cross_entropy as kernels

    if torch.is_grad_enabled():
        raise RuntimeError(
            "cross_entropy: inplace_backward=True and create_graph=True exclude each other: "
            "derivatives of the gradient need the logits"
        )
    dlogits = kernels.cross_entropy_backward(*tensors, *settings, overwrite=True)
    torch.autograd.graph.increment_version(dlogits)
    return dlogits


def _cross_entropy_backward_formula(
    dloss: torch.Tensor,
    dlse: torch.Tensor | None,
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    lse: torch.Tensor,
    lse_error: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    logit_scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """What cross_entropy_backward computes, in PyTorch; lse is a function of logits here."""

    def losses(logits: torch.Tensor) -> Any:
        return reference.cross_entropy(
            logits,
            target,
            weight=None if weight is None else weight.detach(),
            ignore_index=ignore_index,
            reduction="none",
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            logit_scale=logit_scale,
            softcap=softcap,
            return_lse=True,
        )

    _, pullback, *_ = torch.func.vjp(losses, logits.to(lse.dtype))
    dlse = torch.zeros_like(lse) if dlse is None else dlse
    (dlogits,) = pullback((dloss.to(lse.dtype), dlse))
    return dlogits.to(logits.dtype)


@overload
def cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    return_lse: Literal[False] = False,
    **options: "Unpack[CrossEntropyOptions]",
) -> torch.Tensor: ...
@overload
def cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    return_lse: Literal[True],
    **options: "Unpack[CrossEntropyOptions]",
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    return_lse: bool,
    **options: "Unpack[CrossEntropyOptions]",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...
@operation(
    reference=reference.cross_entropy,
    samples=SAMPLES,
)
def cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    return_lse: bool = False,
    inplace_backward: bool = False,
) -> Any:
    """Cross entropy of logits, whose classes are the last dimension, with class indices.

    With x the logits, scaled and capped, t the target, w the class weights and lse =
    log(sum(exp(x))), a row's loss is w_t ((1 - s) (lse - x_t) + z_loss lse^2) + s/V sum_c w_c (lse
    - x_c), s being the label smoothing and V the number of classes. Computed in float32 (float64
    for float64) whatever the dtype of the logits; autocast does not change it. The logits are read
    once forward and once backward.

    Rows whose target is `ignore_index` have loss 0 and gradient 0, whatever their logits hold: NaN
    and infinity, too, reach nothing. They have an lse as others do, with its gradient, unless it is
    not finite: then it is NaN, and its gradient 0. If all rows are ignored, the mean is NaN, as
    torch's, and the gradient 0. A target that is no class
    raises where that can be seen without waiting, on the reference backend on a CPU; the kernels
    make the loss and the gradient of its row NaN, and touch no memory outside.

    Args:
        logits: (..., V), float16, bfloat16, float32 or float64, V at least 1. Any strides; rows
            with a unit last stride at one common distance are read in place, others are copied.
        target: (...), int64 class indices; or (..., V) class probabilities of any float dtype, with
            which the reference computes on every device.
        weight: (V,) class weights of any float dtype, or None for ones. It gets no gradient.
        ignore_index: the target of rows that do not count.
        reduction: "mean" divides the sum of the losses by the sum of w_t over the rows that count
            (with probabilities, by the number of rows); "sum" adds them; "none" returns them.
        label_smoothing: in [0, 1], spread over all classes.
        z_loss: the factor, non-negative, of lse^2 in every row's loss. Being inside the row's loss
            it is weighted by w_t and averaged as the loss is: over the rows that count.
        logit_scale: a positive number that the logits are multiplied by first, in the kernels
            and in float32: Cohere's logit_scale, or 1 over Granite's logits_scaling or a
            temperature.
        softcap: a positive number; the scaled logits become softcap * tanh(logits / softcap).
            Infinity is no cap.
        return_lse: return lse as well.
        inplace_backward: write the gradient over the logits, which saves its memory. They must be
            contiguous and not a leaf; their version is bumped, so that whoever needs them
            unchanged fails, and a second backward is refused. Under torch.compile, which plans
            memory itself, and on the reference backend the gradient is a new tensor all the same.

    Returns:
        The loss in the dtype of the logits: a scalar, or (...) with reduction "none". With
        return_lse (loss, lse), lse being (...) in float32 (float64 for float64). Both are any
        number of times differentiable in the logits.

    Raises:
        TypeError: an argument is no tensor or of an unsupported dtype.
        ValueError: a shape, device or value does not fit.

    Source: the z-loss of Chowdhery et al., "PaLM" (2022); the cap of "Gemma 2" (2024).

    Example:
        >>> logits = torch.zeros(3, 4, requires_grad=True)
        >>> loss = fastattn.cross_entropy(logits, torch.tensor([0, 2, -100]))
        >>> torch.testing.assert_close(loss, torch.tensor(4.0).log())
    """
    check_cross_entropy(logits, target, weight)
    check_loss_options("cross_entropy", reduction, label_smoothing, z_loss, logit_scale, softcap)
    if not use_triton(logits) or target.is_floating_point():
        check_range("cross_entropy", target, logits.shape[-1], ignore_index)
        return reference.cross_entropy(
            logits,
            target,
            weight=weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            logit_scale=logit_scale,
            softcap=softcap,
            return_lse=return_lse,
        )
    overwrite = inplace_backward and not torch.compiler.is_compiling()
    if overwrite:
        check_overwritable(logits)
    softcap = read_softcap("cross_entropy", softcap, logits.dtype)
    numbers = (float(label_smoothing), float(z_loss), float(logit_scale))
    settings = (ignore_index, *numbers, softcap)
    loss, lse, *_ = call(
        CrossEntropyFunction, logits, target, weight, reduction, overwrite, settings
    )
    return (loss, lse) if return_lse else loss
