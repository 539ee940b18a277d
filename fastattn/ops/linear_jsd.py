"""The divergence of a student's head from a teacher's, neither's logits held for all rows.

The loops over chunks of rows are in `linear_jsd_chunks`. What a loss makes of the rows' divergences
is not known before the backward, which computes the logits again. Saved are the operands and five
numbers of each row.
"""

from typing import Any

import torch

from ..reference.linear_jsd import linear_jsd as reference
from .core.apply import call
from .core.arguments import check_float_tensor, check_shape
from .core.catalog import Normal, Sample, operation
from .core.gradients import gradients
from .core.precision import autocast, disable_autocast
from .core.products import choose_engine
from .linear_cross_entropy_chunks import choose_chunk_rows
from .linear_jsd_chunks import linear_jsd_chunks, linear_jsd_gradients
from .log_prob_arguments import (
    check_chunk_rows,
    check_head,
    check_log_prob_options,
    check_same_dtypes,
    check_target_mask,
)


class LinearJsdFunction(torch.autograd.Function):
    """(divergence, statistics), the first differentiable in x, weight and bias."""

    returned = 1

    @staticmethod
    def forward(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        teacher_x: torch.Tensor,
        teacher_weight: torch.Tensor,
        teacher_bias: torch.Tensor | None,
        mask: torch.Tensor | None,
        settings: tuple,
    ) -> tuple:
        teacher = (teacher_x, teacher_weight, teacher_bias)
        return linear_jsd_chunks(x, weight, bias, *teacher, mask, *settings)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        *tensors, ctx.settings = inputs
        statistics = output[1]
        if statistics is not None:
            ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, statistics)

    @staticmethod
    def backward(ctx: Any, ddivergence: torch.Tensor | None, *_: None) -> tuple:
        if ddivergence is None:
            return (None,) * 8
        tensors = (ddivergence, *ctx.saved_tensors)
        options = (ctx.settings, list(map(int, ctx.needs_input_grad[:3])))
        found = gradients(_linear_jsd_backward, _backward_formula, tensors, options)
        return *found, *(None,) * 5


def _linear_jsd_backward(*args: Any) -> tuple[torch.Tensor | None, ...]:
    """(dx, dweight, dbias) of linear_jsd_gradients, in the dtype of the operands."""
    *tensors, settings, wanted = args
    dtype = tensors[1].dtype
    found = linear_jsd_gradients(*tensors, *settings, wanted)
    return tuple(None if gradient is None else gradient.to(dtype) for gradient in found)


def _backward_formula(
    ddivergence: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    teacher_x: torch.Tensor,
    teacher_weight: torch.Tensor,
    teacher_bias: torch.Tensor | None,
    mask: torch.Tensor | None,
    statistics: torch.Tensor | None,
    settings: tuple,
    wanted: list[int],
) -> tuple[torch.Tensor | None, ...]:
    """What _linear_jsd_backward computes, in PyTorch, on the logits of all rows."""
    _, beta, temperature, _ = settings
    computed = torch.promote_types(x.dtype, torch.float32)

    def divergences(*variables: torch.Tensor) -> torch.Tensor:
        x, weight, *more = variables
        return reference(
            x,
            weight,
            teacher_x.detach(),
            teacher_weight.detach(),
            mask,
            bias=more[0] if more else None,
            teacher_bias=None if teacher_bias is None else teacher_bias.detach(),
            beta=beta,
            temperature=temperature,
        )

    inputs = [x, weight] if bias is None else [x, weight, bias]
    with disable_autocast(x):
        _, pullback, *_ = torch.func.vjp(divergences, *(tensor.to(computed) for tensor in inputs))
        found = pullback(ddivergence)
    found = [*(gradient.to(x.dtype) for gradient in found), None][:3]
    return tuple(g if is_wanted else None for g, is_wanted in zip(found, wanted, strict=True))


def constant(*shape: int, scale: float = 0.125) -> Any:
    """For samples: a teacher's numbers, whose products are exact in float32 in any order."""

    def make(device: str | torch.device) -> torch.Tensor:
        place = torch.arange(torch.Size(shape).numel())
        return ((place * 7919 % 31 - 15) * scale).reshape(shape).to(device)

    return make


def two_of_three(*shape: int) -> Any:
    """For samples: a mask."""
    return lambda device: (torch.arange(torch.Size(shape).numel()) % 3 != 1).view(shape).to(device)


SAMPLES = (
    Sample(
        "smallest",
        x=(4, 3),
        weight=(5, 3),
        teacher_x=constant(4, 2),
        teacher_weight=constant(5, 2),
        target_mask=two_of_three(4),
        bias=(5,),
        teacher_bias=constant(5),
        beta=0.3,
        temperature=0.7,
        chunk_rows=3,
    ),
    Sample(
        "halfway",
        x=(3, 7, 24),
        weight=Normal((33, 24), scale=0.2),
        teacher_x=constant(3, 7, 16),
        teacher_weight=constant(33, 16, scale=0.03125),
    ),
    Sample(
        "forward",
        x=(37, 19),
        weight=Normal((131, 19), scale=0.2),
        teacher_x=constant(37, 16),
        teacher_weight=constant(131, 16, scale=0.03125),
        target_mask=two_of_three(37),
        beta=0.0,
        temperature=2.0,
        chunk_rows=16,
    ),
    Sample(
        "reverse",
        x=(9, 16),
        weight=Normal((72, 16), scale=0.2),
        teacher_x=constant(9, 16),
        teacher_weight=constant(72, 16, scale=0.03125),
        beta=1.0,
    ),
    Sample(
        "several tiles a row",
        x=(3, 8),
        weight=Normal((9001, 8), scale=0.3),
        teacher_x=constant(3, 8),
        teacher_weight=constant(9001, 8, scale=0.03125),
        beta=0.9,
    ),
    Sample(
        "no rows",
        x=(0, 8),
        weight=(6, 8),
        teacher_x=constant(0, 4),
        teacher_weight=constant(6, 4),
    ),
)


