r"""The divergence of two softmaxes over the same classes, forward and backward.

With z the student's and y the teacher's logits over a temperature T, p = softmax(z), q = softmax(y)
and, for 0 < beta < 1, m = beta q + (1 - beta) p, a row's divergence and its gradient are

    beta = 0     sum_c q_c log(q_c / p_c)                 dlogits_c = d (p_c - q_c) / T
    beta = 1     sum_c p_c s_c,  s_c = log(p_c / q_c)
    else         beta sum_c q_c log(q_c / m_c) + sum_c p_c s_c,  s_c = (1 - beta) log(p_c / m_c)
                                                      dlogits_c = d p_c (s_c - sum_k p_k s_k) / T

with d the incoming gradient. The teacher gets none. Rows that the mask leaves out have divergence 0
and gradient 0, whatever their logits hold.

Both logits are (rows, V), contiguous, of any dtypes. All is computed in float32 (float64 for
float64 logits of the student). They are read twice forward, for the normalisers and for the sum,
and once backward, where the gradient takes the memory of the student's. Saved are five numbers of
each row: both lse, what rounding took from them, and sum_k p_k s_k.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .common import accumulator_dtype, divisible
from .config import cdiv, device_target
from .cross_entropy_config import cross_entropy_backward_config, cross_entropy_forward_config
from .lanes import accumulate_lanes, lane_width, merge_lanes
from .launch import MOST_BOUND, common_divisor, launchable
from .row_tiles import Blocks

STATISTICS = 5
"""Numbers that are saved of a row."""


class Weights(NamedTuple):
    """What a divergence is made with at run time: beta, 1 - beta, their logarithms, and 1 / T."""

    beta: Any
    rest: Any
    log_beta: Any
    log_rest: Any
    sharpness: Any


class Kind(NamedTuple):
    """Which divergence it is, as a constexpr: neither is the one in between."""

    forward: bool
    reverse: bool


@triton.jit
def load_logits(logits_ptr, row, offs_n, cols, sharpness, ACC: tl.constexpr):
    """Logits (BLOCK_M, BLOCK_N) over the temperature, -inf outside of the row."""
    places = logits_ptr + (row * cols)[:, None] + offs_n[None, :]
    return tl.load(places, (offs_n < cols)[None, :], other=float("-inf")).to(ACC) * sharpness


@triton.jit
def compare(log_p, log_q, weights, KIND: tl.constexpr):
    """p, q, the terms of the sum, and s."""
    p, q = tl.exp(log_p), tl.exp(log_q)
    if KIND.forward:
        slope = tl.zeros_like(p)
        term = tl.where(q == 0.0, 0.0, q * (log_q - log_p))
    elif KIND.reverse:
        slope = tl.where(p == 0.0, 0.0, log_p - log_q)
        term = p * slope
    else:
        of_q, of_p = weights.log_beta + log_q, weights.log_rest + log_p
        top = tl.maximum(of_q, of_p)
        # Of a class that neither has the sum is 0, and of all others from 1 to 2.
        top = tl.where(top == float("-inf"), 0.0, top)
        log_m = top + tl.log(tl.exp(of_q - top) + tl.exp(of_p - top))
        slope = tl.where(p == 0.0, 0.0, weights.rest * (log_p - log_m))
        term = p * slope + tl.where(q == 0.0, 0.0, weights.beta * q * (log_q - log_m))
    return p, q, term, slope


@launchable
@triton.jit(do_not_specialize=["rows"])
def jsd_forward_kernel(
    student_ptr,
    teacher_ptr,
    mask_ptr,
    divergence_ptr,
    statistics_ptr,
    rows,
    sizes,
    weights,
    KIND: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """One program BLOCK_M rows, twice in column tiles, each as lanes: see `accumulate_lanes`."""
    BLOCK_M: tl.constexpr = BLOCKS.block_m
    BLOCK_N: tl.constexpr = BLOCKS.block_n
    cols = divisible(sizes[0], BLOCKS.divisor)
    ACC: tl.constexpr = accumulator_dtype(student_ptr)
    LANE: tl.constexpr = lane_width(student_ptr)
    LANES: tl.constexpr = BLOCK_N // LANE
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    # Past the end the last row is computed, and stored, again.
    row = tl.minimum(row, rows - 1)
    max_p = tl.full((BLOCK_M, LANES), float("-inf"), ACC)
    max_q = max_p
    sum_p = tl.zeros((BLOCK_M, LANES), ACC)
    sum_q = sum_p
    for first_col in range(0, cols, BLOCK_N):
        offs_n = first_col + tl.arange(0, BLOCK_N)
        z = load_logits(student_ptr, row, offs_n, cols, weights.sharpness, ACC)
        max_p, sum_p = accumulate_lanes(tl.reshape(z, (BLOCK_M, LANES, LANE)), max_p, sum_p)
        y = load_logits(teacher_ptr, row, offs_n, cols, weights.sharpness, ACC)
        max_q, sum_q = accumulate_lanes(tl.reshape(y, (BLOCK_M, LANES, LANE)), max_q, sum_q)
    top_p, total_p = merge_lanes(max_p, sum_p)
    top_q, total_q = merge_lanes(max_q, sum_q)
    rest_p, rest_q = tl.log(total_p), tl.log(total_q)

    lane_terms = tl.zeros((BLOCK_M, LANES), ACC)
    lane_slopes = lane_terms
    for first_col in range(0, cols, BLOCK_N):
        offs_n = first_col + tl.arange(0, BLOCK_N)
        z = load_logits(student_ptr, row, offs_n, cols, weights.sharpness, ACC)
        y = load_logits(teacher_ptr, row, offs_n, cols, weights.sharpness, ACC)
        log_p = (z - top_p[:, None]) - rest_p[:, None]
        log_q = (y - top_q[:, None]) - rest_q[:, None]
        p, _, term, slope = compare(log_p, log_q, weights, KIND)
        lane_terms += tl.sum(tl.reshape(term, (BLOCK_M, LANES, LANE)), 2)
        lane_slopes += tl.sum(tl.reshape(p * slope, (BLOCK_M, LANES, LANE)), 2)

    divergence = tl.sum(lane_terms, 1)
    if mask_ptr is not None:
        divergence = tl.where(tl.load(mask_ptr + row) != 0, divergence, 0.0)
    tl.store(divergence_ptr + row, divergence)
    statistics = statistics_ptr + row * 5
    lse_p, lse_q = top_p + rest_p, top_q + rest_q
    tl.store(statistics, lse_p)
    tl.store(statistics + 1, (top_p - lse_p) + rest_p)
    tl.store(statistics + 2, lse_q)
    tl.store(statistics + 3, (top_q - lse_q) + rest_q)
    tl.store(statistics + 4, tl.sum(lane_slopes, 1))


@launchable
@triton.jit(do_not_specialize=["rows"])
def jsd_backward_kernel(
    student_ptr,
    teacher_ptr,
    mask_ptr,
    ddivergence_ptr,
    statistics_ptr,
    rows,
    sizes,
    weights,
    KIND: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """One program a tile (BLOCK_M, BLOCK_N), which it has read before it writes there."""
    BLOCK_M: tl.constexpr = BLOCKS.block_m
    BLOCK_N: tl.constexpr = BLOCKS.block_n
    cols = divisible(sizes[0], BLOCKS.divisor)
    ACC: tl.constexpr = accumulator_dtype(student_ptr)
    column_tiles = tl.cdiv(cols, BLOCK_N)
    program = tl.program_id(0)
    row = (program // column_tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    offs_n = program % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (row < rows)[:, None] & (offs_n < cols)[None, :]
    row = tl.minimum(row, rows - 1)
    z = load_logits(student_ptr, row, offs_n, cols, weights.sharpness, ACC)
    y = load_logits(teacher_ptr, row, offs_n, cols, weights.sharpness, ACC)
    statistics = statistics_ptr + row * 5
    log_p = (z - tl.load(statistics)[:, None]) - tl.load(statistics + 1)[:, None]
    log_q = (y - tl.load(statistics + 2)[:, None]) - tl.load(statistics + 3)[:, None]
    p, q, _, slope = compare(log_p, log_q, weights, KIND)
    pull = p - q if KIND.forward else p * (slope - tl.load(statistics + 4)[:, None])
    ddivergence = tl.load(ddivergence_ptr + row).to(ACC) * weights.sharpness
    dx = ddivergence[:, None] * pull
    if mask_ptr is not None:
        dx = tl.where((tl.load(mask_ptr + row) != 0)[:, None], dx, 0.0)
    places = student_ptr + (row * cols)[:, None] + offs_n[None, :]
    tl.store(places, dx.to(student_ptr.dtype.element_ty), mask)


def jsd_forward(
    student: torch.Tensor,
    teacher: torch.Tensor,
    mask: torch.Tensor | None,
    beta: float,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the forward: (divergence, statistics) of rows (rows, V)."""
    rows, cols = student.shape
    computed = torch.float64 if student.dtype is torch.float64 else torch.float32
    divergence = student.new_empty(rows, dtype=computed)
    statistics = student.new_empty((rows, STATISTICS), dtype=computed)
    if rows:
        launch, block_m, _ = _bind(True, cols, beta, temperature, student.device)
        launch(
            (cdiv(rows, block_m), 1, 1),
            student_ptr=student,
            teacher_ptr=teacher,
            mask_ptr=None if mask is None else mask.contiguous(),
            divergence_ptr=divergence,
            statistics_ptr=statistics,
            rows=rows,
        )
    return divergence, statistics


