"""The divergence of a head from the few classes of each row that a teacher kept.

The loops over chunks of rows are in `linear_top_k_kl_chunks`. What a loss makes of the rows'
divergences is not known before the backward, which computes the logits again. Saved are the
operands and two numbers of each row.
"""

import math
from typing import Any

import torch

from ..reference.linear_top_k_kl import linear_top_k_kl as reference
from .core.apply import call
from .core.arguments import check_device, check_float_tensor, check_integers, check_shape
from .core.catalog import Normal, Sample, operation
from .core.gradients import gradients
from .core.precision import autocast, disable_autocast
from .core.products import choose_engine
from .linear_cross_entropy_chunks import choose_chunk_rows
from .linear_jsd import two_of_three
from .linear_top_k_kl_chunks import linear_top_k_kl_chunks, linear_top_k_kl_gradients
from .log_prob_arguments import (
    check_chunk_rows,
    check_head,
    check_log_prob_options,
    check_same_dtypes,
    check_target_mask,
)


class LinearTopKKlFunction(torch.autograd.Function):
    """(divergence, lse, lse_error), the first differentiable in x, weight and bias."""

    returned = 1

    @staticmethod
    def forward(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        teacher_ids: torch.Tensor,
        teacher_log_probs: torch.Tensor,
        mask: torch.Tensor | None,
        settings: tuple,
    ) -> tuple:
        teacher = (teacher_ids, teacher_log_probs)
        return linear_top_k_kl_chunks(x, weight, bias, *teacher, mask, *settings)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        *tensors, ctx.settings = inputs
        statistics = output[1:]
        ctx.mark_non_differentiable(*(numbers for numbers in statistics if numbers is not None))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *statistics)

    @staticmethod
    def backward(ctx: Any, ddivergence: torch.Tensor | None, *_: None) -> tuple:
        if ddivergence is None:
            return (None,) * 7
        tensors = (ddivergence, *ctx.saved_tensors)
        options = (ctx.settings, list(map(int, ctx.needs_input_grad[:3])))
        found = gradients(_linear_top_k_kl_backward, _backward_formula, tensors, options)
        return *found, *(None,) * 4


def _linear_top_k_kl_backward(*args: Any) -> tuple[torch.Tensor | None, ...]:
    """(dx, dweight, dbias) of linear_top_k_kl_gradients, in the dtype of the operands."""
    *tensors, settings, wanted = args
    dtype = tensors[1].dtype
    found = linear_top_k_kl_gradients(*tensors, *settings, wanted)
    return tuple(None if gradient is None else gradient.to(dtype) for gradient in found)


def _backward_formula(
    ddivergence: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    teacher_ids: torch.Tensor,
    teacher_log_probs: torch.Tensor,
    mask: torch.Tensor | None,
    lse: torch.Tensor | None,
    lse_error: torch.Tensor | None,
    settings: tuple,
    wanted: list[int],
) -> tuple[torch.Tensor | None, ...]:
    """What _linear_top_k_kl_backward computes, in PyTorch, on the logits of all rows."""
    _, temperature, _ = settings
    computed = torch.promote_types(x.dtype, torch.float32)
    teacher = (teacher_ids, teacher_log_probs.detach(), mask)

    def divergences(*variables: torch.Tensor) -> torch.Tensor:
        x, weight, *more = variables
        bias = more[0] if more else None
        return reference(x, weight, *teacher, bias=bias, temperature=temperature)

    inputs = [x, weight] if bias is None else [x, weight, bias]
    with disable_autocast(x):
        _, pullback, *_ = torch.func.vjp(divergences, *(tensor.to(computed) for tensor in inputs))
        found = pullback(ddivergence)
    found = [*(gradient.to(x.dtype) for gradient in found), None][:3]
    return tuple(g if is_wanted else None for g, is_wanted in zip(found, wanted, strict=True))


def some_ids(*shape: int, classes: int) -> Any:
    """For samples: ids of a teacher, of which a row may have one twice where classes are few."""

    def make(device: str | torch.device) -> torch.Tensor:
        place = torch.arange(torch.Size(shape).numel())
        return (place * 7919 % 10007 % classes).reshape(shape).to(device)

    return make


