"""The loops of linear_top_k_kl over chunks of rows: a head's products, and k classes of each row.

With z the logits over a temperature T, p = softmax(z), Q = sum_j q_j, and q(c) what the entries of
class c add up to, a row's divergence and its gradient are

    sum_j q_j (log q_j - log p_j)          dlogits_c = d (Q p_c - q(c)) / T

with d the incoming gradient. The normaliser of a row is that of `log_prob`, and Q p_c, the gradient
of Q lse, that of `cross_entropy` where the target is ignored: no kernel is added. At the classes of
the teacher, which are few, the difference is computed in float32 from their logits and put in the
place of Q p_c, so that it is rounded once. Entries of one class write the same number. Sums over k
add one column after the other: the bits of a row depend on nothing else.
"""

from typing import Any

import torch

from ..reference.linear_top_k_kl import compare, read_teacher
from .core.linear_launchers import apply_linear
from .core.precision import disable_autocast
from .core.products import Engine, empty_head_gradients, product
from .core.registration import kernel_op
from .core.sharding import rowwise

IGNORED = -100
"""The target of every row for kernels that have a target."""

Statistics = tuple[torch.Tensor | None, torch.Tensor | None]
"""lse of rows and what rounding took from it; PyTorch needs neither again."""


def top_k_kl_in_chunks(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    teacher_ids: torch.Tensor,
    teacher_log_probs: torch.Tensor,
    mask: torch.Tensor | None,
    chunk_rows: int,
    temperature: float,
    engine: Engine,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """(divergence, lse, lse_error) of all rows."""
    computed = torch.promote_types(x.dtype, torch.float32)
    count = x.shape[:-1].numel()
    divergence = x.new_empty(count, dtype=computed)
    lse = lse_error = None
    if engine != "torch":
        lse, lse_error = torch.empty_like(divergence), torch.empty_like(divergence)
    with disable_autocast(x):
        for first in range(0, max(count, 1), chunk_rows):
            part = slice(first, first + chunk_rows)
            wanted = None if mask is None else mask.reshape(-1)[part]
            ids, log_q = _teacher(
                teacher_ids, teacher_log_probs, part, wanted, weight.shape[0], computed
            )
            _, logits = _logits(x, weight, bias, part, wanted, engine)
            if lse is None or lse_error is None:
                log_p = _log_softmax(logits, temperature).gather(1, ids)
            else:
                from ..kernels import log_prob as kernels

                numbers = kernels.log_prob_forward(
                    logits, _no_targets(ids), IGNORED, 0, 0, 1.0, temperature, None
                )[3:]
                lse[part], lse_error[part] = numbers
                log_p = _log_probs(logits, ids, *numbers, temperature)
            # The next chunk's logits take this memory.
            del logits
            found = _add_columns(compare(log_p, log_q))
            divergence[part] = found if wanted is None else found.masked_fill(~wanted, 0.0)
    shape = x.shape[:-1]
    if lse is None or lse_error is None:
        return divergence.view(shape), None, None
    return divergence.view(shape), lse.view(shape), lse_error.view(shape)


@kernel_op(
    top_k_kl_in_chunks,
    sharding=rowwise(rows_in=(0, 3, 4, 5), rows_out=(0, 1, 2)),
    flops=lambda x, weight, *_: 2 * x.numel() * weight.shape[0],
)
def linear_top_k_kl_chunks(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    teacher_ids: torch.Tensor,
    teacher_log_probs: torch.Tensor,
    mask: torch.Tensor | None,
    chunk_rows: int,
    temperature: float,
    engine: str,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """What `top_k_kl_in_chunks` above returns."""
    computed = torch.promote_types(x.dtype, torch.float32)
    divergence = x.new_empty(x.shape[:-1], dtype=computed)
    if engine == "torch":
        return divergence, None, None
    return divergence, torch.empty_like(divergence), torch.empty_like(divergence)


def top_k_kl_gradients_in_chunks(
    ddivergence: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    teacher_ids: torch.Tensor,
    teacher_log_probs: torch.Tensor,
    mask: torch.Tensor | None,
    lse: torch.Tensor | None,
    lse_error: torch.Tensor | None,
    chunk_rows: int,
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
    dx_rows = None if dx is None else dx.view(x.shape[:-1].numel(), x.shape[-1])
    dweight = dbias = None
    incoming = ddivergence.reshape(-1)
    with disable_autocast(x):
        for first in range(0, max(incoming.numel(), 1), chunk_rows):
            part = slice(first, first + chunk_rows)
            kept = None if mask is None else mask.reshape(-1)[part]
            teacher = _teacher(
                teacher_ids, teacher_log_probs, part, kept, weight.shape[0], computed
            )
            chunk, logits = _logits(x, weight, bias, part, kept, engine)
            statistics = (
                None if lse is None else lse.reshape(-1)[part],
                None if lse_error is None else lse_error.reshape(-1)[part],
            )
            dlogits = _differentiate(
                incoming[part], logits, *teacher, kept, statistics, temperature
            )
            del logits
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
    """The logits, and each gradient of a product's operand that is wanted."""
    x, weight = args[1:3]
    dx_wanted, dweight_wanted, _ = args[-1]
    return 2 * x.numel() * weight.shape[0] * (1 + bool(dx_wanted) + bool(dweight_wanted))


@kernel_op(
    top_k_kl_gradients_in_chunks,
    sharding=rowwise(rows_in=(1, 0, 4, 5, 6, 7, 8), rows_out=(0,), summed_out=(1, 2)),
    flops=_flops,
)
def linear_top_k_kl_gradients(
    ddivergence: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    teacher_ids: torch.Tensor,
    teacher_log_probs: torch.Tensor,
    mask: torch.Tensor | None,
    lse: torch.Tensor | None,
    lse_error: torch.Tensor | None,
    chunk_rows: int,
    temperature: float,
    engine: str,
    wanted: list[int],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """What `top_k_kl_gradients_in_chunks` above returns."""
    return empty_head_gradients(x, weight, wanted)


def _teacher(
    ids: torch.Tensor,
    log_probs: torch.Tensor,
    part: slice,
    wanted: torch.Tensor | None,
    classes: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `read_teacher` makes of the rows of a chunk, (rows, k)."""
    rows = ids.shape[:-1].numel(), ids.shape[-1]
    ids, log_probs = (tensor.reshape(rows)[part] for tensor in (ids, log_probs))
    return read_teacher(ids, log_probs, wanted, classes, dtype)


def _logits(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    part: slice,
    wanted: torch.Tensor | None,
    engine: Engine,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows that are multiplied, and their logits.

    Not even NaN in a row that is left out gets there.
    """
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])[part]
    if wanted is not None:
        rows = rows.masked_fill(~wanted[:, None], 0.0)
    return rows, apply_linear(rows, weight, bias, engine)


def _no_targets(ids: torch.Tensor) -> torch.Tensor:
    return ids.new_full(ids.shape[:1], IGNORED)


def _log_softmax(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    computed = torch.promote_types(logits.dtype, torch.float32)
    return (logits.to(computed) / temperature).log_softmax(1)


def _log_probs(
    logits: torch.Tensor,
    ids: torch.Tensor,
    lse: torch.Tensor,
    lse_error: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """log p of the teacher's classes, (rows, k), from what kernels found of the rows."""
    z = logits.gather(1, ids).to(lse.dtype) * (1.0 / temperature)
    return (z - lse[:, None]) - lse_error[:, None]


def _differentiate(
    ddivergence: torch.Tensor,
    logits: torch.Tensor,
    ids: torch.Tensor,
    log_q: torch.Tensor,
    wanted: torch.Tensor | None,
    statistics: Statistics,
    temperature: float,
) -> torch.Tensor:
    """The gradient of the logits of a chunk; kernels write it where the logits were."""
    d = ddivergence.to(log_q.dtype)
    if wanted is not None:
        d = d.masked_fill(~wanted, 0.0)
    q = log_q.exp()
    mass = _add_columns(q)
    lse, lse_error = statistics
    if lse is None or lse_error is None:
        p = _log_softmax(logits, temperature).exp_()
        p_of_teacher = p.gather(1, ids)
        dlogits = p.mul_((mass * d / temperature)[:, None]).to(logits.dtype)
    else:
        from ..kernels import cross_entropy as kernels

        p_of_teacher = _log_probs(logits, ids, lse, lse_error, temperature).exp_()
        numbers = (None, lse, lse_error, IGNORED, 0.0, 0.0, 1.0 / temperature, None)
        dlogits = kernels.cross_entropy_backward(
            d, mass * d, logits, _no_targets(ids), *numbers, overwrite=True
        )
    pull = p_of_teacher * mass[:, None] - _merge(ids, q)
    pull *= (d / temperature)[:, None]
    # Not by adding to what is there: that is rounded, and of one class there may be many.
    dlogits.scatter_(1, ids, pull.to(dlogits.dtype))
    return dlogits if wanted is None else dlogits.masked_fill_(~wanted[:, None], 0.0)


def _merge(ids: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """For each entry (rows, k) the sum of q over the entries of its class."""
    merged = torch.zeros_like(q)
    for class_id, of_class in zip(ids.unbind(1), q.unbind(1), strict=True):
        merged += torch.where(ids == class_id[:, None], of_class[:, None], 0.0)
    return merged


def _add_columns(terms: torch.Tensor) -> torch.Tensor:
    """The sum over k, in an order that no number of rows changes."""
    total = terms.new_zeros(terms.shape[0])
    for column in terms.unbind(1):
        total += column
    return total
