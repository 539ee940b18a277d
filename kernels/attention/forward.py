r"""Attention, forward.

For each query i of a head, over the keys j that its masks keep:

    s_ij = terms(scale q_i . k_j)
    lse_i = log(sum_j exp(s_ij))
    o_i = sum_j exp(s_ij - lse_i) v_j

q is (B, H, M, Dk), k (B, Hkv, N, Dk), v (B, Hkv, N, Dv), o (B, H, M, Dv), lse (B, H, M) in float32;
query head h uses the key head h // (H // Hkv). A query without keys gets o = 0 and lse = -inf.
Sinks (H,) are one more score for each query, without a value: lse_i = log(exp(sink) + sum_j ...).
Dropout takes weights exp(s_ij - lse_i) to zero or divides them by 1 - p; lse has all of them.
Packed sequences lie one after another along M and N, with B = 1 in memory, and their cumulative
lengths say where each begins.

Scores, sums and o are accumulated in float32 (float64 for float64). A program owns a tile of
queries and goes over the keys once, with the running maximum and sum of each query, all to base 2.
Blocks of keys that no query of the tile may see are left out; those that all of them see come
without masks; masks are evaluated in the blocks between, and where a sequence ends.
"""

import functools

import torch
import triton
import triton.language as tl

from ..common import accumulator_dtype, divisible
from ..config import cdiv, target_of
from ..launch import launchable
from .composition import (
    FULL,
    INTEGERS,
    LN2,
    LOG2E,
    composed_keep,
    composed_range,
    composed_score,
    has_part,
    scaled,
    three_parts,
    with_integers,
)
from .config import attention_forward_config
from .launch import Rule, like_queries, prepared, statistics_like, unit_last_stride
from .lists import listed_key, listed_keys
from .tiles import (
    add_product,
    base_of,
    dot_of_rows,
    dropout_factor,
    dropout_of,
    load_tile,
    scaled_tile,
    sequence,
    statistics_of,
    store_tile,
    zero_tile,
)


