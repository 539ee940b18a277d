"""Log-probabilities of a linear layer's outputs, which never exist for all rows at once.

The loops over chunks of rows are in `linear_log_prob_chunks`. What a loss makes of the numbers of
the rows is not known before the backward, which computes the logits again: four products in all.
Saved are the operands and a few numbers of each row.
"""

from typing import TYPE_CHECKING, Any, Literal, overload

import torch

from ..reference import log_prob as reference
from .core.apply import call
from .core.arguments import read_softcap
from .core.catalog import operation
from .core.gradients import gradients
from .core.precision import autocast, disable_autocast
from .core.products import choose_engine
from .cross_entropy_arguments import check_range
from .linear_cross_entropy_chunks import choose_chunk_rows
from .linear_log_prob_chunks import linear_log_prob_chunks, linear_log_prob_gradients
from .log_prob import select_outputs
from .log_prob_arguments import (
    LinearLogProbOptions,
    check_linear_log_prob,
    check_log_prob_options,
    check_same_dtypes,
)
from .log_prob_samples import LINEAR_SAMPLES

if TYPE_CHECKING:
    from typing_extensions import Unpack


class LinearLogProbFunction(torch.autograd.Function):
    """(log_prob, entropy, correct, lse, lse_error), of which the first two are differentiable.

    `settings` are logit_scale, temperature, softcap and engine.
    """

    returned = 3

    @staticmethod
    def forward(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        target: torch.Tensor,
        integers: tuple[int, int],
        wanted: tuple[int, int],
        settings: tuple,
    ) -> tuple:
        return linear_log_prob_chunks(x, weight, bias, target, *integers, *wanted, *settings)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        *tensors, integers, _, settings = inputs
        _, entropy, *constant = output
        ctx.settings = (*integers, *settings)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(o for o in constant if o is not None))
        ctx.save_for_backward(*tensors, entropy, *constant[1:])

    @staticmethod
    def backward(
        ctx: Any, dlog_prob: torch.Tensor | None, dentropy: torch.Tensor | None, *_: None
    ) -> tuple:
        if dlog_prob is None:
            if dentropy is None:
                return (None,) * 7
            dlog_prob = torch.zeros_like(dentropy)
        *operands, entropy, lse, lse_error = ctx.saved_tensors
        # The saved entropy is an output, whose history must not be walked.
        entropy = None if entropy is None else entropy.detach()
        tensors = (dlog_prob, dentropy, *operands, entropy, lse, lse_error)
        options = (ctx.settings, list(map(int, ctx.needs_input_grad[:3])))
        found = gradients(_linear_log_prob_backward, _backward_formula, tensors, options)
        return *found, *(None,) * 4


def _linear_log_prob_backward(*args: Any) -> tuple[torch.Tensor | None, ...]:
    """(dx, dweight, dbias) of linear_log_prob_gradients, in the dtype of the operands."""
    *tensors, settings, wanted = args
    dtype = tensors[2].dtype
    found = linear_log_prob_gradients(*tensors, *settings, wanted)
    return tuple(None if gradient is None else gradient.to(dtype) for gradient in found)


def _backward_formula(
    dlog_prob: torch.Tensor,
    dentropy: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    entropy: torch.Tensor | None,
    lse: torch.Tensor | None,
    lse_error: torch.Tensor | None,
    settings: tuple,
    wanted: list[int],
) -> tuple[torch.Tensor | None, ...]:
    """What _linear_log_prob_backward computes, in PyTorch, on the logits of all rows."""
    ignore_index, _, logit_scale, temperature, softcap, _ = settings
    computed = torch.promote_types(x.dtype, torch.float32)

    def outputs(*variables: torch.Tensor) -> Any:
        x, weight, *bias = variables
        return reference.linear_log_prob(
            x,
            weight,
            target,
            *bias,
            temperature=temperature,
            softcap=softcap,
            logit_scale=logit_scale,
            ignore_index=ignore_index,
            return_entropy=dentropy is not None,
        )

    inputs = [x, weight] if bias is None else [x, weight, bias]
    with disable_autocast(x):
        _, pullback, *_ = torch.func.vjp(outputs, *(tensor.to(computed) for tensor in inputs))
        found = pullback(dlog_prob if dentropy is None else (dlog_prob, dentropy))
    found = [*(gradient.to(x.dtype) for gradient in found), None][:3]
    return tuple(g if is_wanted else None for g, is_wanted in zip(found, wanted, strict=True))


