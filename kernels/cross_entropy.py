r"""Cross entropy of logits with class indices, forward and backward.

With x = softcap * tanh(a logits / softcap), or a logits without a softcap, a the logit scale, t the
target, w the class weights (ones without), W their sum, e the label smoothing, and V classes:

    lse     = log(sum_c exp(x_c))
    loss    = w_t ((1 - e) (lse - x_t) + z_loss lse^2) + e/V sum_c w_c (lse - x_c)
    dx_c    = dloss (w_t (1 - e + 2 z_loss lse) + e/V W) p_c + dlse p_c
              - dloss ((1 - e) w_t [c = t] + e/V w_c),           p_c = exp(x_c - lse)
    dlogits = dx a (1 - tanh(a logits / softcap)^2)

A row whose target is ignore_index has loss 0, weight 0 and, but for dlse, gradient 0, whatever its
logits hold; if its lse is not finite, that is NaN and without a gradient. A target outside [0, V)
reads nothing: the loss, weight and gradients of its row are NaN.

logits are (..., V), target and everything a row has are (...). All is computed in float32 (float64
for float64 logits). The logits are read once forward, in column tiles, and once backward. lse, and
lse_error, what rounding took from lse, are saved: together they give p to full precision also where
lse is large.
"""

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from .common import accumulator_dtype, divisible
from .config import cdiv, device_target
from .cross_entropy_config import cross_entropy_backward_config, cross_entropy_forward_config
from .cross_entropy_terms import Coefficients, Layout, Loss, load_targets, scale_and_cap
from .lanes import accumulate_lanes, lane_width, merge_lanes
from .launch import MOST_BOUND, common_divisor, empty_rows, flatten_rows, launchable
from .row_tiles import Blocks
from .structures import Rows, restore_odd


