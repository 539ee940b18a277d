"""Cross entropy of a linear layer's outputs, which never exist for all rows at once.

The loop over chunks of rows is in `linear_cross_entropy_chunks`. Where the rows' losses are summed
to a scalar, every row's incoming gradient is known but for one factor, so the forward pass computes
the gradients of the sum from the same logits: three products in all, as many as with all logits
held. The backward multiplies by the factor, that of the mean included: only then, in float32, so
that the gradients of a mean over many rows do not vanish in float16. Incoming gradients of single
rows' losses, or of lse, are known in the backward alone, which computes the logits again.
"""

from typing import TYPE_CHECKING, Any, Literal, overload

import torch

from .. import reference
from .core.apply import call
from .core.arguments import read_softcap
from .core.catalog import operation
from .core.gradients import gradients
from .core.precision import autocast, cast_to, disable_autocast
from .core.products import choose_engine
from .core.sharding import is_distributed, replicate
from .cross_entropy_arguments import (
    LinearCrossEntropyOptions,
    check_dtypes,
    check_linear_cross_entropy,
    check_loss_options,
    check_range,
)
from .cross_entropy_samples import LINEAR_SAMPLES
from .linear_cross_entropy_chunks import choose_chunk_rows, linear_cross_entropy_chunks

if TYPE_CHECKING:
    from typing_extensions import Unpack


class LinearCrossEntropyFunction(torch.autograd.Function):
    """(loss, lse, factor, dx, dweight, dbias), of which loss and lse are differentiable.

    The last three are the gradients of the sum of all losses, and factor is what makes them those
    of their mean, None for a sum. `wanted` says which of x, weight and bias need a gradient.
    `settings` are those of linear_cross_entropy_chunks from ignore_index to engine.
    """

    returned = 2

    @staticmethod
    def forward(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        target: torch.Tensor,
        class_weight: torch.Tensor | None,
        loss_dtype: torch.dtype,
        reduction: str,
        return_lse: bool,
        wanted: tuple[bool, bool, bool],
        settings: tuple,
    ) -> tuple:
        tensors = (x, weight, bias, target, class_weight)
        wanted_now = (False, False, False) if reduction == "none" else wanted
        loss, row_weight, lse, *gradients_of_sum = linear_cross_entropy_chunks(
            *tensors, None, None, *settings, list(map(int, (return_lse, *wanted_now)))
        )
        factor = None
        if reduction != "none":
            loss = loss.sum()
        if reduction == "mean":
            total = row_weight.sum()
            loss = loss / total
            # Ignored rows have no gradient, also where the mean over no other rows is NaN.
            counting = (target != settings[0]).sum()
            factor = torch.where(counting == 0, 0.0, 1.0 / total)
        return cast_to(loss, loss_dtype), lse, factor, *gradients_of_sum

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        *tensors, _, _, _, ctx.wanted, ctx.settings = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(o for o in output[2:] if o is not None))
        ctx.save_for_backward(*tensors, *output[2:])

    @staticmethod
    def backward(
        ctx: Any, dloss: torch.Tensor | None, dlse: torch.Tensor | None, *_: None
    ) -> tuple:
        if dloss is None and dlse is None:
            return (None,) * 10
        if dloss is None:
            dloss = dlse.new_zeros(())  # type: ignore[union-attr]
        tensors = (dloss, dlse, *ctx.saved_tensors)
        options = (ctx.wanted, ctx.settings)
        found = gradients(_linear_cross_entropy_backward, _backward_formula, tensors, options)
        return *found, *(None,) * 7


