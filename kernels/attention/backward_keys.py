"""The gradients of keys and values: one program a tile of keys. See attention_backward.py."""

import functools

import torch
import triton
import triton.language as tl

from ..common import accumulator_dtype, divisible
from ..config import cdiv, target_of
from ..launch import launchable
from .composition import (
    INTEGERS,
    composed_keep,
    composed_range,
    composed_score,
    composed_score_backward,
    scaled,
    weight_of,
    with_integers,
)
from .config import attention_keys_backward_config
from .launch import Rule, like_queries, prepared
from .lists import listed_queries, listed_query
from .tiles import (
    add_product,
    base_of,
    dot_of_rows,
    dropout_factor,
    dropout_of,
    held_tile,
    in_hand,
    load_log_sum,
    load_tile,
    scaled_tile,
    sequence,
    statistics_of,
    store_tile,
    zero_tile,
)


@triton.jit
def gather(
    state,
    first_block,
    end_block,
    # the tile and its place
    k,
    v,
    offs_n,
    place,
    inside,
    # queries and what belongs to them
    q_base,
    do_base,
    lse_base,
    delta_base,
    stride_qm,
    stride_dom,
    scale,
    dropout,
    score_args,
    mask_args,
    # flags
    MASKED: tl.constexpr,
    SCORES: tl.constexpr,
    SCORES_BACKWARD: tl.constexpr,
    KEEPS: tl.constexpr,
    LISTED: tl.constexpr,
    SCALE: tl.constexpr,
    FOLDED: tl.constexpr,
    WIDE: tl.constexpr,
    RELOADS: tl.constexpr,
    PRECISION: tl.constexpr,
    # blocks
    DK: tl.constexpr,
    DK_WIDTH: tl.constexpr,
    DK_TAIL: tl.constexpr,
    DV: tl.constexpr,
    DV_WIDTH: tl.constexpr,
    DV_TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The state (dk, dv) after the queries from first_block to end_block.

    These are positions in the mask's list where blocks are LISTED.
    """
    dk, dv = state
    queries = place[2]
    ACC: tl.constexpr = dk[0].dtype
    offs_block = tl.arange(0, BLOCK_M)
    rows = offs_block.to(tl.int64) if WIDE else offs_block
    for position in range(first_block, end_block, BLOCK_M if LISTED is None else 1):
        start_m = position
        if LISTED is not None:
            start_m = listed_query(position, place, mask_args[LISTED], BLOCK_M)
        offs_m = start_m + offs_block  # (BLOCK_M,)
        m = offs_m[None, :]
        n = offs_n[:, None]
        at = (place[0], place[1], place[2], place[3], start_m, place[5])
        exists = offs_m < queries
        q = load_tile(
            q_base + start_m * stride_qm.to(tl.int64),
            rows,
            stride_qm,
            exists,
            DK_WIDTH,
            DK_TAIL,
            DK,
        )
        # Beyond the last query lse is infinite, and every weight 0.
        lse = load_log_sum(lse_base + start_m + offs_block, exists)
        own_k = in_hand(k, DK_WIDTH, DK_TAIL, DK, RELOADS)
        score = dot_of_rows(own_k, q, DK_TAIL, ACC, PRECISION)  # (BLOCK_N, BLOCK_M)
        given = ()
        if not FOLDED:
            score = scaled(score, scale, SCALE)
            score, given = composed_score(score, m, n, at, score_args, SCORES)
        weights = weight_of(score, lse[None, :], scale, FOLDED)
        if MASKED:
            keep = composed_keep(inside[:, None] & exists[None, :], m, n, at, mask_args, KEEPS)
            weights = tl.where(keep, weights, 0.0)
        do = load_tile(
            do_base + start_m * stride_dom.to(tl.int64),
            rows,
            stride_dom,
            exists,
            DV_WIDTH,
            DV_TAIL,
            DV,
        )
        kept_weights = weights
        if len(dropout) > 0:
            factor = tl.trans(dropout_factor(dropout, offs_m, place[5], BLOCK_M, BLOCK_N))
            kept_weights = weights * factor
        dv = add_product(dv, kept_weights, do, DV_TAIL, PRECISION)
        delta = tl.load(delta_base + start_m + offs_block, exists, other=0.0)
        own_v = in_hand(v, DV_WIDTH, DV_TAIL, DV, RELOADS)
        dweights = dot_of_rows(own_v, do, DV_TAIL, ACC, PRECISION)
        if len(dropout) > 0:
            dweights *= factor
        dscore = weights * (dweights - delta[None, :])
        dscore, _ = composed_score_backward(dscore, given, m, n, at, score_args, SCORES_BACKWARD)
        if MASKED:
            # Of a key or value that is NaN and that nobody sees, nothing may stay. To ask `keep`
            # here again would keep it in registers over two products.
            dscore = tl.where(weights == 0.0, 0.0, dscore)
        dk = add_product(dk, dscore, q, DK_TAIL, PRECISION)
    return dk, dv


@triton.constexpr_function
def has_half(part, masks, one_loop):
    """Whether a part of the queries is gone over: those by masks, and those that see all."""
    return masks > 0 if part == 0 else masks == 0 or not one_loop


STRIDES = (
    "stride_qb",
    "stride_qh",
    "stride_qm",
    "stride_kb",
    "stride_kh",
    "stride_kn",
    "stride_vb",
    "stride_vh",
    "stride_vn",
    "stride_dob",
    "stride_doh",
    "stride_dom",
    "stride_dkb",
    "stride_dkh",
    "stride_dkn",
    "stride_dvb",
    "stride_dvh",
    "stride_dvn",
)


@functools.partial(launchable, strides=STRIDES)
@triton.jit(
    do_not_specialize=[
        *STRIDES,
        "stride_lb",
        "stride_lh",
        "pairs",
        "queries",
        "keys",
        "max_queries",
        *INTEGERS,
    ]
)
def attention_keys_backward_kernel(
    # tensors
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    seed_ptr,
    score_args,
    mask_args,
    # strides
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_dob,
    stride_doh,
    stride_dom,
    stride_dkb,
    stride_dkh,
    stride_dkn,
    stride_dvb,
    stride_dvh,
    stride_dvn,
    stride_lb,
    stride_lh,
    # sizes
    pairs,
    queries,
    keys,
    max_queries,
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
    dropout_threshold,
    # flags
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SOURCES: tl.constexpr,
    SCORES: tl.constexpr,
    SCORE_BOUNDS: tl.constexpr,
    SCORES_BACKWARD: tl.constexpr,
    KEEPS: tl.constexpr,
    QUERY_RANGES: tl.constexpr,
    MASK_BOUNDS: tl.constexpr,
    SCATTERED: tl.constexpr,
    LISTED: tl.constexpr,
    ONE_LOOP: tl.constexpr,
    SCALE: tl.constexpr,
    FOLDED: tl.constexpr,
    WIDE: tl.constexpr,
    RELOADS: tl.constexpr,
    PRECISION: tl.constexpr,
    # blocks
    DIVISOR: tl.constexpr,
    DK: tl.constexpr,
    DK_WIDTH: tl.constexpr,
    DK_TAIL: tl.constexpr,
    DV: tl.constexpr,
    DV_WIDTH: tl.constexpr,
    DV_TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program a tile of BLOCK_N keys of one key head, for all the query heads that share it.

    `pairs` is the number of batch elements times that of key heads.
    """
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
    stride_vn = divisible(stride_vn, DIVISOR)
    stride_dom = divisible(stride_dom, DIVISOR)
    stride_dkn = divisible(stride_dkn, DIVISOR)
    stride_dvn = divisible(stride_dvn, DIVISOR)

    program = tl.program_id(0)
    KEY_HEADS: tl.constexpr = HEADS // GROUP
    batch = program % pairs // KEY_HEADS
    key_head = program % pairs % KEY_HEADS
    start_n = program // pairs * BLOCK_N
    element, first_query, queries = sequence(cu_seqlens_q_ptr, batch, queries)
    _, first_key, keys = sequence(cu_seqlens_k_ptr, batch, keys)
    # Packed sequences differ in length, and the grid is made for the longest.
    if start_n >= keys:
        return

    offs_block = tl.arange(0, BLOCK_N)
    rows = offs_block.to(tl.int64) if WIDE else offs_block
    offs_n = start_n + offs_block  # (BLOCK_N,)
    inside = offs_n < keys
    row = first_key + start_n
    k_base = base_of(k_ptr, element, key_head, row, stride_kb, stride_kh, stride_kn, DIVISOR)
    v_base = base_of(v_ptr, element, key_head, row, stride_vb, stride_vh, stride_vn, DIVISOR)
    k = held_tile(k_base, rows, stride_kn, inside, DK_WIDTH, DK_TAIL, DK, RELOADS)
    v = held_tile(v_base, rows, stride_vn, inside, DV_WIDTH, DV_TAIL, DV, RELOADS)

    place = (batch, key_head * GROUP, queries, keys, 0, start_n)
    last_n = tl.minimum(start_n + BLOCK_N, keys) - 1
    first_m, end_m, full_first, _ = composed_range(
        start_n, last_n, queries, place, mask_args, QUERY_RANGES, BLOCK_M
    )
    # Two loops: queries that see some of the tile, and after them those that see all of it. The
    # last block needs no mask for being incomplete. Where a mask hides keys from later queries, or
    # any, one loop with masks serves: a third would make the others spill, and so would a second
    # where the tile's configuration says so.
    split = tl.minimum(full_first, end_m)
    if not has_half(1, len(KEEPS), SCATTERED or ONE_LOOP or LISTED is not None):
        split = end_m
    bounds = (first_m // BLOCK_M * BLOCK_M, split, end_m)
    state = (
        zero_tile(BLOCK_N, DK_WIDTH, DK_TAIL, ACC),
        zero_tile(BLOCK_N, DV_WIDTH, DV_TAIL, ACC),
    )
    for member in range(GROUP):
        head = key_head * GROUP + member
        at = (batch, head, queries, keys, 0, start_n)
        q_base = base_of(
            q_ptr, element, head, first_query, stride_qb, stride_qh, stride_qm, DIVISOR
        )
        do_base = base_of(
            do_ptr, element, head, first_query, stride_dob, stride_doh, stride_dom, DIVISOR
        )
        lse_base = statistics_of(lse_ptr, element, head, first_query, stride_lb, stride_lh)
        delta_base = statistics_of(delta_ptr, element, head, first_query, stride_lb, stride_lh)
        own_bounds = bounds
        if LISTED is not None:
            first, end = listed_queries(first_m, end_m, at, mask_args[LISTED], BLOCK_M)
            own_bounds = (first, end, end)
        dropout = ()
        if seed_ptr is not None:
            dropout = dropout_of(
                seed_ptr, batch * HEADS + head, max_queries, dropout_threshold, ACC
            )
        for part in tl.static_range(2):
            if has_half(part, len(KEEPS), SCATTERED or ONE_LOOP or LISTED is not None):
                state = gather(
                    state,
                    own_bounds[part],
                    own_bounds[part + 1],
                    k,
                    v,
                    offs_n,
                    at,
                    inside,
                    q_base,
                    do_base,
                    lse_base,
                    delta_base,
                    stride_qm,
                    stride_dom,
                    scale,
                    dropout,
                    score_args,
                    mask_args,
                    part == 0,
                    SCORES,
                    SCORES_BACKWARD,
                    KEEPS,
                    LISTED,
                    SCALE,
                    FOLDED,
                    WIDE,
                    RELOADS,
                    PRECISION,
                    DK,
                    DK_WIDTH,
                    DK_TAIL,
                    DV,
                    DV_WIDTH,
                    DV_TAIL,
                    BLOCK_M,
                    BLOCK_N,
                )
    dk, dv = state

    if SCALE is not None:
        dk = scaled_tile(dk, SCALE, DK_TAIL)
    else:
        dk = scaled_tile(dk, scale, DK_TAIL)
    dk_base = base_of(dk_ptr, element, key_head, row, stride_dkb, stride_dkh, stride_dkn, DIVISOR)
    dv_base = base_of(dv_ptr, element, key_head, row, stride_dvb, stride_dvh, stride_dvn, DIVISOR)
    store_tile(dk_base, rows, stride_dkn, inside, dk, DK_WIDTH, DK_TAIL, DK)
    store_tile(dv_base, rows, stride_dvn, inside, dv, DV_WIDTH, DV_TAIL, DV)


def keys_backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    seed: torch.Tensor | None,
    tensors: list[torch.Tensor],
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    dropout_p: float,
    precision: str,
    terms: str,
    floats: list[float],
    integers: list[int],
    batch_invariant: bool,
    rule: Rule = attention_keys_backward_config,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the gradients of k and v, which together cost little more than one: (dk, dv)."""
    batch, heads, queries, key_dim = q.shape
    _, key_heads, keys, value_dim = v.shape
    dk = like_queries(k, key_dim, cu_seqlens_k)
    dv = like_queries(v, value_dim, cu_seqlens_k)
    strides = tuple(stride for x in (q, k, v, do, dk, dv) for stride in x.stride()[:3])
    launch, config = prepared(
        attention_keys_backward_kernel,
        rule,
        q,
        k,
        v,
        strides,
        scale,
        precision,
        terms,
        tensors,
        floats,
        integers,
        target_of(q),
        seed=seed,
        dropout_p=dropout_p,
        batch_invariant=batch_invariant,
        max_queries=max_seqlen_q,
    )
    pairs = key_heads * (batch if cu_seqlens_k is None else cu_seqlens_k.numel() - 1)
    blocks = cdiv(keys if cu_seqlens_k is None else min(max_seqlen_k, keys), config.block_n)
    launch(
        (pairs * blocks, 1, 1),
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
        do_ptr=do,
        lse_ptr=lse,
        delta_ptr=delta,
        dk_ptr=dk,
        dv_ptr=dv,
        cu_seqlens_q_ptr=cu_seqlens_q,
        cu_seqlens_k_ptr=cu_seqlens_k,
        strides=strides,
        stride_lb=heads * queries,
        stride_lh=queries,
        pairs=pairs,
        queries=queries,
        keys=keys,
        scale=scale,
    )
    return dk, dv
