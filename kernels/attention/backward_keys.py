"""The gradients of keys and values: one program a tile of keys. See backward.py."""

import torch
import triton
import triton.language as tl

from ..common import accumulator_dtype
from ..launch import launchable
from .config import attention_keys_backward_config
from .hopper.backward_config import KEYS, HopperBackwardRule, hopper_backward_config
from .hopper.launch_backward import find_backward, launch_keys_backward
from .launch import Call, Gradient, Rule, allocate_like
from .lists import find_listed_queries, find_listed_query
from .order import order_keys
from .places import move_to_head, move_to_query
from .plan import prepare
from .prologue import locate_keys
from .ranges import find_queries
from .structures import KeyGradients, KeyTile, QueryRows
from .terms import (
    apply_masks,
    apply_scale,
    apply_scores,
    apply_scores_backward,
    part_arguments,
    weigh,
)
from .tiles import (
    add_product,
    compute_dropout,
    hold_rows,
    load_prepared,
    load_rows,
    make_zeros,
    multiply_rows,
    prepare_dropout,
    scale_tile,
    skip_rows,
    store_rows,
    take_rows,
)
from .views import DropoutView, HeadsView, SequencesView, find_rows, find_statistics


@triton.jit
def skip_queries(rows, count):
    """The queries from the one of this number on."""
    return QueryRows(
        skip_rows(rows.q, count),
        skip_rows(rows.do, count),
        rows.log_sum + count,
        rows.delta + count,
    )


@triton.jit
def add_queries(
    state,
    first_block,
    end_block,
    tile,
    queries,
    args,
    scale,
    dropout,
    MASKED: tl.constexpr,
    TERMS: tl.constexpr,
    HEADS: tl.constexpr,
    CUT: tl.constexpr,
):
    """The gradients of a tile of keys with what the queries from first_block to end_block add.

    These are positions in the mask's list where blocks are listed.
    """
    DK: tl.constexpr = HEADS.k
    DV: tl.constexpr = HEADS.v
    dk, dv = state
    ACC: tl.constexpr = dk[0].dtype
    offs_block = tl.arange(0, CUT.block_m)
    n = tile.offs_n[:, None]
    rows = queries
    if TERMS.lists is None:
        rows = skip_queries(queries, first_block)
    for position in range(first_block, end_block, CUT.block_m if TERMS.lists is None else 1):
        start_m = position
        if TERMS.lists is not None:
            start_m = find_listed_query(position, tile.place, args.lists, CUT.block_m)
            rows = skip_queries(queries, start_m)
        offs_m = start_m + offs_block  # (BLOCK_M,)
        m = offs_m[None, :]
        place = move_to_query(tile.place, start_m)
        exists = offs_m < place.queries
        q = load_rows(rows.q, exists, DK, CUT.block_m, CUT.wide)
        log_sum, delta = load_prepared(
            rows.log_sum + offs_block, rows.delta + offs_block, exists, HEADS.folded
        )
        k = take_rows(tile.k, DK, CUT.block_n, CUT)
        score = multiply_rows(k, q, DK, ACC, CUT)  # (BLOCK_N, BLOCK_M)
        given = ()
        if not HEADS.folded:
            score = apply_scale(score, scale, HEADS.scale)
            score, given = apply_scores(score, m, n, place, args.scores, TERMS)
        weights = weigh(score, log_sum[None, :], scale, HEADS.folded)
        if MASKED:
            asked = None
            if not TERMS.ends_with_keys or len(TERMS.keeps) > 1:
                asked = tile.inside[:, None] & exists[None, :]
            keep = apply_masks(asked, m, n, place, args.masks, TERMS)
            weights = tl.where(keep, weights, 0.0)
        do = load_rows(rows.do, exists, DV, CUT.block_m, CUT.wide)
        kept_weights = weights
        if len(dropout) > 0:
            factor = tl.trans(compute_dropout(dropout, offs_m, place.first_n, CUT))
            kept_weights = weights * factor
        dv = add_product(dv, kept_weights, do, DV, CUT)
        v = take_rows(tile.v, DV, CUT.block_n, CUT)
        dweights = multiply_rows(v, do, DV, ACC, CUT)
        if len(dropout) > 0:
            dweights *= factor
        dscore = weights * (dweights - delta[None, :])
        dscore, _ = apply_scores_backward(dscore, given, m, n, place, args.scores, TERMS)
        if MASKED:
            # Of a key or value that is NaN and that nobody sees, nothing may stay. To ask `keep`
            # here again would keep it in registers over two products.
            dscore = tl.where(weights == 0.0, 0.0, dscore)
        dk = add_product(dk, dscore, q, DK, CUT)
        if TERMS.lists is None:
            rows = skip_queries(rows, CUT.block_m)
    return KeyGradients(dk, dv)


@triton.constexpr_function
def has_half(part, masks, one_loop):
    """Whether a part of the queries is gone over: those by masks, and those that see all."""
    return masks > 0 if part == 0 else masks == 0 or not one_loop