def _linear_cross_entropy_backward(
    dloss: torch.Tensor,
    dlse: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    class_weight: torch.Tensor | None,
    factor: torch.Tensor | None,
    dx: torch.Tensor | None,
    dweight: torch.Tensor | None,
    dbias: torch.Tensor | None,
    wanted: tuple[bool, bool, bool],
    settings: tuple,
) -> tuple[torch.Tensor | None, ...]:
    """(dx, dweight, dbias): those of the sum of losses, scaled, or what the chunks give anew."""
    dlosses = _read_dloss(dloss, factor, x.dtype)
    if dlse is None and any(gradient is not None for gradient in (dx, dweight, dbias)):
        return tuple(_scale(gradient, dlosses, x.dtype) for gradient in (dx, dweight, dbias))
    tensors = (x, weight, bias, target, class_weight)
    *_, dx, dweight, dbias = linear_cross_entropy_chunks(
        *tensors, dlosses.expand(target.shape), dlse, *settings, [0, *map(int, wanted)]
    )
    return tuple(None if g is None else g.to(x.dtype) for g in (dx, dweight, dbias))


def _read_dloss(
    dloss: torch.Tensor, factor: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """The gradient of every row's loss, or the one number that it is in all of them."""
    dloss = dloss.to(torch.promote_types(dtype, torch.float32))
    return dloss if factor is None else dloss * factor


def _scale(
    gradient: torch.Tensor | None, scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor | None:
    """gradient * scale, rounded once, to dtype. What is given is saved, and stays as it is."""
    if gradient is None:
        return None
    # As a tensor without dimensions, scale would be rounded to the dtype of the gradient first.
    scale = scale.reshape(1)
    if is_distributed(gradient):
        # A factor that every rank has leaves rows sharded and sums over rows partial.
        scale = replicate(scale.full_tensor(), gradient)  # type: ignore[attr-defined]
    if torch.compiler.is_compiling() or is_distributed(gradient):
        return (gradient * scale).to(dtype)
    # The weight's gradient is too large to be held in float32 a second time.
    return torch.mul(gradient, scale, out=torch.empty_like(gradient, dtype=dtype))


def _backward_formula(
    dloss: torch.Tensor,
    dlse: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    class_weight: torch.Tensor | None,
    factor: torch.Tensor | None,
    dx: torch.Tensor | None,
    dweight: torch.Tensor | None,
    dbias: torch.Tensor | None,
    wanted: tuple[bool, bool, bool],
    settings: tuple,
) -> tuple[torch.Tensor | None, ...]:
    """What _linear_cross_entropy_backward computes, in PyTorch, on the logits of all rows."""
    ignore_index, _, label_smoothing, z_loss, logit_scale, softcap, _ = settings
    computed = torch.promote_types(x.dtype, torch.float32)
    with_lse = dlse is not None

    def losses(*variables: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, weight, *bias = variables
        outputs = reference.linear_cross_entropy(
            x,
            weight,
            target,
            *bias,
            class_weight=None if class_weight is None else class_weight.detach(),
            ignore_index=ignore_index,
            reduction="none",
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            logit_scale=logit_scale,
            softcap=softcap,
            return_lse=with_lse,
        )
        return outputs if isinstance(outputs, tuple) else (outputs,)

    inputs = [x, weight] if bias is None else [x, weight, bias]
    dlosses = _read_dloss(dloss, factor, x.dtype).expand(target.shape)
    with disable_autocast(x):
        _, pullback, *_ = torch.func.vjp(losses, *(tensor.to(computed) for tensor in inputs))
        found = pullback((dlosses, dlse) if with_lse else (dlosses,))
    dx, dweight, *rest = (gradient.to(x.dtype) for gradient in found)
    return dx, dweight, rest[0] if rest else None


@overload
def linear_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    return_lse: Literal[False] = False,
    **options: "Unpack[LinearCrossEntropyOptions]",
) -> torch.Tensor: ...
@overload
def linear_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    return_lse: Literal[True],
    **options: "Unpack[LinearCrossEntropyOptions]",
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def linear_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    return_lse: bool,
    **options: "Unpack[LinearCrossEntropyOptions]",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...
@operation(
    reference=reference.linear_cross_entropy,
    samples=LINEAR_SAMPLES,
)
def linear_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    class_weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    return_lse: bool = False,
    chunk_rows: int | None = None,
) -> Any:
    """`cross_entropy` of the logits x weight^T + bias, a chunk of rows at a time.

    The logits of all rows never exist: those of a chunk are computed, turned into its losses and
    gradients, and dropped. With reduction "mean" or "sum" that is three products in all, with
    "none", or a gradient through lse, four. Logits are rounded to x's dtype, as a linear layer
    rounds them; from there all is computed in float32 (float64 for float64), where the gradients of
    weight and bias are also added up over chunks. Autocast's dtype is that of the products. Second
    derivatives hold the logits of all rows.

    Rows whose target is `ignore_index` have loss 0 and gradient 0, whatever x holds there: NaN and
    infinity, too, reach nothing. They have an lse as others do, with its gradients, unless it or x
    is not finite: then it is NaN, and its gradients 0. If all rows are ignored, the mean is NaN, as
    torch's, and the gradients 0. A target that is no class raises where that can be seen without
    waiting, on the reference backend on a CPU; the kernels make the loss and the gradients NaN, and
    touch no memory outside.

    Args:
        x: (..., D), float16, bfloat16, float32 or float64.
        weight: (V, D), of x's dtype (under autocast, of any), V at least 1.
        target: (...), int64 class indices.
        bias: (V,), of the weight's dtype, or None.
        class_weight: (V,) class weights of any float dtype, or None for ones. It gets no gradient.
        ignore_index, reduction, label_smoothing, z_loss, logit_scale, softcap: as in
            `cross_entropy`.
        return_lse: return lse as well.
        chunk_rows: the most rows of a chunk; None for two to four thousand on a GPU, fewer where
            there are very many classes, or on a CPU.

    Returns:
        The loss in the dtype of x: a scalar, or (...) with reduction "none". With return_lse
        (loss, lse), lse being (...) in float32 (float64 for float64). Both are any number of times
        differentiable in x, weight and bias.

    Raises:
        TypeError: an argument is no tensor or of an unsupported dtype.
        ValueError: a shape, device or value does not fit.

    Example:
        >>> x, weight = torch.randn(6, 8, requires_grad=True), torch.randn(100, 8)
        >>> target = torch.randint(100, (6,))
        >>> loss = fastattn.linear_cross_entropy(x, weight, target)
        >>> plain = torch.nn.functional.cross_entropy(x @ weight.T, target)
        >>> torch.testing.assert_close(loss, plain)
    """
    check_linear_cross_entropy(x, weight, target, bias, class_weight, chunk_rows)
    check_loss_options(
        "linear_cross_entropy", reduction, label_smoothing, z_loss, logit_scale, softcap
    )
    operands = autocast(x, weight, bias)
    check_dtypes(*operands)
    classes, loss_dtype = weight.shape[0], x.dtype
    engine = choose_engine(operands[0])
    if chunk_rows is None:
        chunk_rows = choose_chunk_rows(classes, operands[0].element_size(), engine)
    if engine == "torch":
        check_range("linear_cross_entropy", target, classes, ignore_index)
        if target.numel() <= chunk_rows:
            return reference.linear_cross_entropy(
                x,
                weight,
                target,
                bias,
                class_weight=class_weight,
                ignore_index=ignore_index,
                reduction=reduction,
                label_smoothing=label_smoothing,
                z_loss=z_loss,
                logit_scale=logit_scale,
                softcap=softcap,
                return_lse=return_lse,
            )
    softcap = read_softcap("linear_cross_entropy", softcap, operands[0].dtype)
    numbers = (float(label_smoothing), float(z_loss), float(logit_scale))
    settings = (ignore_index, chunk_rows, *numbers, softcap, engine)
    wanted = tuple(
        tensor is not None and tensor.requires_grad and torch.is_grad_enabled()
        for tensor in operands
    )
    loss, lse, *_ = call(
        LinearCrossEntropyFunction,
        *operands,
        target,
        class_weight,
        loss_dtype,
        reduction,
        return_lse,
        wanted,
        settings,
    )
    return (loss, lse) if return_lse else loss