@triton.jit
def attend(
    state,
    first_block,
    end_block,
    # the tile and its place
    q,
    offs_m,
    place,
    first_n,
    end_n,
    # keys and values
    k_base,
    v_base,
    stride_kn,
    stride_vn,
    scale,
    dropout,
    score_args,
    mask_args,
    # flags
    MASKED: tl.constexpr,
    SCORES: tl.constexpr,
    SCORES_HIDE: tl.constexpr,
    KEEPS: tl.constexpr,
    SCATTERED: tl.constexpr,
    LISTED: tl.constexpr,
    SCALE: tl.constexpr,
    FOLDED: tl.constexpr,
    WIDE: tl.constexpr,
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
    """The state (o, maximum, sum) after the keys from first_block to end_block.

    These are positions in the mask's list where blocks are LISTED. first_n and end_n bound the keys
    that any query of the tile may see. The maximum is to base 2 where scores are FOLDED, which then
    have not been scaled yet.
    """
    acc, row_max, row_sum = state
    ACC: tl.constexpr = row_max.dtype
    offs_block = tl.arange(0, BLOCK_N)
    rows = offs_block.to(tl.int64) if WIDE else offs_block
    for position in range(first_block, end_block, BLOCK_N if LISTED is None else 1):
        start_n = position
        if LISTED is not None:
            start_n = listed_key(position, place, mask_args[LISTED], BLOCK_N)
        n = (start_n + offs_block)[None, :]  # (1, BLOCK_N)
        at = (place[0], place[1], place[2], place[3], place[4], start_n)
        seen = None
        if MASKED:
            # Keys that no query of the tile sees are loaded as zero: 0 times NaN would be NaN.
            seen = (start_n + offs_block >= first_n) & (start_n + offs_block < end_n)
            keep = composed_keep(seen[None, :], offs_m[:, None], n, at, mask_args, KEEPS)
            if SCATTERED:
                keep = tl.broadcast_to(keep, (BLOCK_M, BLOCK_N))
                seen = tl.max(keep.to(tl.int32), 0) > 0
        k = load_tile(
            k_base + start_n * stride_kn.to(tl.int64), rows, stride_kn, seen, DK_WIDTH, DK_TAIL, DK
        )
        score = dot_of_rows(q, k, DK_TAIL, ACC, PRECISION)  # (BLOCK_M, BLOCK_N)
        if not FOLDED:
            score = scaled(score, scale, SCALE)
            score, _ = composed_score(score, offs_m[:, None], n, at, score_args, SCORES)
        if MASKED:
            score = tl.where(keep, score, float("-inf"))
        largest = tl.max(score, 1)  # (BLOCK_M,)
        if FOLDED:
            largest *= scale * LOG2E
        new_max = tl.maximum(row_max, largest)
        shift = new_max
        if MASKED or SCORES_HIDE:
            # Without any key so far: every weight is 0, where -inf - -inf would be NaN.
            shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        if FOLDED:
            weights = tl.exp2(score * (scale * LOG2E) - shift[:, None])
            rescale = tl.exp2(row_max - shift)
        else:
            weights = tl.exp2((score - shift[:, None]) * LOG2E)
            rescale = tl.exp2((row_max - shift) * LOG2E)
        row_sum = row_sum * rescale + tl.sum(weights, 1)
        v = load_tile(
            v_base + start_n * stride_vn.to(tl.int64), rows, stride_vn, seen, DV_WIDTH, DV_TAIL, DV
        )
        acc = scaled_tile(acc, rescale[:, None], DV_TAIL)
        if len(dropout) > 0:
            weights *= dropout_factor(dropout, offs_m, start_n, BLOCK_M, BLOCK_N)
        acc = add_product(acc, weights, v, DV_TAIL, PRECISION)
        row_max = new_max
    return acc, row_max, row_sum


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
    "stride_ob",
    "stride_oh",
    "stride_om",
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
def attention_forward_kernel(
    # tensors
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    lse_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    sinks_ptr,
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
    stride_ob,
    stride_oh,
    stride_om,
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
    SCORES_HIDE: tl.constexpr,
    KEEPS: tl.constexpr,
    KEY_RANGES: tl.constexpr,
    MASK_BOUNDS: tl.constexpr,
    SCATTERED: tl.constexpr,
    LISTED: tl.constexpr,
    HIDES_FIRST: tl.constexpr,
    HIDES_LAST: tl.constexpr,
    SCALE: tl.constexpr,
    FOLDED: tl.constexpr,
    WIDE: tl.constexpr,
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
    """One program a tile of BLOCK_M queries of one head.

    `pairs` is the number of batch elements times that of heads. Heads that share keys are
    neighbours in the grid, and where earlier queries see fewer keys the last tiles come first.
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
    stride_om = divisible(stride_om, DIVISOR)

    program = tl.program_id(0)
    batch = program % pairs // HEADS
    head = program % pairs % HEADS
    block = program // pairs
    if HIDES_LAST:
        block = tl.num_programs(0) // pairs - 1 - block
    element, first_query, queries = sequence(cu_seqlens_q_ptr, batch, queries)
    _, first_key, keys = sequence(cu_seqlens_k_ptr, batch, keys)
    start_m = block * BLOCK_M
    # Packed sequences differ in length, and the grid is made for the longest.
    if start_m >= queries:
        return

    offs_block = tl.arange(0, BLOCK_M)
    rows = offs_block.to(tl.int64) if WIDE else offs_block
    offs_m = start_m + offs_block  # (BLOCK_M,)
    inside = offs_m < queries
    q_base = base_of(
        q_ptr, element, head, first_query + start_m, stride_qb, stride_qh, stride_qm, DIVISOR
    )
    k_base = base_of(
        k_ptr, element, head // GROUP, first_key, stride_kb, stride_kh, stride_kn, DIVISOR
    )
    v_base = base_of(
        v_ptr, element, head // GROUP, first_key, stride_vb, stride_vh, stride_vn, DIVISOR
    )
    q = load_tile(q_base, rows, stride_qm, inside, DK_WIDTH, DK_TAIL, DK)

    place = (batch, head, queries, keys, start_m, 0)
    last_m = tl.minimum(start_m + BLOCK_M, queries) - 1
    first_n, end_n, full_first, full_end = composed_range(
        start_m, last_m, keys, place, mask_args, KEY_RANGES, BLOCK_N
    )
    bounds = three_parts(first_n, end_n, full_first, full_end, BLOCK_N)
    if LISTED is not None:
        first, end = listed_keys(first_n, end_n, place, mask_args[LISTED], BLOCK_N)
        bounds = (first, first, first, end)
    row_max = tl.full((BLOCK_M,), float("-inf"), ACC)
    row_sum = tl.zeros((BLOCK_M,), ACC)
    if sinks_ptr is not None:
        # A sink begins the sum. One of -inf is none.
        sink = tl.load(sinks_ptr + head).to(ACC)
        row_max = tl.full((BLOCK_M,), 0.0, ACC) + (sink * LOG2E if FOLDED else sink)
        row_sum += tl.where(sink == float("-inf"), 0.0, 1.0)
    state = (zero_tile(BLOCK_M, DV_WIDTH, DV_TAIL, ACC), row_max, row_sum)
    dropout = ()
    if seed_ptr is not None:
        dropout = dropout_of(seed_ptr, batch * HEADS + head, max_queries, dropout_threshold, ACC)
    for part in tl.static_range(3):
        if has_part(part, HIDES_FIRST, SCATTERED, LISTED):
            state = attend(
                state,
                bounds[part],
                bounds[part + 1],
                q,
                offs_m,
                place,
                first_n,
                end_n,
                k_base,
                v_base,
                stride_kn,
                stride_vn,
                scale,
                dropout,
                score_args,
                mask_args,
                part != FULL,
                SCORES,
                SCORES_HIDE,
                KEEPS,
                SCATTERED,
                LISTED,
                SCALE,
                FOLDED,
                WIDE,
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
    acc, row_max, row_sum = state

    empty = row_sum == 0.0
    acc = scaled_tile(acc, (1.0 / tl.where(empty, 1.0, row_sum))[:, None], DV_TAIL)
    log_sum = tl.log(tl.where(empty, 1.0, row_sum))
    lse = (row_max * LN2 if FOLDED else row_max) + log_sum
    lse = tl.where(empty, float("-inf"), lse)
    o_base = base_of(
        o_ptr, element, head, first_query + start_m, stride_ob, stride_oh, stride_om, DIVISOR
    )
    store_tile(o_base, rows, stride_om, inside, acc, DV_WIDTH, DV_TAIL, DV)
    tl.store(
        statistics_of(lse_ptr, element, head, first_query + start_m, stride_lb, stride_lh)
        + offs_block,
        lse,
        inside,
    )


def attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    sinks: torch.Tensor | None,
    seed: torch.Tensor | None,
    tensors: list[torch.Tensor],
    max_seqlen_q: int,
    scale: float,
    dropout_p: float,
    precision: str,
    terms: str,
    floats: list[float],
    integers: list[int],
    batch_invariant: bool = False,
    rule: Rule = attention_forward_config,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the forward: (o, lse).

    With cumulative lengths the batch is 1 and queries and keys are packed. `terms` describes the
    terms as `compose` takes them, in the order of `tensors`, `floats` and `integers`. There is a
    seed where there is dropout. `batch_invariant` takes the same tiles for all terms, because a
    batch may ask for a mask that one of its sequences needs not. `rule` gives the configuration.
    """
    batch, heads, queries, _ = q.shape
    o = like_queries(q, v.shape[3], cu_seqlens_q)
    lse = statistics_like(q)
    if lse.numel() == 0:
        return o, lse
    if cu_seqlens_q is not None:
        lse.fill_(float("-inf"))

    q, k, v = unit_last_stride(q), unit_last_stride(k), unit_last_stride(v)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *o.stride()[:3])
    launch, config = prepared(
        attention_forward_kernel,
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
        sinks=sinks,
        seed=seed,
        dropout_p=dropout_p,
        max_queries=max_seqlen_q,
        batch_invariant=batch_invariant,
    )
    pairs = heads * (batch if cu_seqlens_q is None else cu_seqlens_q.numel() - 1)
    blocks = cdiv(queries if cu_seqlens_q is None else min(max_seqlen_q, queries), config.block_m)
    launch(
        (pairs * blocks, 1, 1),
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
        o_ptr=o,
        lse_ptr=lse,
        cu_seqlens_q_ptr=cu_seqlens_q,
        cu_seqlens_k_ptr=cu_seqlens_k,
        strides=strides,
        stride_lb=heads * queries,
        stride_lh=queries,
        pairs=pairs,
        queries=queries,
        keys=k.shape[2],
        scale=scale,
    )
    return o, lse
