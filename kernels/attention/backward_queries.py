"""The gradient of queries: one program a tile of queries. See backward.py."""

import torch
import triton
import triton.language as tl

from ..common import accumulator_dtype
from ..launch import launchable
from .config import attention_queries_backward_config
from .hopper.backward_config import QUERIES, HopperBackwardRule, hopper_backward_config
from .hopper.launch_backward import find_backward, launch_queries_backward
from .launch import Call, Gradient, Rule, allocate_like
from .lists import find_listed_key
from .order import order_queries
from .parameters import add_to_sums, start_sums, store_sums
from .places import move_to_key
from .plan import prepare
from .prologue import locate_queries
from .ranges import FULL, find_keys, has_part, part_keys
from .score_gradient import compute_score_gradient
from .structures import GradientTile, QueryGradients
from .terms import apply_masks, part_arguments
from .tiles import (
    add_product,
    hold_rows,
    load_prepared,
    load_rows,
    make_zeros,
    prepare_dropout,
    scale_tile,
    skip_rows,
    store_rows,
)
from .views import DropoutView, HeadsView, SequencesView, find_rows, find_statistics


@triton.jit
def add_keys(
    state,
    first_block,
    end_block,
    tile,
    seen,
    own_place,
    k,
    v,
    args,
    scale,
    dropout,
    MASKED: tl.constexpr,
    TERMS: tl.constexpr,
    HEADS: tl.constexpr,
    CUT: tl.constexpr,
):
    """The gradients of a tile of queries with what the keys from first_block to end_block add.

    These are positions in the mask's list where blocks are listed. `seen` is the Range of the keys
    that any query of the tile may see.
    """
    DK: tl.constexpr = HEADS.k
    DV: tl.constexpr = HEADS.v
    dq, sums = state
    offs_block = tl.arange(0, CUT.block_n)
    m = tile.offs_m[:, None]
    k_rows, v_rows = k, v
    if TERMS.lists is None:
        k_rows, v_rows = skip_rows(k, first_block), skip_rows(v, first_block)
    for position in range(first_block, end_block, CUT.block_n if TERMS.lists is None else 1):
        start_n = position
        if TERMS.lists is not None:
            start_n = find_listed_key(position, own_place, args.lists, CUT.block_n)
            k_rows, v_rows = skip_rows(k, start_n), skip_rows(v, start_n)
        n = (start_n + offs_block)[None, :]
        place = move_to_key(own_place, start_n)
        exists = None
        keep = None
        if MASKED:
            # Keys that no query of the tile sees are loaded as zero: 0 times NaN would be NaN.
            exists = (start_n + offs_block >= seen.first) & (start_n + offs_block < seen.end)
            keep = apply_masks(exists[None, :], m, n, place, args.masks, TERMS)
            if TERMS.scattered:
                keep = tl.broadcast_to(keep, (CUT.block_m, CUT.block_n))
                exists = tl.max(keep.to(tl.int32), 0) > 0
        k_tile = load_rows(k_rows, exists, DK, CUT.block_n, CUT.wide)
        v_tile = hold_rows(v_rows, exists, DV, CUT.block_n, CUT)
        gradient = compute_score_gradient(
            tile, k_tile, v_tile, n, place, args, scale, dropout, TERMS, HEADS, CUT
        )
        sums = add_to_sums(sums, gradient, keep, m, n, place, args.scores, TERMS)
        dscore = gradient.dscore
        if MASKED:
            dscore = tl.where(keep, dscore, 0.0)
        dq = add_product(dq, dscore, k_tile, DK, CUT)
        if TERMS.lists is None:
            k_rows, v_rows = skip_rows(k_rows, CUT.block_n), skip_rows(v_rows, CUT.block_n)
    return QueryGradients(dq, sums)


