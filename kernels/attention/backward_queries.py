"""The gradient of queries: one program a tile of queries. See attention_backward.py."""

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
    composed_keep,
    composed_range,
    has_part,
    three_parts,
    with_integers,
)
from .config import attention_queries_backward_config
from .launch import Rule, like_queries, prepared
from .lists import listed_key, listed_keys
from .parameters import gather_parameters, nothing_gathered, store_gathered
from .score_gradient import score_gradient
from .tiles import (
    add_product,
    base_of,
    dropout_of,
    held_tile,
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
    q,
    do,
    lse,
    delta,
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
    SCORES_BACKWARD: tl.constexpr,
    PARAMETERS_BACKWARD: tl.constexpr,
    INDICES: tl.constexpr,
    ENTRIES: tl.constexpr,
    KEEPS: tl.constexpr,
    SCATTERED: tl.constexpr,
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
    """The state (dq, gradients of the terms' parameters) after the keys from first_block to
    end_block, of which first_n to end_n are seen. Positions in a list where blocks are LISTED."""
    dq, gathered = state
    offs_block = tl.arange(0, BLOCK_N)
    rows = offs_block.to(tl.int64) if WIDE else offs_block
    for position in range(first_block, end_block, BLOCK_N if LISTED is None else 1):
        start_n = position
        if LISTED is not None:
            start_n = listed_key(position, place, mask_args[LISTED], BLOCK_N)
        m = offs_m[:, None]
        n = (start_n + offs_block)[None, :]
        at = (place[0], place[1], place[2], place[3], place[4], start_n)
        seen = None
        keep = None
        if MASKED:
            # Keys that no query of the tile sees are loaded as zero: 0 times NaN would be NaN.
            seen = (start_n + offs_block >= first_n) & (start_n + offs_block < end_n)
            keep = composed_keep(seen[None, :], m, n, at, mask_args, KEEPS)
            if SCATTERED:
                keep = tl.broadcast_to(keep, (BLOCK_M, BLOCK_N))
                seen = tl.max(keep.to(tl.int32), 0) > 0
        k = load_tile(
            k_base + start_n * stride_kn.to(tl.int64), rows, stride_kn, seen, DK_WIDTH, DK_TAIL, DK
        )
        v = held_tile(
            v_base + start_n * stride_vn.to(tl.int64),
            rows,
            stride_vn,
            seen,
            DV_WIDTH,
            DV_TAIL,
            DV,
            RELOADS,
        )
        dscore, after, given = score_gradient(
            q,
            k,
            v,
            do,
            lse,
            delta,
            offs_m,
            n,
            at,
            scale,
            dropout,
            score_args,
            SCORES,
            SCORES_BACKWARD,
            SCALE,
            FOLDED,
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
        gathered = gather_parameters(
            gathered,
            after,
            given,
            keep,
            m,
            n,
            at,
            score_args,
            ENTRIES,
            PARAMETERS_BACKWARD,
            INDICES,
        )
        if MASKED:
            dscore = tl.where(keep, dscore, 0.0)
        dq = add_product(dq, dscore, k, DK_TAIL, PRECISION)
    return dq, gathered


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
    "stride_dqb",
    "stride_dqh",
    "stride_dqm",
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
def attention_queries_backward_kernel(
    # tensors
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    seed_ptr,
    score_args,
    mask_args,
    gathered_args,
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
    stride_dqb,
    stride_dqh,
    stride_dqm,
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
    PARAMETERS_BACKWARD: tl.constexpr,
    INDICES: tl.constexpr,
    ENTRIES: tl.constexpr,
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
    """One program a tile of BLOCK_M queries of one head, in the order of the forward.

    It also gathers the gradients of the terms' parameters, a row of them in `gathered_args` for
    each program, (B, H, tiles, entries).
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
    stride_dqm = divisible(stride_dqm, DIVISOR)

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
    row = first_query + start_m
    q_base = base_of(q_ptr, element, head, row, stride_qb, stride_qh, stride_qm, DIVISOR)
    k_base = base_of(
        k_ptr, element, head // GROUP, first_key, stride_kb, stride_kh, stride_kn, DIVISOR
    )
    v_base = base_of(
        v_ptr, element, head // GROUP, first_key, stride_vb, stride_vh, stride_vn, DIVISOR
    )
    do_base = base_of(do_ptr, element, head, row, stride_dob, stride_doh, stride_dom, DIVISOR)
    lse_base = statistics_of(lse_ptr, element, head, row, stride_lb, stride_lh)
    delta_base = statistics_of(delta_ptr, element, head, row, stride_lb, stride_lh)
    do = held_tile(do_base, rows, stride_dom, inside, DV_WIDTH, DV_TAIL, DV, RELOADS)
    lse = load_log_sum(lse_base + offs_block, inside)
    delta = tl.load(delta_base + offs_block, inside, other=0.0)
    q = held_tile(q_base, rows, stride_qm, inside, DK_WIDTH, DK_TAIL, DK, RELOADS)

    place = (batch, head, queries, keys, start_m, 0)
    last_m = tl.minimum(start_m + BLOCK_M, queries) - 1
    first_n, end_n, full_first, full_end = composed_range(
        start_m, last_m, keys, place, mask_args, KEY_RANGES, BLOCK_N
    )
    bounds = three_parts(first_n, end_n, full_first, full_end, BLOCK_N)
    if LISTED is not None:
        first, end = listed_keys(first_n, end_n, place, mask_args[LISTED], BLOCK_N)
        bounds = (first, first, first, end)
    dropout = ()
    if seed_ptr is not None:
        dropout = dropout_of(seed_ptr, batch * HEADS + head, max_queries, dropout_threshold, ACC)
    state = (
        zero_tile(BLOCK_M, DK_WIDTH, DK_TAIL, ACC),
        nothing_gathered(ENTRIES, INDICES, BLOCK_M, ACC),
    )
    for part in tl.static_range(3):
        if has_part(part, HIDES_FIRST, SCATTERED, LISTED):
            state = gather(
                state,
                bounds[part],
                bounds[part + 1],
                q,
                do,
                lse,
                delta,
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
                SCORES_BACKWARD,
                PARAMETERS_BACKWARD,
                INDICES,
                ENTRIES,
                KEEPS,
                SCATTERED,
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
    dq, gathered = state
    tiles = tl.num_programs(0) // pairs
    store_gathered(
        gathered_args, gathered, (batch * HEADS + head) * tiles + block, ENTRIES, INDICES
    )
    if SCALE is not None:
        dq = scaled_tile(dq, SCALE, DK_TAIL)
    else:
        dq = scaled_tile(dq, scale, DK_TAIL)
    dq_base = base_of(dq_ptr, element, head, row, stride_dqb, stride_dqh, stride_dqm, DIVISOR)
    store_tile(dq_base, rows, stride_dqm, inside, dq, DK_WIDTH, DK_TAIL, DK)


def queries_backward(
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
    scale: float,
    dropout_p: float,
    precision: str,
    terms: str,
    floats: list[float],
    integers: list[int],
    batch_invariant: bool,
    entries: tuple[int, ...],
    rule: Rule = attention_queries_backward_config,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Launch the gradients of q and of the terms' parameters.

    Returns:
        dq, and for each score term that has `entries` its parameter's gradient (B, H, entries), not
        yet summed over what the parameter is the same for.
    """
    batch, heads, queries, key_dim = q.shape
    dq = like_queries(q, key_dim, cu_seqlens_q)
    strides = tuple(stride for x in (q, k, v, do, dq) for stride in x.stride()[:3])
    launch, config = prepared(
        attention_queries_backward_kernel,
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
        entries=entries,
    )
    pairs = heads * (batch if cu_seqlens_q is None else cu_seqlens_q.numel() - 1)
    blocks = cdiv(queries if cu_seqlens_q is None else min(max_seqlen_q, queries), config.block_m)
    # Programs beyond the end of a packed sequence store nothing.
    make = q.new_empty if cu_seqlens_q is None else q.new_zeros
    gathered = [
        make((pairs, blocks, count) if count else (1,), dtype=lse.dtype) for count in entries
    ]
    if any(entries):
        launch = functools.partial(launch, gathered_args=tuple(gathered))
    launch(
        (pairs * blocks, 1, 1),
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
        do_ptr=do,
        lse_ptr=lse,
        delta_ptr=delta,
        dq_ptr=dq,
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
    sums = [
        rows.sum(1).view(-1, heads, count)
        for rows, count in zip(gathered, entries, strict=True)
        if count
    ]
    return dq, sums