@operation(reference=reference, samples=SAMPLES)
def linear_jsd(
    x: torch.Tensor,
    weight: torch.Tensor,
    teacher_x: torch.Tensor,
    teacher_weight: torch.Tensor,
    target_mask: torch.Tensor | None = None,
    *,
    bias: torch.Tensor | None = None,
    teacher_bias: torch.Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    chunk_rows: int | None = None,
) -> torch.Tensor:
    """Each row's divergence of a student's head from a teacher's, a chunk of rows at a time.

    With p and q the softmax of the student's and the teacher's logits over the temperature, it is
    KL(q || p) for beta 0, the forward divergence; KL(p || q) for beta 1, the reverse one; and in
    between beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p. Neither's logits
    exist for all rows; the backward computes them again. They are rounded to the dtype of x and
    teacher_x, as a linear layer rounds them; from there all is computed in float32 (float64 for
    x in float64), where the gradients of weight and bias are also added up over chunks. Autocast's
    dtype is that of the products. Second derivatives hold the logits of all rows.

    Rows that target_mask leaves out have divergence and gradient 0, whatever x and teacher_x hold
    there: NaN and infinity, too, reach nothing.

    Args:
        x: (..., D), the student's hidden states: float16, bfloat16, float32 or float64.
        weight: (V, D), of x's dtype (under autocast, of any).
        teacher_x: (..., E), the teacher's, of as many rows, of any float dtype. No argument of the
            teacher's gets a gradient.
        teacher_weight: (V, E), of teacher_x's dtype.
        target_mask: (...), bool, the rows that count; None for all.
        bias: (V,), of the weight's dtype, or None.
        teacher_bias: (V,), of teacher_weight's dtype, or None.
        beta: in [0, 1].
        temperature: a positive number that both logits are divided by.
        chunk_rows: the most rows of a chunk; None for a number by the classes.

    Returns:
        (...) in float32 (float64 for x in float64), any number of times differentiable in x, weight
        and bias.

    Raises:
        TypeError: an argument is no tensor or of an unsupported dtype.
        ValueError: a shape, device or value does not fit, or a weight is a DTensor that is sharded
            over its classes.

    Example:
        loss = fastattn.linear_jsd(h, head.weight, teacher_h, teacher_head.weight, mask).mean()

    Source: Hinton et al., "Distilling the Knowledge in a Neural Network" (2015); Agarwal et al.,
        "On-Policy Distillation of Language Models" (2023).

    Example:
        >>> x, teacher_x = torch.randn(2, 6, 8)
        >>> weight = torch.randn(100, 8)
        >>> bool((fastattn.linear_jsd(x, weight, teacher_x, weight) >= 0).all())
        True
    """
    op = "linear_jsd"
    _check(x, weight, teacher_x, teacher_weight, target_mask, bias, teacher_bias)
    check_chunk_rows(op, chunk_rows)
    check_log_prob_options(op, temperature, None, 1.0)
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"{op}: beta must be in [0, 1], got {beta}")
    student = autocast(x, weight, bias)
    teacher = autocast(teacher_x, teacher_weight, teacher_bias)
    check_same_dtypes(op, student[0], weight=student[1], bias=student[2])
    if len({tensor.dtype for tensor in teacher if tensor is not None}) > 1:
        raise TypeError(f"{op}: teacher_x, teacher_weight and teacher_bias must have one dtype")
    engine = choose_engine(student[0])
    if chunk_rows is None:
        # There are the logits of two.
        size = student[0].element_size() + teacher[0].element_size()
        chunk_rows = choose_chunk_rows(weight.shape[0], size, engine)
    if engine == "torch" and x.shape[:-1].numel() <= chunk_rows:
        return reference(
            x,
            weight,
            teacher_x,
            teacher_weight,
            target_mask,
            bias=bias,
            teacher_bias=teacher_bias,
            beta=beta,
            temperature=temperature,
        )
    settings = (chunk_rows, float(beta), float(temperature), engine)
    teacher = tuple(None if tensor is None else tensor.detach() for tensor in teacher)
    divergence, *_ = call(LinearJsdFunction, *student, *teacher, target_mask, settings)
    return divergence


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    teacher_x: torch.Tensor,
    teacher_weight: torch.Tensor,
    target_mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    teacher_bias: torch.Tensor | None,
) -> None:
    """What linear_jsd is given, but for numbers."""
    op = "linear_jsd"
    check_float_tensor(op, "x", x)
    check_float_tensor(op, "teacher_x", teacher_x)
    for name, tensor in (("x", x), ("teacher_x", teacher_x)):
        if tensor.dim() == 0:
            raise ValueError(f"{op}: {name} must have at least one dimension, got a scalar")
    check_head(op, "x", x, "weight", weight)
    check_head(op, "teacher_x", teacher_x, "teacher_weight", teacher_weight)
    if teacher_x.device != x.device:
        raise ValueError(f"{op}: teacher_x must be on {x.device}, got {teacher_x.device}")
    check_shape(op, "teacher_x", teacher_x, (*x.shape[:-1], teacher_x.shape[-1]))
    check_shape(op, "teacher_weight", teacher_weight, (weight.shape[0], teacher_x.shape[-1]))
    for name, of_classes in (("bias", bias), ("teacher_bias", teacher_bias)):
        if of_classes is not None:
            check_float_tensor(op, name, of_classes, like=x if name == "bias" else teacher_x)
            check_shape(op, name, of_classes, weight.shape[:1])
    check_target_mask(op, target_mask, x)
