"""The loops of linear log-probabilities over chunks of rows: products around the kernels of rows.

For the rows x of a chunk:

    logits  = x weight^T + bias          (rows, V), the only tensor of this size

forward, which gives log-probabilities, entropies, hits, and lse with its error, and is dropped; and
once more backward, by the same product and so with the same bits, where

    dlogits = the gradient of the rows' numbers, written over the logits
    dx      = dlogits weight
    dweight = dlogits^T x,  dbias = sum of dlogits over rows, added up over chunks in float32

Each loop is registered as one op, as those of `linear_cross_entropy_chunks` are and for its reason.
Where there is no Triton the same loops take what a chunk gives from PyTorch.
"""

from typing import Any

import torch

from ..reference.log_prob import log_prob as reference
from ..reference.softcap import softcapped
from .core.linear_launchers import apply_linear
from .core.precision import disable_autocast
from .core.products import Engine, empty_head_gradients, product
from .core.registration import kernel_op
from .core.sharding import rowwise

Numbers = torch.Tensor | None
"""A number of each row, or None where it is not wanted."""

Settings = tuple[float, float, float | None]
"""The logits' scale, temperature and softcap."""


def log_prob_in_chunks(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    ignore_index: int,
    chunk_rows: int,
    with_entropy: int,
    with_correct: int,
    logit_scale: float,
    temperature: float,
    softcap: float | None,
    engine: Engine,
) -> tuple[torch.Tensor, Numbers, Numbers, Numbers, Numbers]:
    """(log_prob, entropy, correct, lse, lse_error) of all rows; PyTorch needs no lse again."""
    computed = torch.promote_types(x.dtype, torch.float32)
    rows, targets = x.reshape(-1, x.shape[-1]), target.reshape(-1)
    count = targets.numel()

    def numbers(wanted: object, dtype: torch.dtype = computed) -> Numbers:
        return x.new_empty(count, dtype=dtype) if wanted else None

    by_kernels = engine != "torch"
    outputs = (
        x.new_empty(count, dtype=computed),
        numbers(with_entropy),
        numbers(with_correct, torch.bool),
        numbers(by_kernels),
        numbers(by_kernels),
    )
    settings = (logit_scale, temperature, softcap)
    wanted = (with_entropy, with_correct)
    compute = _compute_by_kernels if by_kernels else _compute_by_torch
    # The operands have the dtype that autocast asks for, and sums are to be in float32.
    with disable_autocast(x):
        for first in range(0, max(count, 1), chunk_rows):
            part = slice(first, first + chunk_rows)
            logits = _logits(rows[part], weight, bias, targets[part] == ignore_index, engine)[1]
            found = compute(logits, targets[part], ignore_index, wanted, settings)
            # The next chunk's logits take this memory.
            del logits
            for output, chunk_output in zip(outputs, found, strict=True):
                if output is not None and chunk_output is not None:
                    output[part] = chunk_output
    shaped = [None if output is None else output.view(target.shape) for output in outputs]
    return tuple(shaped)  # type: ignore[return-value]


@kernel_op(
    log_prob_in_chunks,
    sharding=rowwise(rows_in=(0, 3), rows_out=(0, 1, 2, 3, 4)),
    flops=lambda x, weight, *_: 2 * x.numel() * weight.shape[0],
)
def linear_log_prob_chunks(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    ignore_index: int,
    chunk_rows: int,
    with_entropy: int,
    with_correct: int,
    logit_scale: float,
    temperature: float,
    softcap: float | None,
    engine: str,
) -> tuple[
    torch.Tensor,
    torch.Tensor | None,
    torch.Tensor | None,
    torch.Tensor | None,
    torch.Tensor | None,
]:
    """What `log_prob_in_chunks` above returns."""
    computed = torch.promote_types(x.dtype, torch.float32)
    by_kernels = engine != "torch"
    return (
        x.new_empty(target.shape, dtype=computed),
        x.new_empty(target.shape, dtype=computed) if with_entropy else None,
        x.new_empty(target.shape, dtype=torch.bool) if with_correct else None,
        x.new_empty(target.shape, dtype=computed) if by_kernels else None,
        x.new_empty(target.shape, dtype=computed) if by_kernels else None,
    )


