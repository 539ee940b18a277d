"""The gradient of a bias: one program a tile of it. See backward.py.

A bias (B or 1, H or 1, M or 1, N or 1) is added to the scores of all that it is broadcast to, and
its gradient is the sum of theirs. A program owns a tile of the bias and goes over the batch
elements, heads, queries and keys that share it: no atomics, and no memory but the gradient's own.
Where tiles are too few to fill a device, several programs share one, each with its part of the
batch elements and heads, and their results are summed in a fixed order.
"""

import torch
import triton
import triton.language as tl

from ..common import accumulator_dtype
from ..config import cdiv, find_target
from ..launch import launchable
from ..structures import make_odd, restore_odd
from .config import attention_bias_backward_config
from .launch import Call, Gradient
from .lists import find_listed_key, find_listed_keys
from .places import move_to_key, move_to_query
from .plan import prepare
from .prologue import locate
from .ranges import find_keys
from .score_gradient import compute_score_gradient
from .structures import Bias, BiasTile, GradientTile
from .terms import apply_masks, part_arguments
from .tiles import hold_rows, load_prepared, load_rows, prepare_dropout, skip_rows
from .views import BiasView, DropoutView, HeadsView, SequencesView, find_rows, find_statistics


@triton.jit
def locate_tile(view, tiles, BIAS: tl.constexpr, HEADS: tl.constexpr, CUT: tl.constexpr):
    """A program's tile of the bias, and how many batch elements and heads share it."""
    tile = tl.program_id(0) % tiles
    blocks_m = tl.cdiv(restore_odd(view.queries), CUT.block_m) if BIAS.own_m else 1
    blocks_n = tl.cdiv(restore_odd(view.keys), CUT.block_n) if BIAS.own_n else 1
    own_heads = HEADS.count if BIAS.own_h else 1
    shared_heads = 1 if BIAS.own_h else HEADS.count
    return BiasTile(
        tl.program_id(0) // tiles,
        tile // (blocks_n * blocks_m) // own_heads,
        tile // (blocks_n * blocks_m) % own_heads,
        tile // blocks_n % blocks_m * CUT.block_m,
        tile % blocks_n * CUT.block_n,
        shared_heads,
        shared_heads * restore_odd(view.shared),
    )


@triton.jit
def find_batch(view, tile, number):
    """The batch element that shares a tile, by its number among these."""
    repeat = restore_odd(view.repeat)
    turn = number // repeat * restore_odd(view.matrices) + tile.batch
    return turn * repeat + number % repeat