@overload
def linear_log_prob(
    x: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    return_entropy: Literal[False] = False,
    return_correct: Literal[False] = False,
    **options: "Unpack[LinearLogProbOptions]",
) -> torch.Tensor: ...
@overload
def linear_log_prob(
    x: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    return_entropy: Literal[True],
    return_correct: Literal[False] = False,
    **options: "Unpack[LinearLogProbOptions]",
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def linear_log_prob(
    x: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    return_entropy: Literal[True],
    return_correct: Literal[True],
    **options: "Unpack[LinearLogProbOptions]",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: ...
@overload
def linear_log_prob(
    x: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    return_entropy: Literal[False] = False,
    return_correct: Literal[True],
    **options: "Unpack[LinearLogProbOptions]",
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def linear_log_prob(
    x: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    return_entropy: bool = False,
    return_correct: bool = False,
    **options: "Unpack[LinearLogProbOptions]",
) -> torch.Tensor | tuple[torch.Tensor, ...]: ...
@operation(reference=reference.linear_log_prob, samples=LINEAR_SAMPLES)
def linear_log_prob(
    x: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    return_entropy: bool = False,
    return_correct: bool = False,
    chunk_rows: int | None = None,
) -> Any:
    """`log_prob` of the logits x weight^T + bias, a chunk of rows at a time.

    The logits of all rows never exist: those of a chunk are computed, turned into numbers of its
    rows, and dropped; the backward computes them again. That is four products in all. Logits are
    rounded to x's dtype, as a linear layer rounds them; from there all is computed in float32
    (float64 for float64), where the gradients of weight and bias are also added up over chunks.
    Autocast's dtype is that of the products. Second derivatives hold the logits of all rows.

    Rows whose target is `ignore_index` have log-probability, entropy and gradient 0, whatever x
    holds there: NaN and infinity, too, reach nothing. They are multiplied as others are; who can
    wait for the device packs the others first, see `fastattn.losses.pack_rows`. A target that is no
    class raises where that can be seen without waiting, on the reference backend on a CPU; the
    kernels make the log-probability and the gradients NaN, and touch no memory outside.

    Args:
        x: (..., D), float16, bfloat16, float32 or float64.
        weight: (V, D), of x's dtype (under autocast, of any), V at least 1.
        target: (...), int64 class indices.
        bias: (V,), of the weight's dtype, or None.
        temperature, softcap, logit_scale, ignore_index: as in `log_prob`.
        return_entropy, return_correct: as in `log_prob`.
        chunk_rows: the most rows of a chunk; None for two to four thousand on a GPU, fewer where
            there are very many classes, or on a CPU.

    Returns:
        log_prob (...) in float32 (float64 for float64), or a tuple of it and of what is asked for:
        entropy (...) of that dtype, correct (...) of bools. The first two are any number of times
        differentiable in x, weight and bias.

    Raises:
        TypeError: an argument is no tensor or of an unsupported dtype.
        ValueError: a shape, device or value does not fit, or weight is a DTensor that is sharded
            over its classes.

    Example:
        log_p = fastattn.linear_log_prob(hidden, head.weight, labels, temperature=0.7)

    Source: as `log_prob`; chunks of the head are those of `linear_cross_entropy`.

    Example:
        >>> x, weight = torch.randn(6, 8), torch.randn(100, 8)
        >>> log_prob, entropy = fastattn.linear_log_prob(
        ...     x, weight, torch.randint(100, (6,)), return_entropy=True
        ... )
        >>> log_prob.shape, entropy.shape
        (torch.Size([6]), torch.Size([6]))
    """
    check_linear_log_prob(x, weight, target, bias, chunk_rows)
    check_log_prob_options("linear_log_prob", temperature, softcap, logit_scale)
    operands = autocast(x, weight, bias)
    check_same_dtypes("linear_log_prob", operands[0], weight=operands[1], bias=operands[2])
    classes = weight.shape[0]
    engine = choose_engine(operands[0])
    if chunk_rows is None:
        chunk_rows = choose_chunk_rows(classes, operands[0].element_size(), engine)
    if engine == "torch":
        check_range("linear_log_prob", target, classes, ignore_index)
        if target.numel() <= chunk_rows:
            return reference.linear_log_prob(
                x,
                weight,
                target,
                bias,
                temperature=temperature,
                softcap=softcap,
                logit_scale=logit_scale,
                ignore_index=ignore_index,
                return_entropy=return_entropy,
                return_correct=return_correct,
            )
    softcap = read_softcap("linear_log_prob", softcap, operands[0].dtype)
    settings = (float(logit_scale), float(temperature), softcap, engine)
    wanted = (int(return_entropy), int(return_correct))
    integers = (ignore_index, chunk_rows)
    outputs = call(LinearLogProbFunction, *operands, target, integers, wanted, settings)[:3]
    return select_outputs(outputs, return_entropy, return_correct)
