r"""The kernels of cross entropy and of log-probabilities, forward and backward.

With x = softcap * tanh(a logits / softcap), or a logits without a softcap, a the logit scale, t the
target, w the class weights (ones without), W their sum, e the label smoothing, and V classes:

    lse     = log(sum_c exp(x_c))
    loss    = w_t ((1 - e) (lse - x_t) + z_loss lse^2) + e/V sum_c w_c (lse - x_c)
    dx_c    = dloss (w_t (1 - e + 2 z_loss lse) + e/V W) p_c + dlse p_c
              - dloss ((1 - e) w_t [c = t] + e/V w_c),           p_c = exp(x_c - lse)
    dlogits = dx a (1 - tanh(a logits / softcap)^2)

As log-probabilities (`LOSS.negated`) the loss and its gradient have the other sign, and a
temperature divides x after the cap. Where it is asked for, the entropy of p comes with them:

    entropy = -sum_c p_c log(p_c) = log(sum_c exp(x_c - m)) + sum_c p_c (m - x_c),  m = max_c x_c
    dx_c    = ... - dentropy p_c (log(p_c) + entropy)

in a form without negative terms, so that none cancels another, however far from 0 the logits are;
and `correct`: whether the target is the first of its row's largest logits, of which none is NaN.

A row whose target is ignore_index has loss 0, weight 0, entropy 0 and, but for dlse, gradient 0,
whatever its logits hold; if its lse is not finite, that is NaN and without a gradient. A target
outside [0, V) reads nothing: the loss, weight and gradients of its row are NaN.

logits are (..., V), target and everything a row has are (...). All is computed in float32 (float64
for float64 logits). The logits are read once forward, in column tiles, and once backward. lse, and
lse_error, what rounding took from lse, are saved: together they give p to full precision also where
lse is large.
"""

import triton
import triton.language as tl

from .common import accumulator_dtype, divisible
from .cross_entropy_terms import load_targets, scale_and_cap
from .lanes import (
    accumulate_lanes,
    accumulate_moments,
    lane_width,
    merge_lanes,
    merge_moments,
)
from .launch import launchable
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
    entropy_ptr,
    correct_ptr,
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
    if entropy_ptr is not None:
        lane_moment = tl.zeros((BLOCK_M, LANES), ACC)
    if correct_ptr is not None:
        # Only who compares with it holds the target's logit from the beginning.
        target = load_targets(target_ptr, weight_ptr, row, cols, ignore_index, ACC)
        x_target = tl.load(x_rows + target.index, target.exists, other=0.0).to(ACC)
        lane_beaten = tl.zeros((BLOCK_M, LANES), tl.int32)
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
        if correct_ptr is not None:
            # Scale, cap and temperature leave the order of logits as it is. NaN is beaten by all.
            is_less = x < x_target[:, None]
            is_later = (x == x_target[:, None]) & (offs_n[None, :] >= target.index[:, None])
            beaten = tl.where(mask & ~(is_less | is_later), 1, 0)
            beaten = tl.max(tl.reshape(beaten, (BLOCK_M, LANES, LANE)), 2)
            lane_beaten = tl.maximum(lane_beaten, beaten)
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
        if entropy_ptr is not None:
            lane_moment = accumulate_moments(x, lane_max, lane_sum, lane_moment)
        lane_max, lane_sum = accumulate_lanes(x, lane_max, lane_sum)
    row_max, total = merge_lanes(lane_max, lane_sum)  # (BLOCK_M,)
    log_sum = tl.log(total)
    lse = row_max + log_sum
    if correct_ptr is None:
        target = load_targets(target_ptr, weight_ptr, row, cols, ignore_index, ACC)
    endless = target.ignored & (tl.abs(lse) == float("inf"))
    tl.store(lse_ptr + row, tl.where(endless, float("nan"), lse))
    tl.store(lse_error_ptr + row, (row_max - lse) + log_sum)

    if entropy_ptr is not None:
        moment = merge_moments(lane_max, lane_sum, lane_moment)
        entropy = log_sum + moment / total
        tl.store(entropy_ptr + row, tl.where(target.ignored, 0.0, entropy))
    if correct_ptr is not None:
        correct = target.exists & ~target.ignored & (tl.max(lane_beaten, 1) == 0)
        tl.store(correct_ptr + row, correct)
    if correct_ptr is None:
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
    if LOSS.negated:
        loss = -loss
    loss = tl.where(target.ignored, 0.0, loss)
    tl.store(loss_ptr + row, loss.to(loss_ptr.dtype.element_ty))
    if row_weight_ptr is not None:
        tl.store(row_weight_ptr + row, target.weight)


@launchable
@triton.jit(do_not_specialize=["rows", "ignore_index"])
def cross_entropy_backward_kernel(
    dloss_view: Rows,
    dlse_view: Rows,
    dentropy_view: Rows,
    logits_ptr,
    target_ptr,
    weight_ptr,
    weight_sum_ptr,
    lse_ptr,
    lse_error_ptr,
    entropy_ptr,
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
    if LOSS.negated:
        dloss = -dloss

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
    unasked = to_lse == 0.0
    if dentropy_view is not None:
        dentropy = tl.load(dentropy_view.pointer + row * restore_odd(dentropy_view.stride)).to(ACC)
        dentropy = tl.where(ignored, 0.0, dentropy)
        entropy = tl.load(entropy_ptr + row)
        unasked &= dentropy == 0.0
    # Where nothing is asked of a row, nothing in its logits may show, be it infinite or NaN.
    log_p = (x - lse[:, None]) - lse_error[:, None]
    p = tl.where(unasked[:, None], 0.0, tl.exp(log_p))
    # p - 1 of a target that is nearly certain loses nothing; the rest may be far smaller than it.
    is_target = tl.where(offs_n[None, :] == target.index[:, None], 1.0, 0.0)
    dx = tl.fma(rest[:, None], p, to_target[:, None] * (p - is_target))
    if dentropy_view is not None:
        # p log(p) is 0 where p is, be the logarithm of it infinite.
        surprise = tl.where(p == 0.0, 0.0, log_p + entropy[:, None])
        dx -= dentropy[:, None] * p * surprise
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