def jsd_backward(
    ddivergence: torch.Tensor,
    student: torch.Tensor,
    teacher: torch.Tensor,
    mask: torch.Tensor | None,
    statistics: torch.Tensor,
    beta: float,
    temperature: float,
) -> torch.Tensor:
    """Launch the backward: the gradient of the student's logits, in their memory."""
    rows, cols = student.shape
    if rows:
        launch, block_m, block_n = _bind(False, cols, beta, temperature, student.device)
        launch(
            (cdiv(rows, block_m) * cdiv(cols, block_n), 1, 1),
            student_ptr=student,
            teacher_ptr=teacher,
            mask_ptr=None if mask is None else mask.contiguous(),
            ddivergence_ptr=ddivergence.contiguous(),
            statistics_ptr=statistics,
            rows=rows,
        )
    return student


@functools.lru_cache(MOST_BOUND)
def _bind(
    forward: bool, cols: int, beta: float, temperature: float, device: torch.device
) -> tuple[Callable[..., None], int, int]:
    """The launch with all that a model repeats, and the rows and columns of its tiles."""
    choose = cross_entropy_forward_config if forward else cross_entropy_backward_config
    config = choose(cols, device_target(device.index))
    kernel = jsd_forward_kernel if forward else jsd_backward_kernel
    inside = 0.0 < beta < 1.0
    logarithms = (math.log(beta), math.log1p(-beta)) if inside else (0.0, 0.0)
    launch = kernel.bind(
        config.num_warps,
        sizes=(cols,),
        weights=Weights(float(beta), 1.0 - beta, *logarithms, 1.0 / temperature),
        KIND=Kind(beta == 0.0, beta == 1.0),
        BLOCKS=Blocks(config.block_m, config.block_n, common_divisor(cols)),
    )
    return launch, config.block_m, config.block_n
