"""The weights of attention, written out: p_ij = exp(s_ij - lse_i), for inspection.

Shapes and terms are those of forward.py; the weights are (B, H, M, N) in the dtype of q.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from ..common import accumulator_dtype
from ..launch import launchable
from .config import AttentionConfig, attention_queries_backward_config
from .launch import Call, make_rows
from .lists import find_listed_keys
from .order import order_queries
from .places import move_to_key
from .plan import prepare
from .prologue import locate_queries
from .terms import apply_masks, apply_scale, apply_scores, part_arguments, take_log_sum, weigh
from .tiles import count_rows, load_log_sum, load_rows, multiply_rows, skip_rows
from .views import HeadsView, SequencesView, find_rows, view_heads


@launchable
@triton.jit(do_not_specialize=["pairs", "pairs_of_group", "groups"])
def attention_weights_kernel(
    q_view: HeadsView,
    k_view: HeadsView,
    lse_view: HeadsView,
    weights_ptr,
    queries_view: SequencesView,
    keys_view: SequencesView,
    terms_args,
    pairs,
    pairs_of_group,
    groups,
    scale,
    TERMS: tl.constexpr,
    HEADS: tl.constexpr,
    CUT: tl.constexpr,
):
    """One program a tile of queries of one head, over all keys."""
    DK: tl.constexpr = HEADS.k
    ACC: tl.constexpr = accumulator_dtype(lse_view.pointer)
    BLOCK_M: tl.constexpr = CUT.block_m
    args = part_arguments(terms_args, TERMS)
    own_place, queries, keys = locate_queries(
        queries_view, keys_view, pairs, pairs_of_group, groups, TERMS, HEADS, CUT
    )
    batch, head, start_m = own_place.batch, own_place.head, own_place.first_m
    rows = count_rows(BLOCK_M, CUT.wide)
    offs_m = start_m + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    offs_block = tl.arange(0, CUT.block_n)
    inside = offs_m < queries.length
    q = find_rows(q_view, batch, head, start_m, CUT.divisor)
    k = find_rows(k_view, batch, head // HEADS.group, 0, CUT.divisor)
    lse_rows = find_rows(lse_view, batch, head, start_m, 1)
    lse = load_log_sum(lse_rows.base + rows.to(tl.int64) * lse_rows.stride, inside)
    log_sum = take_log_sum(lse, HEADS.folded)
    q_tile = load_rows(q, inside, DK, BLOCK_M, CUT.wide)
    first_row = (batch * HEADS.count + head).to(tl.int64) * queries.length + start_m
    out_base = weights_ptr + first_row * keys.length
    m = offs_m[:, None]
    for start_n in range(0, keys.length, CUT.block_n):
        offs_n = start_n + offs_block
        n = offs_n[None, :]
        place = move_to_key(own_place, start_n)
        exists = inside[:, None] & (offs_n < keys.length)[None, :]
        keep = apply_masks(exists, m, n, place, args.masks, TERMS)
        if TERMS.lists is not None:
            first, end = find_listed_keys(start_n, start_n + 1, place, args.lists, CUT.block_n)
            keep = keep & (first < end)
        k_tile = load_rows(skip_rows(k, start_n), offs_n < keys.length, DK, CUT.block_n, CUT.wide)
        score = multiply_rows(q_tile, k_tile, DK, ACC, CUT)  # (BLOCK_M, BLOCK_N)
        if not HEADS.folded:
            score = apply_scale(score, scale, HEADS.scale)
            score, _ = apply_scores(score, m, n, place, args.scores, TERMS)
        weights = tl.where(keep, weigh(score, log_sum[:, None], scale, HEADS.folded), 0.0)
        pointers = out_base + rows[:, None].to(tl.int64) * keys.length + n
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
    q, k = make_rows(q), make_rows(k)
    whole = (None, None, queries, keys)
    no_dropout = (None, 0.0)
    composed = (terms, tensors, floats, integers)
    call = Call(q, k, k, *whole, *no_dropout, scale, precision, *composed, False)
    plan, given = prepare(attention_weights_kernel, _config, call, {}, order_queries)
    del given["v_view"]
    plan.launch(plan.grid, lse_view=view_heads(lse), weights_ptr=weights, **given)
    return weights


def _config(*features: Any) -> AttentionConfig:
    """As for a term that loads a tile, because one is stored whatever the terms are."""
    *rest, _, target = features
    return attention_queries_backward_config(*rest, "tensor", target)
