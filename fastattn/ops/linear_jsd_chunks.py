"""The loops of linear_jsd over chunks of rows: the products of two heads around kernels of rows.

As those of `linear_log_prob_chunks`: the logits of a chunk, of student and teacher, are computed in
the forward, turned into numbers of its rows, and dropped; the backward computes them again, writes
the gradient over the student's, and multiplies it on.
"""

from typing import Any

import torch

from ..reference.linear_jsd import compare
from .core.linear_launchers import apply_linear
from .core.precision import disable_autocast
from .core.products import Engine, empty_head_gradients, product
from .core.registration import kernel_op
from .core.sharding import rowwise


def jsd_in_chunks(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    teacher_x: torch.Tensor,
    teacher_weight: torch.Tensor,
    teacher_bias: torch.Tensor | None,
    mask: torch.Tensor | None,
    chunk_rows: int,
    beta: float,
    temperature: float,
    engine: Engine,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(divergence, statistics) of all rows; PyTorch needs no statistics again."""
    computed = torch.promote_types(x.dtype, torch.float32)
    count = x.numel() // x.shape[-1] if x.shape[-1] else x.shape[:-1].numel()
    divergence = x.new_empty(count, dtype=computed)
    statistics = None if engine == "torch" else x.new_empty((count, 5), dtype=computed)
    heads = ((x, weight, bias), (teacher_x, teacher_weight, teacher_bias))
    with disable_autocast(x):
        for first in range(0, max(count, 1), chunk_rows):
            part = slice(first, first + chunk_rows)
            wanted = None if mask is None else mask.reshape(-1)[part]
            _, student, teacher = _logits(heads, part, wanted, engine)
            if statistics is None:
                log_p, log_q = (_log_softmax(z, temperature, computed) for z in (student, teacher))
                found = compare(log_p, log_q, beta)[1].sum(-1)
                divergence[part] = found if wanted is None else found.masked_fill(~wanted, 0.0)
                continue
            from ..kernels import jsd as kernels

            divergence[part], statistics[part] = kernels.jsd_forward(
                student, teacher, wanted, beta, temperature
            )
    if statistics is not None:
        statistics = statistics.view(*x.shape[:-1], 5)
    return divergence.view(x.shape[:-1]), statistics


@kernel_op(
    jsd_in_chunks,
    sharding=rowwise(rows_in=(0, 3, 6), rows_out=(0, 1)),
    flops=lambda x, weight, bias, teacher_x, teacher_weight, *_: (
        2 * x.numel() * weight.shape[0] + 2 * teacher_x.numel() * teacher_weight.shape[0]
    ),
)
def linear_jsd_chunks(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    teacher_x: torch.Tensor,
    teacher_weight: torch.Tensor,
    teacher_bias: torch.Tensor | None,
    mask: torch.Tensor | None,
    chunk_rows: int,
    beta: float,
    temperature: float,
    engine: str,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What `jsd_in_chunks` above returns."""
    computed = torch.promote_types(x.dtype, torch.float32)
    divergence = x.new_empty(x.shape[:-1], dtype=computed)
    if engine == "torch":
        return divergence, None
    return divergence, x.new_empty((*x.shape[:-1], 5), dtype=computed)


def jsd_gradients_in_chunks(
    ddivergence: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    teacher_x: torch.Tensor,
    teacher_weight: torch.Tensor,
    teacher_bias: torch.Tensor | None,
    mask: torch.Tensor | None,
    statistics: torch.Tensor | None,
    chunk_rows: int,
    beta: float,
    temperature: float,
    engine: Engine,
    wanted: list[int],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """(dx, dweight, dbias), None where not wanted; dx in x's dtype, the others in float32.

    `wanted` has 0 or 1 for each, for torch.jit.trace takes no list of bools.
    """
    dx_wanted, dweight_wanted, dbias_wanted = map(bool, wanted)
    computed = torch.promote_types(x.dtype, torch.float32)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if dx_wanted else None
    dx_rows = None if dx is None else dx.view(-1, x.shape[-1])
    dweight = dbias = None
    incoming = ddivergence.reshape(-1)
    heads = ((x, weight, bias), (teacher_x, teacher_weight, teacher_bias))
    with disable_autocast(x):
        for first in range(0, max(incoming.numel(), 1), chunk_rows):
            part = slice(first, first + chunk_rows)
            kept = None if mask is None else mask.reshape(-1)[part]
            chunk, student, teacher = _logits(heads, part, kept, engine)
            if statistics is None:
                dlogits = _differentiate(incoming[part], student, teacher, kept, beta, temperature)
            else:
                from ..kernels import jsd as kernels

                numbers = statistics.reshape(-1, 5)[part].contiguous()
                dlogits = kernels.jsd_backward(
                    incoming[part], student, teacher, kept, numbers, beta, temperature
                )
            del student, teacher
            if dx_rows is not None:
                dx_rows[part] = product(dlogits, weight, engine=engine)
            if dweight_wanted:
                dweight = product(
                    dlogits.t(),
                    chunk,
                    out_dtype=computed,
                    accumulate_into=dweight,
                    engine=engine,
                )
            if dbias_wanted:
                chunk_sum = dlogits.sum(0, dtype=computed)
                dbias = chunk_sum if dbias is None else dbias + chunk_sum
            del dlogits
    return dx, dweight, dbias


def _flops(*args: Any) -> int:
    """The logits of both, and each gradient of a product's operand that is wanted."""
    x, weight, _, teacher_x, teacher_weight = args[1:6]
    dx_wanted, dweight_wanted, _ = args[-1]
    student = 2 * x.numel() * weight.shape[0] * (1 + bool(dx_wanted) + bool(dweight_wanted))
    return student + 2 * teacher_x.numel() * teacher_weight.shape[0]


@kernel_op(
    jsd_gradients_in_chunks,
    sharding=rowwise(rows_in=(1, 0, 4, 7, 8), rows_out=(0,), summed_out=(1, 2)),
    flops=_flops,
)
def linear_jsd_gradients(
    ddivergence: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    teacher_x: torch.Tensor,
    teacher_weight: torch.Tensor,
    teacher_bias: torch.Tensor | None,
    mask: torch.Tensor | None,
    statistics: torch.Tensor | None,
    chunk_rows: int,
    beta: float,
    temperature: float,
    engine: str,
    wanted: list[int],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """What `jsd_gradients_in_chunks` above returns."""
    return empty_head_gradients(x, weight, wanted)


def _logits(
    heads: tuple, part: slice, wanted: torch.Tensor | None, engine: Engine
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The student's rows that are multiplied, its logits, and the teacher's.

    Not even NaN in a row that is left out gets there.
    """
    found = []
    for x, weight, bias in heads:
        rows = x.reshape(-1, x.shape[-1])[part]
        if wanted is not None:
            rows = rows.masked_fill(~wanted[:, None], 0.0)
        found += [rows, apply_linear(rows, weight, bias, engine)]
    rows, student, _, teacher = found
    return rows, student, teacher


def _log_softmax(logits: torch.Tensor, temperature: float, dtype: torch.dtype) -> torch.Tensor:
    return (logits.to(dtype) / temperature).log_softmax(-1)


def _differentiate(
    ddivergence: torch.Tensor,
    student: torch.Tensor,
    teacher: torch.Tensor,
    wanted: torch.Tensor | None,
    beta: float,
    temperature: float,
) -> torch.Tensor:
    """The gradient of the student's logits in PyTorch, by the formulas of kernels/jsd.py.

    Not by autograd, which does not work inside a registered op.
    """
    computed = torch.promote_types(student.dtype, torch.float32)
    log_p, log_q = (_log_softmax(logits, temperature, computed) for logits in (student, teacher))
    p, _, slope = compare(log_p, log_q, beta)
    pull = p - log_q.exp() if beta == 0.0 else p * (slope - (p * slope).sum(-1, keepdim=True))
    dx = pull * (ddivergence.to(computed) / temperature)[:, None]
    if wanted is not None:
        dx.masked_fill_(~wanted[:, None], 0.0)
    return dx.to(student.dtype)