@triton.jit
def add_keys(
    acc,
    start_n,
    tile,
    own_place,
    k_rows,
    v_rows,
    args,
    scale,
    dropout,
    inside,
    BIAS: tl.constexpr,
    TERMS: tl.constexpr,
    HEADS: tl.constexpr,
    CUT: tl.constexpr,
):
    """The gradient of a tile of the bias with what the scores of a tile of queries add.

    That are their scores with the keys of the tile, or with all keys where these share the bias.
    """
    DK: tl.constexpr = HEADS.k
    DV: tl.constexpr = HEADS.v
    offs_block = tl.arange(0, CUT.block_n)
    m = tile.offs_m[:, None]
    seen = find_keys(own_place, args, TERMS, CUT)
    first = tl.maximum(seen.first // CUT.block_n * CUT.block_n, start_n)
    end = tl.minimum(seen.end, start_n + 1) if BIAS.own_n else seen.end
    if TERMS.lists is not None:
        first, end = find_listed_keys(first, end, own_place, args.lists, CUT.block_n)
    for position in range(first, end, CUT.block_n if TERMS.lists is None else 1):
        block_n = position
        if TERMS.lists is not None:
            block_n = find_listed_key(position, own_place, args.lists, CUT.block_n)
        offs_n = block_n + offs_block
        n = offs_n[None, :]
        place = move_to_key(own_place, block_n)
        # As in the other kernels, what nobody sees is loaded as zero.
        exists = (offs_n >= seen.first) & (offs_n < seen.end)
        keep = apply_masks(exists[None, :], m, n, place, args.masks, TERMS)
        keep = tl.broadcast_to(keep & inside[:, None], (CUT.block_m, CUT.block_n))
        if TERMS.scattered:
            exists = tl.max(keep.to(tl.int32), 0) > 0
        k = load_rows(skip_rows(k_rows, block_n), exists, DK, CUT.block_n, CUT.wide)
        v = hold_rows(skip_rows(v_rows, block_n), exists, DV, CUT.block_n, CUT)
        gradient = compute_score_gradient(
            tile, k, v, n, place, args, scale, dropout, TERMS, HEADS, CUT
        )
        added = TERMS.parameters_backward[BIAS.learner](
            gradient.after[len(TERMS.scores) - 1 - TERMS.learners[BIAS.learner]],
            gradient.given[TERMS.learners[BIAS.learner]],
            m,
            n,
            place,
            args.scores[TERMS.learners[BIAS.learner]],
        )
        acc += tl.where(keep, added, 0.0)
    return acc


@launchable
@triton.jit(do_not_specialize=["tiles", "pairs_of_split"])
def attention_bias_backward_kernel(
    q_view: HeadsView,
    k_view: HeadsView,
    v_view: HeadsView,
    do_view: HeadsView,
    dbias_view: BiasView,
    log_sums_ptr,
    delta_ptr,
    queries_view: SequencesView,
    keys_view: SequencesView,
    dropout_view: DropoutView,
    terms_args,
    tiles,
    pairs_of_split,
    scale,
    BIAS: tl.constexpr,
    TERMS: tl.constexpr,
    HEADS: tl.constexpr,
    CUT: tl.constexpr,
):
    """One program a tile of the bias and a part of the batch elements and heads that share it.

    `tiles` counts those of the whole bias, pairs_of_split the batch elements and heads of a
    program.
    """
    DK: tl.constexpr = HEADS.k
    DV: tl.constexpr = HEADS.v
    ACC: tl.constexpr = accumulator_dtype(log_sums_ptr)
    BLOCK_M: tl.constexpr = CUT.block_m
    BLOCK_N: tl.constexpr = CUT.block_n
    args = part_arguments(terms_args, TERMS)
    own = locate_tile(dbias_view, tiles, BIAS, HEADS, CUT)
    offs_block = tl.arange(0, BLOCK_M)
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    first_pair = own.split * pairs_of_split
    for pair in range(first_pair, tl.minimum(first_pair + pairs_of_split, own.shared_pairs)):
        batch = find_batch(dbias_view, own, pair // own.shared_heads)
        head = own.head + pair % own.shared_heads
        key_head = head // HEADS.group
        pair_place, queries, keys = locate(
            batch, head, own.first_m, own.first_n, queries_view, keys_view
        )
        k = find_rows(k_view, keys.element, key_head, keys.first, CUT.divisor)
        v = find_rows(v_view, keys.element, key_head, keys.first, CUT.divisor)
        dropout = prepare_dropout(dropout_view, batch * HEADS.count + head, ACC)
        # A tile that owns queries has these alone; of keys, see `add_keys`.
        end_m = pair_place.queries
        if BIAS.own_m:
            end_m = tl.minimum(own.first_m + 1, pair_place.queries)
        for block_m in range(own.first_m, end_m, BLOCK_M):
            place = move_to_query(pair_place, block_m)
            offs_m = block_m + offs_block  # (BLOCK_M,)
            inside = offs_m < place.queries
            row = queries.first + block_m
            q = find_rows(q_view, queries.element, head, row, CUT.divisor)
            do = find_rows(do_view, queries.element, head, row, CUT.divisor)
            log_sums = find_statistics(log_sums_ptr, queries_view, queries, head, block_m, HEADS)
            deltas = find_statistics(delta_ptr, queries_view, queries, head, block_m, HEADS)
            log_sum, delta = load_prepared(
                log_sums + offs_block, deltas + offs_block, inside, HEADS.folded
            )
            tile = GradientTile(
                hold_rows(q, inside, DK, BLOCK_M, CUT),
                hold_rows(do, inside, DV, BLOCK_M, CUT),
                log_sum,
                delta,
                offs_m,
            )
            acc = add_keys(
                acc,
                own.first_n,
                tile,
                place,
                k,
                v,
                args,
                scale,
                dropout,
                inside,
                BIAS,
                TERMS,
                HEADS,
                CUT,
            )
    store_tile(dbias_view, own, acc, BIAS, HEADS, CUT)


@triton.jit
def store_tile(view, own, acc, BIAS: tl.constexpr, HEADS: tl.constexpr, CUT: tl.constexpr):
    """Store a program's tile of the bias, summed over what shares it."""
    size_m = restore_odd(view.queries) if BIAS.own_m else 1
    size_n = restore_odd(view.keys) if BIAS.own_n else 1
    own_heads = HEADS.count if BIAS.own_h else 1
    matrices = restore_odd(view.matrices)
    matrix = (own.split * matrices + own.batch).to(tl.int64) * own_heads + own.head
    base = view.pointer + matrix * size_m * size_n
    dtype: tl.constexpr = view.pointer.dtype.element_ty
    out_m = own.first_m + tl.arange(0, CUT.block_m)
    out_n = own.first_n + tl.arange(0, CUT.block_n)
    if BIAS.own_m and BIAS.own_n:
        pointers = base + out_m[:, None].to(tl.int64) * size_n + out_n[None, :]
        stored = (out_m < size_m)[:, None] & (out_n < size_n)[None, :]
        tl.store(pointers, acc.to(dtype), stored)
    elif BIAS.own_m:
        tl.store(base + out_m, tl.sum(acc, 1).to(dtype), out_m < size_m)
    elif BIAS.own_n:
        tl.store(base + out_n, tl.sum(acc, 0).to(dtype), out_n < size_n)
    else:
        tl.store(base, tl.sum(tl.sum(acc, 1), 0).to(dtype))


PROGRAMS_OF_MULTIPROCESSOR = 4
"""How many programs shall at least share a multiprocessor before several share a tile."""


def bias_backward(
    call: Call, gradient: Gradient, learner: int, bias: torch.Tensor, repeat: int
) -> torch.Tensor:
    """Launch the gradient of a score term's bias, of the bias's shape and dtype.

    `learner` is its place among the tensors that terms learn, `repeat` how many batch elements in a
    row share one of its matrices.
    """
    own = [size > 1 for size in bias.shape[1:]]
    shared = call.batches // bias.shape[0]
    plan, given = prepare(
        attention_bias_backward_kernel,
        attention_bias_backward_config,
        call,
        {"do_view": gradient.do},
    )
    tiles = bias.shape[0] * bias.shape[1]
    tiles *= cdiv(bias.shape[2], plan.config.block_m) * cdiv(bias.shape[3], plan.config.block_n)
    pairs = shared * (1 if own[0] else call.q.shape[1])
    wanted = cdiv(PROGRAMS_OF_MULTIPROCESSOR * find_target(call.q).multiprocessors, tiles)
    pairs_of_split = cdiv(pairs, min(pairs, wanted))
    splits = cdiv(pairs, pairs_of_split)
    # One program's sum is the result itself.
    dtype = bias.dtype if splits == 1 else gradient.delta.dtype
    dbias = bias.new_empty((splits, *bias.shape), dtype=dtype)
    sizes = (bias.shape[0], repeat, shared, call.max_seqlen_q, call.max_seqlen_k)
    plan.launch(
        (tiles * splits,),
        dbias_view=BiasView(dbias, *map(make_odd, sizes)),
        log_sums_ptr=gradient.log_sums,
        delta_ptr=gradient.delta,
        tiles=tiles,
        pairs_of_split=pairs_of_split,
        BIAS=Bias(learner, *own),
        **given,
    )
    return dbias[0] if splits == 1 else dbias.sum(0).to(bias.dtype)
