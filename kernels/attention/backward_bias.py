"""The gradient of a bias: one program a tile of it. See attention_backward.py.

A bias (B or 1, H or 1, M or 1, N or 1) is added to the scores of all that it is broadcast to, and
its gradient is the sum of theirs. A program owns a tile of the bias and goes over the batch
elements, heads, queries and keys that share it: no atomics, and no memory but the gradient's own.
Where tiles are too few to fill a device, several programs share one, each with its part of the
batch elements and heads, and their results are summed in a fixed order.
"""

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
    with_integers,
)
from .config import attention_bias_backward_config
from .launch import prepared
from .lists import listed_key, listed_keys
from .score_gradient import score_gradient
from .tiles import (
    base_of,
    dropout_of,
    held_tile,
    load_log_sum,
    load_tile,
    sequence,
    statistics_of,
)

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
)


@functools.partial(launchable, strides=STRIDES)
@triton.jit(
    do_not_specialize=[
        *STRIDES,
        "stride_lb",
        "stride_lh",
        "batches",
        "queries",
        "keys",
        "max_queries",
        "max_keys",
        "tiles",
        "pairs_of_split",
        *INTEGERS,
    ]
)
def attention_bias_backward_kernel(
    # tensors
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    dbias_ptr,
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
    stride_lb,
    stride_lh,
    # sizes
    batches,
    queries,
    keys,
    max_queries,
    max_keys,
    tiles,
    pairs_of_split,
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
    TERM: tl.constexpr,
    OWN_B: tl.constexpr,
    OWN_H: tl.constexpr,
    OWN_M: tl.constexpr,
    OWN_N: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SOURCES: tl.constexpr,
    SCORES: tl.constexpr,
    SCORE_BOUNDS: tl.constexpr,
    SCORES_BACKWARD: tl.constexpr,
    PARAMETERS_BACKWARD: tl.constexpr,
    KEEPS: tl.constexpr,
    KEY_RANGES: tl.constexpr,
    MASK_BOUNDS: tl.constexpr,
    SCATTERED: tl.constexpr,
    LISTED: tl.constexpr,
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
    """One program a tile of the bias and a part of the batch elements and heads that share it.

    OWN_B to OWN_N say along which dimensions the bias has more than one number. `batches` counts
    batch elements or packed sequences, max_queries and max_keys are the sizes of a bias that owns
    queries and keys, `tiles` the tiles of the whole bias, and pairs_of_split the batch elements
    and heads of a program.
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

    # The tile: its batch element, head, queries and keys, 0 where it serves all of them.
    tile = tl.program_id(0) % tiles
    split = tl.program_id(0) // tiles
    blocks_m = tl.cdiv(max_queries, BLOCK_M) if OWN_M else 1
    blocks_n = tl.cdiv(max_keys, BLOCK_N) if OWN_N else 1
    own_heads = HEADS if OWN_H else 1
    start_n = tile % blocks_n * BLOCK_N
    start_m = tile // blocks_n % blocks_m * BLOCK_M
    own_head = tile // (blocks_n * blocks_m) % own_heads
    own_batch = tile // (blocks_n * blocks_m) // own_heads
    shared_heads = 1 if OWN_H else HEADS
    shared_pairs = shared_heads if OWN_B else shared_heads * batches

    offs_block = tl.arange(0, BLOCK_M)
    rows = offs_block.to(tl.int64) if WIDE else offs_block
    key_block = tl.arange(0, BLOCK_N)
    key_rows = key_block.to(tl.int64) if WIDE else key_block
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    first_pair = split * pairs_of_split
    for pair in range(first_pair, tl.minimum(first_pair + pairs_of_split, shared_pairs)):
        batch = own_batch + pair // shared_heads
        head = own_head + pair % shared_heads
        element, first_query, own_queries = sequence(cu_seqlens_q_ptr, batch, queries)
        _element, first_key, own_keys = sequence(cu_seqlens_k_ptr, batch, keys)
        k_base = base_of(
            k_ptr, element, head // GROUP, first_key, stride_kb, stride_kh, stride_kn, DIVISOR
        )
        v_base = base_of(
            v_ptr, element, head // GROUP, first_key, stride_vb, stride_vh, stride_vn, DIVISOR
        )
        dropout = ()
        if seed_ptr is not None:
            dropout = dropout_of(
                seed_ptr, batch * HEADS + head, max_queries, dropout_threshold, ACC
            )
        # A tile that owns queries has these alone; of keys, see below.
        end_m = tl.minimum(start_m + 1, own_queries) if OWN_M else own_queries
        for block_m in range(start_m, end_m, BLOCK_M):
            offs_m = block_m + offs_block  # (BLOCK_M,)
            inside = offs_m < own_queries
            row = first_query + block_m
            q_base = base_of(q_ptr, element, head, row, stride_qb, stride_qh, stride_qm, DIVISOR)
            do_base = base_of(
                do_ptr, element, head, row, stride_dob, stride_doh, stride_dom, DIVISOR
            )
            lse_base = statistics_of(lse_ptr, element, head, row, stride_lb, stride_lh)
            delta_base = statistics_of(delta_ptr, element, head, row, stride_lb, stride_lh)
            q = held_tile(q_base, rows, stride_qm, inside, DK_WIDTH, DK_TAIL, DK, RELOADS)
            do = held_tile(do_base, rows, stride_dom, inside, DV_WIDTH, DV_TAIL, DV, RELOADS)
            lse = load_log_sum(lse_base + offs_block, inside)
            delta = tl.load(delta_base + offs_block, inside, other=0.0)

            place = (batch, head, own_queries, own_keys, block_m, 0)
            last_m = tl.minimum(block_m + BLOCK_M, own_queries) - 1
            first_n, end_n, _full, _full_end = composed_range(
                block_m, last_m, own_keys, place, mask_args, KEY_RANGES, BLOCK_N
            )
            first = tl.maximum(first_n // BLOCK_N * BLOCK_N, start_n)
            end = tl.minimum(end_n, start_n + 1) if OWN_N else end_n
            if LISTED is not None:
                first, end = listed_keys(first, end, place, mask_args[LISTED], BLOCK_N)
            for position in range(first, end, BLOCK_N if LISTED is None else 1):
                block_n = position
                if LISTED is not None:
                    block_n = listed_key(position, place, mask_args[LISTED], BLOCK_N)
                offs_n = block_n + key_block
                at = (batch, head, own_queries, own_keys, block_m, block_n)
                # As in the other kernels, what nobody sees is loaded as zero.
                seen = (offs_n >= first_n) & (offs_n < end_n)
                keep = composed_keep(
                    seen[None, :], offs_m[:, None], offs_n[None, :], at, mask_args, KEEPS
                )
                keep = tl.broadcast_to(keep & inside[:, None], (BLOCK_M, BLOCK_N))
                if SCATTERED:
                    seen = tl.max(keep.to(tl.int32), 0) > 0
                k = load_tile(
                    k_base + block_n * stride_kn.to(tl.int64),
                    key_rows,
                    stride_kn,
                    seen,
                    DK_WIDTH,
                    DK_TAIL,
                    DK,
                )
                v = held_tile(
                    v_base + block_n * stride_vn.to(tl.int64),
                    key_rows,
                    stride_vn,
                    seen,
                    DV_WIDTH,
                    DV_TAIL,
                    DV,
                    RELOADS,
                )
                _dscore, after, given = score_gradient(
                    q,
                    k,
                    v,
                    do,
                    lse,
                    delta,
                    offs_m,
                    offs_n[None, :],
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
                added = PARAMETERS_BACKWARD[TERM](
                    after[len(SCORES) - 1 - TERM],
                    given[TERM],
                    offs_m[:, None],
                    offs_n[None, :],
                    at,
                    score_args[TERM],
                )
                acc += tl.where(keep, added, 0.0)

    size_m = max_queries if OWN_M else 1
    size_n = max_keys if OWN_N else 1
    own_batches = batches if OWN_B else 1
    matrix = (split * own_batches + own_batch).to(tl.int64) * own_heads + own_head
    base = dbias_ptr + matrix * size_m * size_n
    out_m = start_m + offs_block
    out_n = start_n + key_block
    if OWN_M and OWN_N:
        pointers = base + out_m[:, None].to(tl.int64) * size_n + out_n[None, :]
        stored = (out_m < size_m)[:, None] & (out_n < size_n)[None, :]
        tl.store(pointers, acc.to(dbias_ptr.dtype.element_ty), stored)
    elif OWN_M:
        tl.store(base + out_m, tl.sum(acc, 1).to(dbias_ptr.dtype.element_ty), out_m < size_m)
    elif OWN_N:
        tl.store(base + out_n, tl.sum(acc, 0).to(dbias_ptr.dtype.element_ty), out_n < size_n)
    else:
        tl.store(base, tl.sum(tl.sum(acc, 1), 0).to(dbias_ptr.dtype.element_ty))


PROGRAMS_OF_MULTIPROCESSOR = 4
"""How many programs shall at least share a multiprocessor before several share a tile."""


def bias_backward(
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
    term: int,
    place: int,
) -> torch.Tensor:
    """Launch the gradient of a score term's bias, of the shape and dtype of tensors[place].

    `term` is the term's place among the score terms.
    """
    bias = tensors[place]
    batch, heads, queries, _ = q.shape
    batches = batch if cu_seqlens_q is None else cu_seqlens_q.numel() - 1
    own_b, own_h, own_m, own_n = (size > 1 for size in bias.shape)
    strides = tuple(stride for x in (q, k, v, do) for stride in x.stride()[:3])
    target = target_of(q)
    launch, config = prepared(
        attention_bias_backward_kernel,
        attention_bias_backward_config,
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
        target,
        seed=seed,
        dropout_p=dropout_p,
        batch_invariant=batch_invariant,
        max_queries=max_seqlen_q,
    )
    tiles = bias.shape[0] * bias.shape[1]
    tiles *= cdiv(bias.shape[2], config.block_m) * cdiv(bias.shape[3], config.block_n)
    pairs = (1 if own_b else batches) * (1 if own_h else heads)
    wanted = cdiv(PROGRAMS_OF_MULTIPROCESSOR * target.multiprocessors, tiles)
    pairs_of_split = cdiv(pairs, min(pairs, wanted))
    splits = cdiv(pairs, pairs_of_split)
    # One program's sum is the result itself.
    dtype = bias.dtype if splits == 1 else lse.dtype
    dbias = bias.new_empty((splits, *bias.shape), dtype=dtype)
    launch(
        (tiles * splits,),
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
        do_ptr=do,
        lse_ptr=lse,
        delta_ptr=delta,
        dbias_ptr=dbias,
        cu_seqlens_q_ptr=cu_seqlens_q,
        cu_seqlens_k_ptr=cu_seqlens_k,
        max_queries=max_seqlen_q,
        strides=strides,
        stride_lb=heads * queries,
        stride_lh=queries,
        batches=batches,
        queries=queries,
        keys=k.shape[2],
        max_keys=max_seqlen_k,
        tiles=tiles,
        pairs_of_split=pairs_of_split,
        scale=scale,
        TERM=term,
        OWN_B=own_b,
        OWN_H=own_h,
        OWN_M=own_m,
        OWN_N=own_n,
    )
    return dbias[0] if splits == 1 else dbias.sum(0).to(bias.dtype)