@launchable
@triton.jit(do_not_specialize=["pairs", "pairs_of_group", "groups"])
def attention_keys_backward_kernel(
    q_view: HeadsView,
    k_view: HeadsView,
    v_view: HeadsView,
    do_view: HeadsView,
    dk_view: HeadsView,
    dv_view: HeadsView,
    log_sums_ptr,
    delta_ptr,
    queries_view: SequencesView,
    keys_view: SequencesView,
    dropout_view: DropoutView,
    terms_args,
    pairs,
    pairs_of_group,
    groups,
    scale,
    TERMS: tl.constexpr,
    HEADS: tl.constexpr,
    CUT: tl.constexpr,
):
    """One program a tile of keys of one key head, for all the query heads that share it."""
    DK: tl.constexpr = HEADS.k
    DV: tl.constexpr = HEADS.v
    ACC: tl.constexpr = accumulator_dtype(log_sums_ptr)
    BLOCK_N: tl.constexpr = CUT.block_n
    args = part_arguments(terms_args, TERMS)
    place, queries, keys = locate_keys(
        queries_view, keys_view, pairs, pairs_of_group, groups, HEADS, CUT
    )
    # Packed sequences differ in length, and the grid is made for the longest.
    if place.first_n >= place.keys:
        return
    if TERMS.scattered and queries_view.cumulative is None:
        # As in the kernel of dQ: a loop over all queries runs.
        tl.assume(place.queries > 0)

    offs_n = place.first_n + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    inside = offs_n < place.keys
    row = keys.first + place.first_n
    key_head = place.head // HEADS.group
    k = find_rows(k_view, keys.element, key_head, row, CUT.divisor)
    v = find_rows(v_view, keys.element, key_head, row, CUT.divisor)
    k_tile = hold_rows(k, inside, DK, BLOCK_N, CUT)
    v_tile = hold_rows(v, inside, DV, BLOCK_N, CUT)

    # Two loops: queries that see some of the tile, and after them those that see all of it. The
    # last block needs no mask for being incomplete. Where a mask hides keys from later queries, or
    # any, one loop with masks serves: a third would make the others spill, and so would a second
    # where the tile's configuration says so.
    ONE_LOOP: tl.constexpr = TERMS.scattered or CUT.one_loop or TERMS.lists is not None
    seen = find_queries(place, args, TERMS, CUT)
    split = tl.minimum(seen.full_first, seen.end)
    if not has_half(1, len(TERMS.keeps), ONE_LOOP):
        split = seen.end
    bounds = (seen.first // CUT.block_m * CUT.block_m, split, seen.end)
    state = KeyGradients(make_zeros(BLOCK_N, DK, ACC), make_zeros(BLOCK_N, DV, ACC))
    for member in range(HEADS.group):
        head = place.head + member
        own_place = move_to_head(place, head)
        tile = KeyTile(k_tile, v_tile, offs_n, inside, own_place)
        rows = QueryRows(
            find_rows(q_view, queries.element, head, queries.first, CUT.divisor),
            find_rows(do_view, queries.element, head, queries.first, CUT.divisor),
            find_statistics(log_sums_ptr, queries_view, queries, head, 0, HEADS),
            find_statistics(delta_ptr, queries_view, queries, head, 0, HEADS),
        )
        own_bounds = bounds
        if TERMS.lists is not None:
            first, end = find_listed_queries(
                seen.first, seen.end, own_place, args.lists, CUT.block_m
            )
            own_bounds = (first, end, end)
        dropout = prepare_dropout(dropout_view, place.batch * HEADS.count + head, ACC)
        for part in tl.static_range(2):
            if has_half(part, len(TERMS.keeps), ONE_LOOP):
                state = add_queries(
                    state,
                    own_bounds[part],
                    own_bounds[part + 1],
                    tile,
                    rows,
                    args,
                    scale,
                    dropout,
                    part == 0,
                    TERMS,
                    HEADS,
                    CUT,
                )

    dk, dv = state
    if HEADS.scale is not None:
        dk = scale_tile(dk, HEADS.scale, DK)
    else:
        dk = scale_tile(dk, scale, DK)
    dk_rows = find_rows(dk_view, keys.element, key_head, row, CUT.divisor)
    dv_rows = find_rows(dv_view, keys.element, key_head, row, CUT.divisor)
    store_rows(dk_rows, inside, dk, DK, BLOCK_N, CUT.wide)
    store_rows(dv_rows, inside, dv, DV, BLOCK_N, CUT.wide)


def keys_backward(
    call: Call,
    gradient: Gradient,
    rule: Rule = attention_keys_backward_config,
    hopper_rule: HopperBackwardRule = hopper_backward_config,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the gradients of k and v, which together cost little more than one: (dk, dv).

    `rule` gives the configuration, `hopper_rule` that of the kernel which hopper/ has for sm_90.
    """
    hopper = find_backward(KEYS, call, gradient, hopper_rule)
    if hopper is not None:
        return launch_keys_backward(call, gradient, hopper)
    dk = allocate_like(call.k, call.k.shape[3], call.cu_seqlens_k)
    dv = allocate_like(call.v, call.v.shape[3], call.cu_seqlens_k)
    others = {"do_view": gradient.do, "dk_view": dk, "dv_view": dv}
    plan, given = prepare(attention_keys_backward_kernel, rule, call, others, order_keys)
    plan.launch(plan.grid, log_sums_ptr=gradient.log_sums, delta_ptr=gradient.delta, **given)
    return dk, dv
