"""The loop of linear cross entropy over chunks of rows: products around cross entropy's kernels.

For the rows x of a chunk, the loss and its gradient come from three products and two launches:

    logits  = x weight^T + bias          (rows, V), the only tensor of this size
    dlogits = the gradient of the rows' losses, written over the logits, which are ours
    dx      = dlogits weight
    dweight = dlogits^T x,  dbias = sum of dlogits over rows, added up over chunks in float32

Kernels know nothing of products, and who multiplies is decided in ops/, so the loop stands here. It
is registered as one op: traced, it would be unrolled, and compiled anew for every number of chunks.
Where there is no Triton the same loop takes loss and gradient of a chunk from PyTorch.
"""

from typing import Any

import torch

from ..reference.linear_cross_entropy import hidden_rows
from .core.linear_launchers import apply_linear
from .core.precision import disable_autocast
from .core.products import Engine, product
from .core.registration import kernel_op
from .core.sharding import rowwise

MOST_ROWS = 4096
FEWEST_ROWS = 128

LOGITS_BYTES = {"kernels": 2**29, "invariant": 2**29, "auto": 2**29, "torch": 2**25 - 1}
"""What the logits of a chunk may take, by engine. On a GPU products of two thousand rows by 131,072
classes of 16 bits use all of it, and what every chunk adds to the weight's gradient is a small part
of the work. PyTorch holds several tensors of this size at a time. On a CPU products need few rows
to be fast, and blocks below 32 MiB are used again, where larger ones are zeroed page by page."""


