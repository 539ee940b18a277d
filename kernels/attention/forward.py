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

import torch
import triton
import triton.language as tl

from ..common import accumulator_dtype
from ..launch import launchable
from .config import attention_forward_config
from .hopper.config import HopperRule, hopper_forward_config
from .hopper.launch import find_forward, launch_forward
from .launch import Call, Rule, allocate_like, allocate_statistics, make_rows
from .lists import find_listed_key
from .order import order_queries
from .places import move_to_key
from .plan import prepare
from .prologue import locate_queries
from .ranges import FULL, find_keys, has_part, part_keys
from .structures import QueryTile, State
from .terms import LN2, LOG2E, apply_masks, apply_scale, apply_scores, part_arguments
from .tiles import (
    add_product,
    compute_dropout,
    load_rows,
    make_zeros,
    multiply_rows,
    prepare_dropout,
    scale_tile,
    skip_rows,
    store_rows,
    sum_weights,
)
from .views import DropoutView, HeadsView, SequencesView, find_rows, find_statistics


@triton.jit
def attend(
    state,
    first_block,
    end_block,
    tile,
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
    """The state after the keys from first_block to end_block.

    These are positions in the mask's list where blocks are listed. The maximum is to base 2 where
    scores are folded, which then have not been scaled yet.
    """
    DK: tl.constexpr = HEADS.k
    DV: tl.constexpr = HEADS.v
    acc, row_max, row_sum = state
    ACC: tl.constexpr = row_max.dtype
    offs_block = tl.arange(0, CUT.block_n)
    m = tile.offs_m[:, None]
    k_rows, v_rows = k, v
    if TERMS.lists is None:
        k_rows, v_rows = skip_rows(k, first_block), skip_rows(v, first_block)
    for position in range(first_block, end_block, CUT.block_n if TERMS.lists is None else 1):
        start_n = position
        if TERMS.lists is not None:
            start_n = find_listed_key(position, tile.place, args.lists, CUT.block_n)
            k_rows, v_rows = skip_rows(k, start_n), skip_rows(v, start_n)
        n = (start_n + offs_block)[None, :]  # (1, BLOCK_N)
        place = move_to_key(tile.place, start_n)
        seen = None
        if MASKED:
            # Keys that no query of the tile sees are loaded as zero: 0 times NaN would be NaN.
            seen = (start_n + offs_block >= tile.first_n) & (start_n + offs_block < tile.end_n)
            keep = apply_masks(seen[None, :], m, n, place, args.masks, TERMS)
            if TERMS.scattered:
                keep = tl.broadcast_to(keep, (CUT.block_m, CUT.block_n))
                seen = tl.max(keep.to(tl.int32), 0) > 0
        k_tile = load_rows(k_rows, seen, DK, CUT.block_n, CUT.wide)
        score = multiply_rows(tile.q, k_tile, DK, ACC, CUT)  # (BLOCK_M, BLOCK_N)
        if not HEADS.folded:
            score = apply_scale(score, scale, HEADS.scale)
            score, _ = apply_scores(score, m, n, place, args.scores, TERMS)
        if MASKED:
            score = tl.where(keep, score, float("-inf"))
        largest = tl.max(score, 1)  # (BLOCK_M,)
        if HEADS.folded:
            largest *= scale * LOG2E
        new_max = tl.maximum(row_max, largest)
        shift = new_max
        if MASKED or TERMS.scores_hide:
            # Without any key so far: every weight is 0, where -inf - -inf would be NaN.
            shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        if HEADS.folded:
            weights = tl.exp2(tl.fma(score, scale * LOG2E, -shift[:, None]))
            rescale = tl.exp2(row_max - shift)
        else:
            weights = tl.exp2((score - shift[:, None]) * LOG2E)
            rescale = tl.exp2((row_max - shift) * LOG2E)
        row_sum = tl.fma(row_sum, rescale, sum_weights(weights, CUT))
        v_tile = load_rows(v_rows, seen, DV, CUT.block_n, CUT.wide)
        acc = scale_tile(acc, rescale[:, None], DV)
        if len(dropout) > 0:
            weights *= compute_dropout(dropout, tile.offs_m, start_n, CUT)
        acc = add_product(acc, weights, v_tile, DV, CUT)
        row_max = new_max
        if TERMS.lists is None:
            # Addresses that go on by a step, see `skip_rows`.
            k_rows, v_rows = skip_rows(k_rows, CUT.block_n), skip_rows(v_rows, CUT.block_n)
    return State(acc, row_max, row_sum)


@launchable
@triton.jit(do_not_specialize=["pairs", "pairs_of_group", "groups"])
def attention_forward_kernel(
    q_view: HeadsView,
    k_view: HeadsView,
    v_view: HeadsView,
    o_view: HeadsView,
    lse_ptr,
    sinks_ptr,
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
    """One program a tile of queries of one head, see `locate_queries`."""
    DK: tl.constexpr = HEADS.k
    DV: tl.constexpr = HEADS.v
    ACC: tl.constexpr = accumulator_dtype(lse_ptr)
    BLOCK_M: tl.constexpr = CUT.block_m
    args = part_arguments(terms_args, TERMS)
    place, queries, keys = locate_queries(
        queries_view, keys_view, pairs, pairs_of_group, groups, TERMS, HEADS, CUT
    )
    # Packed sequences differ in length, and the grid is made for the longest.
    if place.first_m >= place.queries:
        return

    offs_block = tl.arange(0, BLOCK_M)
    offs_m = place.first_m + offs_block  # (BLOCK_M,)
    inside = offs_m < place.queries
    row = queries.first + place.first_m
    key_head = place.head // HEADS.group
    q = find_rows(q_view, queries.element, place.head, row, CUT.divisor)
    k = find_rows(k_view, keys.element, key_head, keys.first, CUT.divisor)
    v = find_rows(v_view, keys.element, key_head, keys.first, CUT.divisor)
    q_tile = load_rows(q, inside, DK, BLOCK_M, CUT.wide)

    seen = find_keys(place, args, TERMS, CUT)
    bounds = part_keys(seen, place, args, TERMS, CUT)
    tile = QueryTile(q_tile, offs_m, place, seen.first, seen.end)
    row_max = tl.full((BLOCK_M,), float("-inf"), ACC)
    row_sum = tl.zeros((BLOCK_M,), ACC)
    if sinks_ptr is not None:
        # A sink begins the sum. One of -inf is none.
        sink = tl.load(sinks_ptr + place.head).to(ACC)
        row_max = tl.full((BLOCK_M,), 0.0, ACC) + (sink * LOG2E if HEADS.folded else sink)
        row_sum += tl.where(sink == float("-inf"), 0.0, 1.0)
    state = State(make_zeros(BLOCK_M, DV, ACC), row_max, row_sum)
    dropout = prepare_dropout(dropout_view, place.batch * HEADS.count + place.head, ACC)
    for part in tl.static_range(3):
        if has_part(part, TERMS.hides_first, TERMS.scattered, TERMS.lists is not None):
            state = attend(
                state,
                bounds[part],
                bounds[part + 1],
                tile,
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

    acc, row_max, row_sum = state
    empty = row_sum == 0.0
    acc = scale_tile(acc, (1.0 / tl.where(empty, 1.0, row_sum))[:, None], DV)
    log_sum = tl.log(tl.where(empty, 1.0, row_sum))
    lse = (row_max * LN2 if HEADS.folded else row_max) + log_sum
    lse = tl.where(empty, float("-inf"), lse)
    o = find_rows(o_view, queries.element, place.head, row, CUT.divisor)
    store_rows(o, inside, acc, DV, BLOCK_M, CUT.wide)
    lse_base = find_statistics(lse_ptr, queries_view, queries, place.head, place.first_m, HEADS)
    tl.store(lse_base + offs_block, lse, inside)


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
    hopper_rule: HopperRule = hopper_forward_config,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the forward: (o, lse).

    With cumulative lengths the batch is 1 and queries and keys are packed. `terms` describes the
    terms as `compose` takes them, in the order of `tensors`, `floats` and `integers`. There is a
    seed where there is dropout. `batch_invariant` takes the same tiles for all terms, and sums that
    no layout changes, because a batch may ask for a mask that one of its sequences needs not.
    `rule` gives the configuration, `hopper_rule` that of the forward which hopper/ has for sm_90.
    """
    o = allocate_like(q, v.shape[3], cu_seqlens_q)
    lse = allocate_statistics(q)
    if lse.numel() == 0:
        return o, lse
    if cu_seqlens_q is not None:
        lse.fill_(float("-inf"))
    call = Call(
        make_rows(q),
        make_rows(k),
        make_rows(v),
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        k.shape[2],
        seed,
        dropout_p,
        scale,
        precision,
        terms,
        tensors,
        floats,
        integers,
        batch_invariant,
    )
    hopper = find_forward(call, sinks, hopper_rule)
    if hopper is not None:
        launch_forward(call, hopper, o, lse)
        return o, lse
    plan, given = prepare(attention_forward_kernel, rule, call, {"o_view": o}, order_queries, sinks)
    plan.launch(plan.grid, lse_ptr=lse, **given)
    return o, lse
