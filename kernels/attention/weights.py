"""The weights of attention, written out: p_ij = exp(s_ij - lse_i), for inspection.

Shapes and terms are those of attention_forward.py; the weights are (B, H, M, N) in the dtype of q.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from ..common import accumulator_dtype, divisible
from ..config import cdiv, target_of
from ..launch import launchable
from .composition import (
    INTEGERS,
    composed_keep,
    composed_score,
    scaled,
    weight_of,
    with_integers,
)
from .config import AttentionConfig, attention_queries_backward_config
from .launch import prepared, unit_last_stride
from .lists import listed_keys
from .tiles import base_of, dot_of_rows, load_log_sum, load_tile, statistics_of

STRIDES = ("stride_qb", "stride_qh", "stride_qm", "stride_kb", "stride_kh", "stride_kn")


@functools.partial(launchable, strides=STRIDES)
@triton.jit(
    do_not_specialize=[
        *STRIDES,
        "stride_lb",
        "stride_lh",
        "stride_lm",
        "pairs",
        "queries",
        "keys",
        *INTEGERS,
    ]
)
def attention_weights_kernel(
    # tensors
    q_ptr,
    k_ptr,
    lse_ptr,
    weights_ptr,
    score_args,
    mask_args,
    # strides
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_lb,
    stride_lh,
    stride_lm,
    # sizes
    pairs,
    queries,
    keys,
    integer_0,
    integer_1,
    integer_2,
    integer_3,
    integer_4,
    integer_5,
    integer_6,
    integer_7,
    integer_8,
    integer_9,
    integer_10,
    integer_11,
    integer_12,
    integer_13,
    integer_14,
    integer_15,
    integer_16,
    integer_17,
    integer_18,
    integer_19,
    integer_20,
    integer_21,
    integer_22,
    integer_23,
    # scalars
    scale,
    # flags
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SOURCES: tl.constexpr,
    SCORES: tl.constexpr,
    SCORE_BOUNDS: tl.constexpr,
    KEEPS: tl.constexpr,
    MASK_BOUNDS: tl.constexpr,
    LISTED: tl.constexpr,
    SCALE: tl.constexpr,
    FOLDED: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    # blocks
    DIVISOR: tl.constexpr,
    DK: tl.constexpr,
    DK_WIDTH: tl.constexpr,
    DK_TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program a tile of BLOCK_M queries of one head, over all keys."""
    integers = (
        integer_0,
        integer_1,
        integer_2,
        integer_3,
        integer_4,
        integer_5,
        integer_6,
        integer_7,
        integer_8,
        integer_9,
        integer_10,
        integer_11,
        integer_12,
        integer_13,
        integer_14,
        integer_15,
        integer_16,
        integer_17,
        integer_18,
        integer_19,
        integer_20,
        integer_21,
        integer_22,
        integer_23,
    )
    score_args = with_integers(score_args, integers, SCORE_BOUNDS)
    mask_args = with_integers(mask_args, integers, MASK_BOUNDS)
    ACC: tl.constexpr = accumulator_dtype(q_ptr)
    stride_qm = divisible(stride_qm, DIVISOR)
    stride_kn = divisible(stride_kn, DIVISOR)

    program = tl.program_id(0)
    batch = program % pairs // HEADS
    head = program % pairs % HEADS
    start_m = program // pairs * BLOCK_M
    offs_block = tl.arange(0, BLOCK_M)
    rows = offs_block.to(tl.int64) if WIDE else offs_block
    key_block = tl.arange(0, BLOCK_N)
    key_rows = key_block.to(tl.int64) if WIDE else key_block
    offs_m = start_m + offs_block  # (BLOCK_M,)
    inside = offs_m < queries
    q_base = base_of(q_ptr, batch, head, start_m, stride_qb, stride_qh, stride_qm, DIVISOR)
    k_base = base_of(k_ptr, batch, head // GROUP, 0, stride_kb, stride_kh, stride_kn, DIVISOR)
    lse_base = statistics_of(lse_ptr, batch, head, 0, stride_lb, stride_lh)
    lse = load_log_sum(lse_base + offs_m.to(tl.int64) * stride_lm, inside)
    q = load_tile(q_base, rows, stride_qm, inside, DK_WIDTH, DK_TAIL, DK)
    out_base = weights_ptr + ((batch * HEADS + head).to(tl.int64) * queries + start_m) * keys
    for start_n in range(0, keys, BLOCK_N):
        offs_n = start_n + key_block
        m, n = offs_m[:, None], offs_n[None, :]
        at = (batch, head, queries, keys, start_m, start_n)
        exists = inside[:, None] & (offs_n < keys)[None, :]
        keep = composed_keep(exists, m, n, at, mask_args, KEEPS)
        if LISTED is not None:
            first, end = listed_keys(start_n, start_n + 1, at, mask_args[LISTED], BLOCK_N)
            keep = keep & (first < end)
        k = load_tile(
            k_base + start_n * stride_kn.to(tl.int64),
            key_rows,
            stride_kn,
            offs_n < keys,
            DK_WIDTH,
            DK_TAIL,
            DK,
        )
        score = dot_of_rows(q, k, DK_TAIL, ACC, PRECISION)  # (BLOCK_M, BLOCK_N)
        if not FOLDED:
            score = scaled(score, scale, SCALE)
            score, _ = composed_score(score, m, n, at, score_args, SCORES)
        weights = tl.where(keep, weight_of(score, lse[:, None], scale, FOLDED), 0.0)
        pointers = out_base + rows[:, None].to(tl.int64) * keys + n
        tl.store(pointers, weights.to(weights_ptr.dtype.element_ty), exists)


def attention_weights_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    tensors: list[torch.Tensor],
    scale: float,
    precision: str,
    terms: str,
    floats: list[float],
    integers: list[int],
) -> torch.Tensor:
    """Launch the weights (B, H, M, N), with terms as in attention_forward."""
    batch, heads, queries, _ = q.shape
    keys = k.shape[2]
    weights = q.new_empty((batch, heads, queries, keys))
    if weights.numel() == 0:
        return weights
    q, k = unit_last_stride(q), unit_last_stride(k)
    strides = (*q.stride()[:3], *k.stride()[:3])
    launch, config = prepared(
        attention_weights_kernel,
        _config,
        q,
        k,
        k,
        strides,
        scale,
        precision,
        terms,
        tensors,
        floats,
        integers,
        target_of(q),
    )
    pairs = batch * heads
    launch(
        (pairs * cdiv(queries, config.block_m), 1, 1),
        q_ptr=q,
        k_ptr=k,
        lse_ptr=lse,
        weights_ptr=weights,
        strides=strides,
        stride_lb=lse.stride(0),
        stride_lh=lse.stride(1),
        stride_lm=lse.stride(2),
        pairs=pairs,
        queries=queries,
        keys=keys,
        scale=scale,
    )
    return weights


def _config(*features: Any) -> AttentionConfig:
    """As for a term that loads a tile, because one is stored whatever the terms are."""
    *rest, _, target = features
    return attention_queries_backward_config(*rest, "tensor", target)