@launchable
@triton.jit(do_not_specialize=["pairs", "pairs_of_group", "groups"])
def attention_queries_backward_kernel(
    q_view: HeadsView,
    k_view: HeadsView,
    v_view: HeadsView,
    do_view: HeadsView,
    dq_view: HeadsView,
    log_sums_ptr,
    delta_ptr,
    queries_view: SequencesView,
    keys_view: SequencesView,
    dropout_view: DropoutView,
    terms_args,
    sums_args,
    pairs,
    pairs_of_group,
    groups,
    scale,
    TERMS: tl.constexpr,
    HEADS: tl.constexpr,
    CUT: tl.constexpr,
):
    """One program a tile of queries of one head, in the order of the forward.

    It also sums the gradients of the terms' parameters, a row of them in `sums_args` for each
    program, (B, H, tiles, entries).
    """
    DK: tl.constexpr = HEADS.k
    DV: tl.constexpr = HEADS.v
    ACC: tl.constexpr = accumulator_dtype(log_sums_ptr)
    BLOCK_M: tl.constexpr = CUT.block_m
    args = part_arguments(terms_args, TERMS)
    place, queries, keys = locate_queries(
        queries_view, keys_view, pairs, pairs_of_group, groups, TERMS, HEADS, CUT
    )
    # Packed sequences differ in length, and the grid is made for the longest.
    if place.first_m >= place.queries:
        return
    if TERMS.scattered and keys_view.cumulative is None:
        # Launched for no empty tensor. Around a loop over all keys that might not run, NVIDIA's
        # assembler can let each product on the tensor core wait for the one before.
        tl.assume(place.keys > 0)

    offs_block = tl.arange(0, BLOCK_M)
    offs_m = place.first_m + offs_block  # (BLOCK_M,)
    inside = offs_m < place.queries
    row = queries.first + place.first_m
    key_head = place.head // HEADS.group
    q = find_rows(q_view, queries.element, place.head, row, CUT.divisor)
    k = find_rows(k_view, keys.element, key_head, keys.first, CUT.divisor)
    v = find_rows(v_view, keys.element, key_head, keys.first, CUT.divisor)
    do = find_rows(do_view, queries.element, place.head, row, CUT.divisor)
    log_sums = find_statistics(
        log_sums_ptr, queries_view, queries, place.head, place.first_m, HEADS
    )
    deltas = find_statistics(delta_ptr, queries_view, queries, place.head, place.first_m, HEADS)
    do_tile = hold_rows(do, inside, DV, BLOCK_M, CUT)
    log_sum, delta = load_prepared(log_sums + offs_block, deltas + offs_block, inside, HEADS.folded)
    q_tile = hold_rows(q, inside, DK, BLOCK_M, CUT)
    tile = GradientTile(q_tile, do_tile, log_sum, delta, offs_m)

    seen = find_keys(place, args, TERMS, CUT)
    bounds = part_keys(seen, place, args, TERMS, CUT)
    pair = place.batch * HEADS.count + place.head
    dropout = prepare_dropout(dropout_view, pair, ACC)
    state = QueryGradients(make_zeros(BLOCK_M, DK, ACC), start_sums(TERMS, BLOCK_M, ACC))
    for part in tl.static_range(3):
        if has_part(part, TERMS.hides_first, TERMS.scattered, TERMS.lists is not None):
            state = add_keys(
                state,
                bounds[part],
                bounds[part + 1],
                tile,
                seen,
                place,
                k,
                v,
                args,
                scale,
                dropout,
                part != FULL,
                TERMS,
                HEADS,
                CUT,
            )

    dq, sums = state
    tiles = tl.num_programs(0) // pairs
    store_sums(sums_args, sums, pair * tiles + place.first_m // BLOCK_M, TERMS)
    if HEADS.scale is not None:
        dq = scale_tile(dq, HEADS.scale, DK)
    else:
        dq = scale_tile(dq, scale, DK)
    dq_rows = find_rows(dq_view, queries.element, place.head, row, CUT.divisor)
    store_rows(dq_rows, inside, dq, DK, BLOCK_M, CUT.wide)


def queries_backward(
    call: Call,
    gradient: Gradient,
    entries: tuple[int, ...] = (),
    rule: Rule = attention_queries_backward_config,
    hopper_rule: HopperBackwardRule = hopper_backward_config,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Launch the gradients of q and of the terms' parameters.

    `rule` gives the configuration, `hopper_rule` that of the kernel which hopper/ has for sm_90.

    Returns:
        dq, and for each tensor that terms learn and that has `entries` its gradient
        (B, H, entries), not yet summed over what the tensor is the same for.
    """
    hopper = find_backward(QUERIES, call, gradient, hopper_rule)
    if hopper is not None:
        # No term that it carries has parameters.
        return launch_queries_backward(call, gradient, hopper), []
    q, heads = call.q, call.q.shape[1]
    dq = allocate_like(q, q.shape[3], call.cu_seqlens_q)
    others = {"do_view": gradient.do, "dq_view": dq}
    plan, given = prepare(
        attention_queries_backward_kernel, rule, call, others, order_queries, entries=entries
    )
    given["log_sums_ptr"], given["delta_ptr"] = gradient.log_sums, gradient.delta
    if not any(entries):
        plan.launch(plan.grid, **given)
        return dq, []
    # Programs beyond the end of a packed sequence store nothing.
    make = q.new_empty if call.cu_seqlens_q is None else q.new_zeros
    pairs = given["pairs"]
    sums = [
        make((pairs, plan.grid[0] // pairs, count) if count else (1,), dtype=gradient.delta.dtype)
        for count in entries
    ]
    plan.launch(plan.grid, sums_args=tuple(sums), **given)
    return dq, [
        rows.sum(1).view(-1, heads, count)
        for rows, count in zip(sums, entries, strict=True)
        if count
    ]