def some_log_probs(*shape: int) -> Any:
    """For samples: log-probabilities (..., k) of which some mass is missing, and every fifth is."""

    def make(device: str | torch.device) -> torch.Tensor:
        place = torch.arange(torch.Size(shape).numel()).reshape(shape)
        most = 1.0 + math.log(max(shape[-1], 1))
        found = -most - (place * 7919 % 31) * 0.0625
        return found.masked_fill(place % 5 == 4, -math.inf).to(device)

    return make


SAMPLES = (
    Sample(
        "smallest",
        x=(4, 3),
        weight=(5, 3),
        teacher_ids=some_ids(4, 3, classes=5),
        teacher_log_probs=some_log_probs(4, 3),
        target_mask=two_of_three(4),
        bias=(5,),
        temperature=0.7,
        chunk_rows=3,
    ),
    Sample(
        "three dimensions",
        x=(3, 7, 24),
        weight=Normal((33, 24), scale=0.2),
        teacher_ids=some_ids(3, 7, 8, classes=33),
        teacher_log_probs=some_log_probs(3, 7, 8),
    ),
    Sample(
        "several chunks",
        x=(19, 19),
        weight=Normal((131, 19), scale=0.2),
        teacher_ids=some_ids(19, 12, classes=131),
        teacher_log_probs=some_log_probs(19, 12),
        target_mask=two_of_three(19),
        temperature=2.0,
        chunk_rows=8,
    ),
    Sample(
        "no rows",
        x=(0, 8),
        weight=(6, 8),
        teacher_ids=some_ids(0, 2, classes=6),
        teacher_log_probs=some_log_probs(0, 2),
    ),
)