@launchable
@triton.jit(do_not_specialize=["rows", "ignore_index"])
def cross_entropy_forward_kernel(
    logits_ptr,
    target_ptr,
    weight_ptr,
    weight_sum_ptr,
    loss_ptr,
    lse_ptr,
    lse_error_ptr,
    row_weight_ptr,
    rows,
    ignore_index,
    layout,
    coefficients,
    LOSS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """One program BLOCK_M rows, in column tiles, each as lanes: see `accumulate_lanes`."""
    BLOCK_M: tl.constexpr = BLOCKS.block_m
    BLOCK_N: tl.constexpr = BLOCKS.block_n
    stride_x = divisible(layout.stride_x, BLOCKS.divisor)
    cols = divisible(layout.cols, BLOCKS.divisor)
    ACC: tl.constexpr = accumulator_dtype(logits_ptr)
    LANE: tl.constexpr = lane_width(logits_ptr)
    LANES: tl.constexpr = BLOCK_N // LANE
    PADDING: tl.constexpr = float("-inf") if LOSS.softcap is None else 0.0
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    # Past the end the last row is computed, and stored, again.
    row = tl.minimum(row, rows - 1)
    x_rows = logits_ptr + row * stride_x
    lane_max = tl.full((BLOCK_M, LANES), float("-inf"), ACC)
    lane_sum = tl.zeros((BLOCK_M, LANES), ACC)
    if LOSS.smoothed:
        # Distances from any one logit of the row: summing the logits themselves would lose the
        # digits that lse cancels.
        first = scale_and_cap(tl.load(x_rows).to(ACC), coefficients, LOSS)[0]
        first = tl.where(tl.abs(first) < float("inf"), first, 0.0)
        lane_distance = tl.zeros((BLOCK_M, LANES), ACC)
    for first_col in range(0, cols, BLOCK_N):
        offs_n = first_col + tl.arange(0, BLOCK_N)
        mask = (offs_n < cols)[None, :]
        # (BLOCK_M, BLOCK_N)
        x = tl.load(x_rows[:, None] + offs_n[None, :], mask, other=PADDING).to(ACC)
        x = scale_and_cap(x, coefficients, LOSS)[0]
        if LOSS.softcap is not None:
            x = tl.where(mask, x, float("-inf"))
        if LOSS.smoothed:
            distance = tl.where(mask, first[:, None] - x, 0.0)
            if weight_ptr is not None:
                weight = tl.load(weight_ptr + offs_n, offs_n < cols, other=0.0).to(ACC)
                distance *= weight[None, :]
            lane_distance += tl.sum(tl.reshape(distance, (BLOCK_M, LANES, LANE)), 2)
        x = tl.reshape(x, (BLOCK_M, LANES, LANE))
        lane_max, lane_sum = accumulate_lanes(x, lane_max, lane_sum)
    row_max, total = merge_lanes(lane_max, lane_sum)  # (BLOCK_M,)
    log_sum = tl.log(total)
    lse = row_max + log_sum
    target = load_targets(target_ptr, weight_ptr, row, cols, ignore_index, ACC)
    endless = target.ignored & (tl.abs(lse) == float("inf"))
    tl.store(lse_ptr + row, tl.where(endless, float("nan"), lse))
    tl.store(lse_error_ptr + row, (row_max - lse) + log_sum)

    x_target = tl.load(x_rows + target.index, target.exists, other=0.0).to(ACC)
    x_target = scale_and_cap(x_target, coefficients, LOSS)[0]
    nll = (row_max - x_target) + log_sum
    loss = target.weight * (
        (1.0 - coefficients.label_smoothing) * nll + coefficients.z_loss * lse * lse
    )
    if LOSS.smoothed:
        weight_sum = cols
        if weight_ptr is not None:
            weight_sum = tl.load(weight_sum_ptr)
        distance = tl.sum(lane_distance, 1) + weight_sum * ((row_max - first) + log_sum)
        loss += coefficients.class_smoothing * distance
    loss = tl.where(target.ignored, 0.0, loss)
    tl.store(loss_ptr + row, loss.to(loss_ptr.dtype.element_ty))
    tl.store(row_weight_ptr + row, target.weight)


@launchable
@triton.jit(do_not_specialize=["rows", "ignore_index"])
def cross_entropy_backward_kernel(
    dloss_view: Rows,
    dlse_view: Rows,
    logits_ptr,
    target_ptr,
    weight_ptr,
    weight_sum_ptr,
    lse_ptr,
    lse_error_ptr,
    dlogits_ptr,
    rows,
    ignore_index,
    layout,
    coefficients,
    LOSS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """One program a tile (BLOCK_M, BLOCK_N).

    dlogits may be the logits: a program has read all of its tile before it writes there, and no
    program reads another's.
    """
    BLOCK_M: tl.constexpr = BLOCKS.block_m
    BLOCK_N: tl.constexpr = BLOCKS.block_n
    stride_x = divisible(layout.stride_x, BLOCKS.divisor)
    cols = divisible(layout.cols, BLOCKS.divisor)
    ACC: tl.constexpr = accumulator_dtype(logits_ptr)
    column_tiles = tl.cdiv(cols, BLOCK_N)
    program = tl.program_id(0)
    row = (program // column_tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    offs_n = program % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = row < rows
    # Past the end the last row is read again, so that nothing there is NaN; it is not stored.
    row = tl.minimum(row, rows - 1)
    mask_n = offs_n < cols
    mask = mask_m[:, None] & mask_n[None, :]
    x_places = logits_ptr + (row * stride_x)[:, None] + offs_n[None, :]
    x = tl.load(x_places, mask, other=0.0).to(ACC)
    x, slope = scale_and_cap(x, coefficients, LOSS)
    lse = tl.load(lse_ptr + row)
    lse_error = tl.load(lse_error_ptr + row)
    target = load_targets(target_ptr, weight_ptr, row, cols, ignore_index, ACC)
    ignored = target.ignored
    # The mean over rows that are all ignored sends an infinite gradient to each of them.
    dloss = tl.load(dloss_view.pointer + row * restore_odd(dloss_view.stride)).to(ACC)
    dloss = tl.where(ignored, 0.0, dloss)

    to_target = dloss * target.weight * (1.0 - coefficients.label_smoothing)
    # What the lse is asked for beyond the target's own loss.
    rest = dloss * target.weight * 2.0 * coefficients.z_loss * lse
    if LOSS.smoothed:
        weight_sum = cols
        if weight_ptr is not None:
            weight_sum = tl.load(weight_sum_ptr)
        to_each = dloss * coefficients.class_smoothing
        rest += to_each * weight_sum
    rest = tl.where(ignored, 0.0, rest)
    if dlse_view is not None:
        dlse = tl.load(dlse_view.pointer + row * restore_odd(dlse_view.stride)).to(ACC)
        rest += tl.where(ignored & (lse != lse), 0.0, dlse)
    to_lse = to_target + rest
    # Where nothing is asked of a row, nothing in its logits may show, be it infinite or NaN.
    p = tl.exp((x - lse[:, None]) - lse_error[:, None])
    p = tl.where((to_lse == 0.0)[:, None], 0.0, p)
    # p - 1 of a target that is nearly certain loses nothing; the rest may be far smaller than it.
    is_target = tl.where(offs_n[None, :] == target.index[:, None], 1.0, 0.0)
    dx = tl.fma(rest[:, None], p, to_target[:, None] * (p - is_target))
    if LOSS.smoothed:
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + offs_n, mask_n, other=0.0).to(ACC)
            dx -= to_each[:, None] * weight[None, :]
        else:
            dx -= to_each[:, None]
    dx *= slope
    if LOSS.scaled:
        dx *= coefficients.logit_scale
    dx = tl.where((ignored & (to_lse == 0.0))[:, None], 0.0, dx)
    dlogits_offsets = (row * cols)[:, None] + offs_n[None, :]
    tl.store(dlogits_ptr + dlogits_offsets, dx.to(dlogits_ptr.dtype.element_ty), mask)


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
    """Launch the forward: (loss, lse, lse_error, weight) of every row."""
    cols = logits.shape[-1]
    computed = torch.float64 if logits.dtype is torch.float64 else torch.float32
    leading = logits.shape[:-1]
    loss = torch.empty(leading, dtype=loss_dtype, device=logits.device)
    lse = torch.empty(leading, dtype=computed, device=logits.device)
    lse_error = torch.empty_like(lse)
    row_weight = torch.empty_like(lse)
    if logits.numel() == 0:
        return loss, lse, lse_error, row_weight

    logits, stride_xm = flatten_rows(logits, cols)
    rows = lse.numel()
    launch, block_m = _bind_forward(
        cols, stride_xm, label_smoothing, z_loss, logit_scale, softcap, loss_dtype, logits.device
    )
    launch(
        (cdiv(rows, block_m), 1, 1),
        logits_ptr=logits,
        target_ptr=target.contiguous(),
        weight_ptr=None if weight is None else weight.contiguous(),
        weight_sum_ptr=_smoothed_weight(weight, label_smoothing, computed),
        loss_ptr=loss,
        lse_ptr=lse,
        lse_error_ptr=lse_error,
        row_weight_ptr=row_weight,
        rows=rows,
        ignore_index=ignore_index,
    )
    return loss, lse, lse_error, row_weight


@functools.lru_cache(MOST_BOUND)
def _bind_forward(
    cols: int,
    stride_xm: int,
    label_smoothing: float,
    z_loss: float,
    logit_scale: float,
    softcap: float | None,
    loss_dtype: torch.dtype,
    device: torch.device,
) -> tuple[Callable[..., None], int]:
    """The launch with all that a model repeats, and its rows of a tile."""
    config = cross_entropy_forward_config(cols, device_target(device.index))
    launch = cross_entropy_forward_kernel.bind(
        config.num_warps,
        # loss_dtype is an argument for the sake of this.
        fresh=("loss_ptr", "lse_ptr", "lse_error_ptr", "row_weight_ptr"),
        layout=Layout(stride_xm, cols),
        coefficients=Coefficients(label_smoothing, label_smoothing / cols, z_loss, logit_scale),
        LOSS=Loss(label_smoothing > 0.0, logit_scale != 1.0, softcap),
        BLOCKS=Blocks(config.block_m, config.block_n, common_divisor(cols, stride_xm)),
    )
    return launch, config.block_m


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
    overwrite: bool = False,
) -> torch.Tensor:
    """Launch the backward of the rows' losses: dlogits.

    With `overwrite` it takes the memory of the logits, which have to be contiguous.
    """
    cols = logits.shape[-1]
    dlogits = logits.detach() if overwrite else empty_rows(logits, logits.dtype)
    if logits.numel() == 0:
        return dlogits

    logits, stride_xm = flatten_rows(logits, cols)
    launch, block_m, block_n = _bind_backward(
        cols, stride_xm, label_smoothing, z_loss, logit_scale, softcap, logits.device
    )
    rows = lse.numel()
    launch(
        (cdiv(rows, block_m) * cdiv(cols, block_n), 1, 1),
        dloss_view=_view_numbers(dloss),
        dlse_view=None if dlse is None else _view_numbers(dlse),
        logits_ptr=logits,
        target_ptr=target.contiguous(),
        weight_ptr=None if weight is None else weight.contiguous(),
        weight_sum_ptr=_smoothed_weight(weight, label_smoothing, lse.dtype),
        lse_ptr=lse,
        lse_error_ptr=lse_error,
        dlogits_ptr=dlogits,
        rows=rows,
        ignore_index=ignore_index,
    )
    return dlogits


@functools.lru_cache(MOST_BOUND)
def _bind_backward(
    cols: int,
    stride_xm: int,
    label_smoothing: float,
    z_loss: float,
    logit_scale: float,
    softcap: float | None,
    device: torch.device,
) -> tuple[Callable[..., None], int, int]:
    """The launch with all that a model repeats, and the rows and columns of its tiles."""
    config = cross_entropy_backward_config(cols, device_target(device.index))
    launch = cross_entropy_backward_kernel.bind(
        config.num_warps,
        layout=Layout(stride_xm, cols),
        coefficients=Coefficients(label_smoothing, label_smoothing / cols, z_loss, logit_scale),
        LOSS=Loss(label_smoothing > 0.0, logit_scale != 1.0, softcap),
        BLOCKS=Blocks(config.block_m, config.block_n, common_divisor(cols, stride_xm)),
    )
    return launch, config.block_m, config.block_n


def _view_numbers(x: torch.Tensor) -> Rows:
    """One number of each row."""
    x = x.reshape(-1)
    return Rows(x, 2 * x.stride(0) + 3)


def _smoothed_weight(
    weight: torch.Tensor | None, label_smoothing: float, dtype: torch.dtype
) -> torch.Tensor | None:
    """The sum of the class weights, which label smoothing asks for."""
    if weight is None or label_smoothing == 0.0:
        return None
    return weight.sum(dtype=dtype)