def choose_chunk_rows(classes: int, itemsize: int, engine: Engine) -> int:
    """How many rows a chunk has: a function of what a row of logits takes, never of the rows."""
    rows = LOGITS_BYTES[engine] // (classes * itemsize)
    return max(FEWEST_ROWS, min(rows // FEWEST_ROWS * FEWEST_ROWS, MOST_ROWS))


def cross_entropy_in_chunks(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    class_weight: torch.Tensor | None,
    dloss: torch.Tensor | None,
    dlse: torch.Tensor | None,
    ignore_index: int,
    chunk_rows: int,
    label_smoothing: float,
    z_loss: float,
    logit_scale: float,
    softcap: float | None,
    engine: Engine,
    wanted: list[int],
) -> tuple[
    torch.Tensor,
    torch.Tensor,
    torch.Tensor | None,
    torch.Tensor | None,
    torch.Tensor | None,
    torch.Tensor | None,
]:
    """Losses, class weights and lse of the rows, and the gradients of dloss losses + dlse lse.

    Args:
        x: (..., D).
        weight: (V, D), of x's dtype.
        bias: (V,), of x's dtype, or None.
        target: (...), int64.
        class_weight: (V,), or None.
        dloss: (...): the gradient of every row's loss; None for ones.
        dlse: (...): that of every row's lse, or None.
        engine: who computes.
        wanted: which of lse, dx, dweight and dbias to compute beside the losses: 0 or 1 for each,
            for torch.jit.trace takes no list of bools.

    Returns:
        (loss, row weight, lse, dx, dweight, dbias), the last four None where not wanted; dx in x's
        dtype, all others in float32 (float64 for float64).
    """
    lse_wanted, dx_wanted, dweight_wanted, dbias_wanted = map(bool, wanted)
    computed = torch.promote_types(x.dtype, torch.float32)
    rows = x.reshape(-1, x.shape[-1])
    targets = target.reshape(-1)
    count = targets.numel()
    loss = x.new_empty(count, dtype=computed)
    lse = x.new_empty(count, dtype=computed) if lse_wanted else None
    dx = torch.empty_like(rows, memory_format=torch.contiguous_format) if dx_wanted else None
    dweight = dbias = None
    dlosses = targets.new_ones((), dtype=computed) if dloss is None else dloss
    dlosses = dlosses.expand(target.shape).reshape(-1)
    dlses = None if dlse is None else dlse.reshape(-1)
    gradient_wanted = dx_wanted or dweight_wanted or dbias_wanted
    settings = (ignore_index, label_smoothing, z_loss, logit_scale, softcap)
    loss_and_gradient = _compute_by_torch if engine == "torch" else _compute_by_kernels

    # The operands have the dtype that autocast asks for, and sums are to be in float32.
    with disable_autocast(x):
        for first in range(0, max(count, 1), chunk_rows):
            part = slice(first, first + chunk_rows)
            chunk = rows[part]
            # An ignored row is not looked at, so that not even a NaN in it gets anywhere.
            with_lse = lse_wanted or dlse is not None
            hidden = hidden_rows(chunk, targets[part] == ignore_index, with_lse)
            chunk = chunk.masked_fill(hidden[:, None], 0.0)
            logits = apply_linear(chunk, weight, bias, engine)
            chunk_loss, chunk_lse, dlogits = loss_and_gradient(
                logits,
                targets[part],
                class_weight,
                dlosses[part] if gradient_wanted else None,
                None if dlses is None else dlses[part].masked_fill(hidden, 0.0),
                settings,
                lse_wanted,
            )
            # The next chunk's logits take this memory, once dlogits is done with it too.
            del logits
            loss[part] = chunk_loss
            if lse is not None and chunk_lse is not None:
                lse[part] = chunk_lse.masked_fill(hidden, float("nan"))
            if dlogits is None:
                continue
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

    row_weight = _row_weights(target, class_weight, weight.shape[0], ignore_index, computed)
    return (
        loss.view(target.shape),
        row_weight,
        None if lse is None else lse.view(target.shape),
        None if dx is None else dx.view(x.shape),
        dweight,
        dbias,
    )


def _flops(x: torch.Tensor, weight: torch.Tensor, *rest: Any) -> int:
    """The logits, and each gradient of a product's operand that is wanted."""
    *_, (_, dx_wanted, dweight_wanted, _) = rest
    return 2 * x.numel() * weight.shape[0] * (1 + bool(dx_wanted) + bool(dweight_wanted))


@kernel_op(
    cross_entropy_in_chunks,
    sharding=rowwise(rows_in=(0, 3, 5, 6), rows_out=(0, 1, 2, 3), summed_out=(4, 5)),
    flops=_flops,
)
def linear_cross_entropy_chunks(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    class_weight: torch.Tensor | None,
    dloss: torch.Tensor | None,
    dlse: torch.Tensor | None,
    ignore_index: int,
    chunk_rows: int,
    label_smoothing: float,
    z_loss: float,
    logit_scale: float,
    softcap: float | None,
    engine: str,
    wanted: list[int],
) -> tuple[
    torch.Tensor,
    torch.Tensor,
    torch.Tensor | None,
    torch.Tensor | None,
    torch.Tensor | None,
    torch.Tensor | None,
]:
    """What `cross_entropy_in_chunks` above returns."""
    lse_wanted, dx_wanted, dweight_wanted, dbias_wanted = map(bool, wanted)
    computed = torch.promote_types(x.dtype, torch.float32)
    return (
        x.new_empty(target.shape, dtype=computed),
        x.new_empty(target.shape, dtype=computed),
        x.new_empty(target.shape, dtype=computed) if lse_wanted else None,
        x.new_empty(x.shape) if dx_wanted else None,
        x.new_empty(weight.shape, dtype=computed) if dweight_wanted else None,
        x.new_empty(weight.shape[:1], dtype=computed) if dbias_wanted else None,
    )


def _compute_by_kernels(
    logits: torch.Tensor,
    target: torch.Tensor,
    class_weight: torch.Tensor | None,
    dloss: torch.Tensor | None,
    dlse: torch.Tensor | None,
    settings: tuple[int, float, float, float, float | None],
    lse_wanted: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(loss, lse, dlogits) of a chunk; dlogits, None without dloss, is where the logits were."""
    from ..kernels import cross_entropy as kernels

    computed = torch.promote_types(logits.dtype, torch.float32)
    loss, lse, lse_error, _ = kernels.cross_entropy_forward(
        logits, target, class_weight, *settings, computed
    )
    if dloss is None:
        return loss, lse, None
    dlogits = kernels.cross_entropy_backward(
        dloss, dlse, logits, target, class_weight, lse, lse_error, *settings, overwrite=True
    )
    return loss, lse, dlogits


def _compute_by_torch(
    logits: torch.Tensor,
    target: torch.Tensor,
    class_weight: torch.Tensor | None,
    dloss: torch.Tensor | None,
    dlse: torch.Tensor | None,
    settings: tuple[int, float, float, float, float | None],
    lse_wanted: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The same in PyTorch, by the formulas of the kernels; lse only where something needs it.

    Not by autograd, which does not work inside a registered op, and which would hold more tensors
    of the size of the logits.
    """
    ignore_index, label_smoothing, z_loss, logit_scale, softcap = settings
    classes = logits.shape[1]
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if logit_scale != 1.0:
        x = x * logit_scale
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    with_lse = lse_wanted or dlse is not None
    lse = x.logsumexp(1) if with_lse or z_loss > 0.0 else None
    log_p = x.log_softmax(1)

    ignored = target == ignore_index
    row_weight = _row_weights(target, class_weight, classes, ignore_index, x.dtype)
    place = torch.arange(len(target), device=target.device), target.clamp(0, classes - 1)
    loss = (label_smoothing - 1.0) * row_weight * log_p[place]
    if lse is not None and z_loss > 0.0:
        loss += row_weight * z_loss * lse.square()
    spread = None
    if label_smoothing > 0.0:
        spread = x.new_full((classes,), label_smoothing / classes)
        if class_weight is not None:
            spread *= class_weight
        loss -= log_p @ spread
    loss.masked_fill_(ignored, 0.0)
    endless = None
    if with_lse and lse is not None:
        endless = ignored & ~lse.isfinite()
        lse = lse.masked_fill(endless, float("nan"))
    if dloss is None:
        return loss, lse, None

    dloss = dloss.to(x.dtype).masked_fill(ignored, 0.0)
    to_target = dloss * row_weight * (1.0 - label_smoothing)
    to_lse = to_target
    if lse is not None and z_loss > 0.0:
        to_lse = to_lse + (2.0 * z_loss * dloss * row_weight * lse).masked_fill(ignored, 0.0)
    if spread is not None:
        to_lse = to_lse + dloss * spread.sum()
    if dlse is not None and endless is not None:
        to_lse = to_lse + dlse.masked_fill(endless, 0.0)
    dx = log_p.exp_().mul_(to_lse[:, None])
    dx[place] -= to_target
    if spread is not None:
        dx.addr_(dloss, spread, alpha=-1.0)
    if softcap is not None:
        dx.mul_(1.0 - (x / softcap).square())
    if logit_scale != 1.0:
        dx.mul_(logit_scale)
    if endless is not None:
        dx.masked_fill_(endless[:, None], 0.0)
    return loss, lse, dx.to(logits.dtype)


def _row_weights(
    target: torch.Tensor,
    class_weight: torch.Tensor | None,
    classes: int,
    ignore_index: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The weight of each row's target: 0 where it is ignored, NaN where it is no class."""
    exists = (target >= 0) & (target < classes)
    weights = torch.ones((), dtype=dtype, device=target.device)
    if class_weight is not None:
        weights = class_weight.to(dtype)[torch.where(exists, target, 0)]
    weights = torch.where(exists, weights, float("nan"))
    return torch.where(target == ignore_index, 0.0, weights)