@operation(reference=reference, samples=SAMPLES)
def linear_top_k_kl(
    x: torch.Tensor,
    weight: torch.Tensor,
    teacher_ids: torch.Tensor,
    teacher_log_probs: torch.Tensor,
    target_mask: torch.Tensor | None = None,
    *,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    chunk_rows: int | None = None,
) -> torch.Tensor:
    """Each row's forward divergence of a head from the k classes that a teacher kept.

    It is sum_j q_j (log q_j - log p_j), q = exp(teacher_log_probs) as given and p the student's
    softmax over all classes, of logits over the temperature, which is of the student's alone: a
    teacher's has gone into its log-probabilities. q is not normalised again. With a mass Q below 1
    the sum is short of the missing classes' terms: its least is Q log Q, less than 0, where p is
    q / Q and so has nothing left for those classes. Who subtracts log Q from the log-probabilities
    gets this gradient over Q. An id that a row has several times counts as often. An entry of -inf
    is absent, whatever its id.

    The logits of all rows never exist; the backward computes them again. They are rounded to x's
    dtype, as a linear layer rounds them; from there all is computed in float32 (float64 for
    float64), where the gradients of weight and bias are also added up over chunks. Autocast's dtype
    is that of the products. Gradients have the same bits every time. Second derivatives hold the
    logits of all rows.

    Rows that target_mask leaves out have divergence and gradient 0, whatever x and the teacher hold
    there: NaN, infinity and wrong ids, too, reach nothing. An id that is no class raises where that
    can be seen without waiting, on the reference backend on a CPU; elsewhere it makes the row's
    divergence and the gradients NaN, and touches no memory outside.

    Args:
        x: (..., D), the student's hidden states: float16, bfloat16, float32 or float64.
        weight: (V, D), of x's dtype (under autocast, of any), V at least 1.
        teacher_ids: (..., k), int64 or int32, in any order, k of any size.
        teacher_log_probs: (..., k), of any float dtype, without a gradient.
        target_mask: (...), bool, the rows that count; None for all.
        bias: (V,), of the weight's dtype, or None.
        temperature: a positive number that the student's logits are divided by.
        chunk_rows: the most rows of a chunk; None for a number by the classes.

    Returns:
        (...) in float32 (float64 for float64), any number of times differentiable in x, weight and
        bias.

    Raises:
        TypeError: an argument is no tensor or of an unsupported dtype.
        ValueError: a shape, device or value does not fit, or weight is a DTensor that is sharded
            over its classes.

    Example:
        log_q, ids = teacher_logits.log_softmax(-1).topk(64)
        loss = fastattn.linear_top_k_kl(hidden, head.weight, ids, log_q, mask).mean()

    Source: Hinton et al., "Distilling the Knowledge in a Neural Network" (2015); on what the
        missing mass does, Anshumann et al., "Sparse Logit Sampling" (2025).

    Example:
        >>> x, weight = torch.randn(6, 8), torch.randn(100, 8)
        >>> log_probs, ids = torch.randn(6, 100).log_softmax(-1).topk(20)
        >>> fastattn.linear_top_k_kl(x, weight, ids, log_probs).shape
        torch.Size([6])
    """
    op = "linear_top_k_kl"
    _check(x, weight, teacher_ids, teacher_log_probs, target_mask, bias)
    check_chunk_rows(op, chunk_rows)
    check_log_prob_options(op, temperature, None, 1.0)
    operands = autocast(x, weight, bias)
    check_same_dtypes(op, operands[0], weight=operands[1], bias=operands[2])
    classes = weight.shape[0]
    engine = choose_engine(operands[0])
    if chunk_rows is None:
        chunk_rows = choose_chunk_rows(classes, operands[0].element_size(), engine)
    teacher = (teacher_ids, teacher_log_probs.detach(), target_mask)
    if engine == "torch":
        _check_ids(*teacher, classes)
        if x.shape[:-1].numel() <= chunk_rows:
            return reference(x, weight, *teacher, bias=bias, temperature=temperature)
    settings = (chunk_rows, float(temperature), engine)
    divergence, *_ = call(LinearTopKKlFunction, *operands, *teacher, settings)
    return divergence


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    teacher_ids: torch.Tensor,
    teacher_log_probs: torch.Tensor,
    target_mask: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> None:
    """What linear_top_k_kl is given, but for numbers."""
    op = "linear_top_k_kl"
    check_float_tensor(op, "x", x)
    if x.dim() == 0:
        raise ValueError(f"{op}: x must have at least one dimension, got a scalar")
    check_head(op, "x", x, "weight", weight)
    check_device(op, "teacher_ids", teacher_ids, x)
    check_integers(op, "teacher_ids", teacher_ids)
    check_float_tensor(op, "teacher_log_probs", teacher_log_probs)
    check_device(op, "teacher_log_probs", teacher_log_probs, x)
    if teacher_ids.dim() != x.dim():
        raise ValueError(
            f"{op}: teacher_ids must have shape {(*x.shape[:-1], 'k')}, "
            f"got {tuple(teacher_ids.shape)}"
        )
    check_shape(op, "teacher_ids", teacher_ids, (*x.shape[:-1], teacher_ids.shape[-1]))
    check_shape(op, "teacher_log_probs", teacher_log_probs, tuple(teacher_ids.shape))
    if bias is not None:
        check_float_tensor(op, "bias", bias, like=x)
        check_shape(op, "bias", bias, weight.shape[:1])
    check_target_mask(op, target_mask, x)


def _check_ids(
    ids: torch.Tensor, log_probs: torch.Tensor, mask: torch.Tensor | None, classes: int
) -> None:
    """Every id that counts names a class, where looking at the numbers costs no waiting."""
    given = (ids, log_probs) if mask is None else (ids, log_probs, mask)
    if any(type(tensor) is not torch.Tensor or tensor.device.type != "cpu" for tensor in given):
        return
    if torch.compiler.is_compiling():
        return
    wrong = ((ids < 0) | (ids >= classes)) & (log_probs != -math.inf)
    if mask is not None:
        wrong &= mask[..., None]
    if wrong.any():
        raise ValueError(
            f"linear_top_k_kl: teacher_ids must be in [0, {classes}), got {ids[wrong][0].item()}"
        )