def log_prob_gradients_in_chunks(
    dlog_prob: torch.Tensor,
    dentropy: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    entropy: torch.Tensor | None,
    lse: torch.Tensor | None,
    lse_error: torch.Tensor | None,
    ignore_index: int,
    chunk_rows: int,
    logit_scale: float,
    temperature: float,
    softcap: float | None,
    engine: Engine,
    wanted: list[int],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """(dx, dweight, dbias), None where not wanted; dx in x's dtype, the others in float32.

    Args:
        dlog_prob, dentropy: (...), the incoming gradients, the second of which may be None.
        x, weight, bias, target: as in the forward.
        entropy, lse, lse_error: (...), what the forward returned.
        wanted: which of the gradients to compute: 0 or 1 for each, for torch.jit.trace takes no
            list of bools.
    """
    dx_wanted, dweight_wanted, dbias_wanted = map(bool, wanted)
    computed = torch.promote_types(x.dtype, torch.float32)
    rows, targets = x.reshape(-1, x.shape[-1]), target.reshape(-1)
    count = targets.numel()
    dx = torch.empty_like(rows, memory_format=torch.contiguous_format) if dx_wanted else None
    dweight = dbias = None
    settings = (logit_scale, temperature, softcap)
    differentiate = _differentiate_by_torch if engine == "torch" else _differentiate_by_kernels
    given = [dlog_prob, dentropy, entropy, lse, lse_error]
    given = [None if numbers is None else numbers.reshape(-1) for numbers in given]
    with disable_autocast(x):
        for first in range(0, max(count, 1), chunk_rows):
            part = slice(first, first + chunk_rows)
            chunk, logits = _logits(rows[part], weight, bias, targets[part] == ignore_index, engine)
            numbers = tuple(None if of_all is None else of_all[part] for of_all in given)
            dlogits = differentiate(logits, targets[part], ignore_index, numbers, settings)
            del logits
            if dx is not None:
                dx[part] = product(dlogits, weight, engine=engine)
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
    return None if dx is None else dx.view(x.shape), dweight, dbias


def _flops(*args: Any) -> int:
    """The logits, and each gradient of a product's operand that is wanted."""
    x, weight = args[2:4]
    dx_wanted, dweight_wanted, _ = args[-1]
    return 2 * x.numel() * weight.shape[0] * (1 + bool(dx_wanted) + bool(dweight_wanted))


@kernel_op(
    log_prob_gradients_in_chunks,
    sharding=rowwise(rows_in=(2, 0, 1, 5, 6, 7, 8), rows_out=(0,), summed_out=(1, 2)),
    flops=_flops,
)
def linear_log_prob_gradients(
    dlog_prob: torch.Tensor,
    dentropy: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    entropy: torch.Tensor | None,
    lse: torch.Tensor | None,
    lse_error: torch.Tensor | None,
    ignore_index: int,
    chunk_rows: int,
    logit_scale: float,
    temperature: float,
    softcap: float | None,
    engine: str,
    wanted: list[int],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """What `log_prob_gradients_in_chunks` above returns."""
    return empty_head_gradients(x, weight, wanted)


def _logits(
    chunk: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    ignored: torch.Tensor,
    engine: Engine,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows that are multiplied, and their logits: not even NaN in an ignored row gets there."""
    chunk = chunk.masked_fill(ignored[:, None], 0.0)
    return chunk, apply_linear(chunk, weight, bias, engine)


def _compute_by_kernels(
    logits: torch.Tensor,
    target: torch.Tensor,
    ignore_index: int,
    wanted: tuple[int, int],
    settings: Settings,
) -> tuple[Numbers, ...]:
    """(log_prob, entropy, correct, lse, lse_error) of a chunk."""
    from ..kernels import log_prob as kernels

    return kernels.log_prob_forward(logits, target, ignore_index, *wanted, *settings)


def _compute_by_torch(
    logits: torch.Tensor,
    target: torch.Tensor,
    ignore_index: int,
    wanted: tuple[int, int],
    settings: Settings,
) -> tuple[Numbers, ...]:
    """The same in PyTorch, without lse."""
    with_entropy, with_correct = map(bool, wanted)
    logit_scale, temperature, softcap = settings
    found = reference(
        logits,
        target,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        ignore_index=ignore_index,
        return_entropy=with_entropy,
        return_correct=with_correct,
    )
    numbers = list(found) if isinstance(found, tuple) else [found]
    log_prob, entropy = numbers[0], numbers[1] if with_entropy else None
    return log_prob, entropy, numbers[-1] if with_correct else None, None, None


def _differentiate_by_kernels(
    logits: torch.Tensor,
    target: torch.Tensor,
    ignore_index: int,
    numbers: tuple[Numbers, ...],
    settings: Settings,
) -> torch.Tensor:
    """dlogits of a chunk, where the logits were."""
    from ..kernels import log_prob as kernels

    dlog_prob, dentropy, entropy, lse, lse_error = numbers
    assert dlog_prob is not None
    assert lse is not None
    assert lse_error is not None
    tensors = (dlog_prob, dentropy, logits, target, lse, lse_error, entropy)
    return kernels.log_prob_backward(*tensors, ignore_index, *settings, overwrite=True)


def _differentiate_by_torch(
    logits: torch.Tensor,
    target: torch.Tensor,
    ignore_index: int,
    numbers: tuple[Numbers, ...],
    settings: Settings,
) -> torch.Tensor:
    """The same in PyTorch, by the formulas of the kernels.

    Not by autograd, which does not work inside a registered op, and which would hold more tensors
    of the size of the logits.
    """
    dlog_prob, dentropy, entropy, *_ = numbers
    assert dlog_prob is not None
    logit_scale, temperature, softcap = settings
    ignored = target == ignore_index
    exists = (target >= 0) & (target < logits.shape[1])
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if logit_scale != 1.0:
        x = x * logit_scale
    if softcap is not None:
        x = softcapped(x, softcap)
    log_p = (x if temperature == 1.0 else x / temperature).log_softmax(1)
    p = log_p.exp()
    to_target = dlog_prob.to(x.dtype).masked_fill(~exists, float("nan")).masked_fill(ignored, 0.0)
    to_each = to_target[:, None]
    if dentropy is not None and entropy is not None:
        # p log(p) is 0 where p is, be the logarithm of it infinite.
        log_p.masked_fill_(p == 0.0, 0.0)
        log_p.add_(entropy[:, None])
        to_each = log_p.mul_(dentropy.to(x.dtype)[:, None]).add_(to_each)
    dx = p.mul_(to_each).neg_()
    place = torch.arange(len(target), device=target.device), torch.where(exists, target, 0)
    dx[place] += to_target
    if softcap is not None:
        dx.mul_(1.0 - (x / softcap).square())
    if logit_scale != 1.0 or temperature != 1.0:
        dx.mul_(logit_scale / temperature)
    return dx.masked_fill_(ignored[:, None], 0.0).to(logits.dtype)
