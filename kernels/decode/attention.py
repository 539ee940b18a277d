r"""Attention of new queries over a cache of keys and values, in which each sequence has its part.

For query i of M of a sequence with n keys, which stands at key n - M + i, over the keys j < n that
its masks keep:

    s_ij = terms(scale q_i . k_j)
    lse_i = log(sum_j exp(s_ij))
    o_i = sum_j exp(s_ij - lse_i) v_j

q is (B, H, M, Dk), k (B, Hkv, N, Dk) and v (B, Hkv, N, Dv) with room for N keys; or pages
(P, Hkv, page, D), of which a table (B, pages of a sequence) says where a sequence's keys lie.
Without v the first Dv columns of k are the values. Numbers of 8 bits are k / k_scale and
v / v_scale of their head. How many keys a sequence has is read on the device.

Such calls read much and compute little. So the queries of all heads that share a key head are the
rows of one tile, by which each key is read once; and where there are few tiles the keys of a
sequence go to several programs, whose results merge.py merges. Scores, sums and o are accumulated
in float32 (float64 for float64). A sink is one more score in the first part.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..attention.config import head_chunks
from ..attention.functions import Place
from ..attention.launch import Call, make_rows, statistics_dtype
from ..attention.places import move_to_head, move_to_key
from ..attention.plan import prepare
from ..attention.ranges import find_keys
from ..attention.structures import HeadRows, State
from ..attention.terms import LOG2E, apply_masks, apply_scale, apply_scores, part_arguments
from ..attention.tiles import (
    add_product,
    load_rows,
    make_zeros,
    multiply_rows,
    scale_tile,
    store_chunk,
    sum_weights,
)
from ..attention.views import HeadsView, SequencesView
from ..common import accumulator_dtype, divisible
from ..config import cdiv, find_target
from ..launch import launchable
from ..structures import make_odd, restore_odd
from .cache import PagesView, find_block, load_cached
from .config import INVARIANT_KEYS, choose_rows, decode_rules, part_keys
from .merge import merge_attention_forward


class Rows(NamedTuple):
    """The rows of a tile: queries of the heads that share a key head."""

    batch: Any
    key_head: Any
    head: Any
    """(ROWS, 1)"""
    m: Any
    """(ROWS, 1)"""
    inside: Any
    """(ROWS,)"""
    first_head: Any
    last_head: Any
    first_m: Any


@triton.jit
def locate_rows(queries, HEADS: tl.constexpr, CUT: tl.constexpr):
    """The rows of a program. Neighbouring rows are heads of one query."""
    GROUP: tl.constexpr = HEADS.group
    KEY_HEADS: tl.constexpr = HEADS.count // GROUP
    count = queries * GROUP
    tiles = tl.cdiv(count, CUT.block_m)
    pair = tl.program_id(0) // tiles
    first = tl.program_id(0) % tiles * CUT.block_m
    row = first + tl.arange(0, CUT.block_m)
    key_head = pair % KEY_HEADS
    last = tl.minimum(first + CUT.block_m, count) - 1
    several = first // GROUP != last // GROUP
    return Rows(
        pair // KEY_HEADS,
        key_head,
        (key_head * GROUP + row % GROUP)[:, None],
        (row // GROUP)[:, None],
        row < count,
        key_head * GROUP + tl.where(several, 0, first % GROUP),
        key_head * GROUP + tl.where(several, GROUP - 1, last % GROUP),
        first // GROUP,
    )


@triton.jit
def find_seen(rows, place, args, TERMS: tl.constexpr, CUT: tl.constexpr):
    """The first key that a tile sees, rounded down to a block, and the end of these keys."""
    if len(TERMS.key_ranges) == 0:
        return 0, place.keys
    else:
        first = place.keys
        end = 0
        # A term's range may differ from head to head.
        for head in range(rows.first_head, rows.last_head + 1):
            seen = find_keys(move_to_head(place, head), args, TERMS, CUT)
            first = tl.minimum(first, seen.first)
            end = tl.maximum(end, seen.end)
        return tl.maximum(first, 0) // CUT.block_n * CUT.block_n, tl.minimum(end, place.keys)


@launchable
@triton.jit
def decode_attention_kernel(
    q_view: HeadsView,
    k_view: HeadsView,
    v_view: HeadsView,
    o_ptr,
    lse_ptr,
    lengths_ptr,
    pages_view: PagesView,
    k_scale_ptr,
    v_scale_ptr,
    sinks_ptr,
    terms_args,
    keys_view: SequencesView,
    queries_view: SequencesView,
    scale,
    SHARED: tl.constexpr,
    PAGE: tl.constexpr,
    PART: tl.constexpr,
    TERMS: tl.constexpr,
    HEADS: tl.constexpr,
    CUT: tl.constexpr,
):
    """One program a tile of rows and a part of their keys.

    Parts have PART keys, or with 0 as many as come to each of them. SHARED: values are the first
    chunk of the keys.
    """
    DK: tl.constexpr = HEADS.k
    DV: tl.constexpr = HEADS.v
    ACC: tl.constexpr = accumulator_dtype(lse_ptr)
    ROWS: tl.constexpr = CUT.block_m
    BLOCK_N: tl.constexpr = CUT.block_n
    DTYPE: tl.constexpr = q_view.pointer.dtype.element_ty
    args = part_arguments(terms_args, TERMS)
    queries = restore_odd(queries_view.rows)
    rows = locate_rows(queries, HEADS, CUT)
    length = tl.load(lengths_ptr + rows.batch).to(tl.int64)
    length = tl.minimum(tl.maximum(length, 0), restore_odd(keys_view.rows)).to(tl.int32)
    place = Place(rows.batch, rows.head, queries, length, rows.first_m, 0)

    offsets = rows.head * divisible(restore_odd(q_view.stride_h), CUT.divisor).to(tl.int64)
    offsets += rows.m * divisible(restore_odd(q_view.stride_row), CUT.divisor).to(tl.int64)
    q_base = q_view.pointer + rows.batch * divisible(restore_odd(q_view.stride_b), CUT.divisor).to(
        tl.int64
    )
    q = HeadRows(q_base + offsets, 0)
    q_tile = load_rows(q, rows.inside, DK, ROWS, False)

    first, end = find_seen(rows, place, args, TERMS, CUT)
    part = tl.program_id(1)
    if PART == 0:
        keys_of_part = tl.cdiv(tl.cdiv(end - first, tl.num_programs(1)), BLOCK_N) * BLOCK_N
        begin = first + part * keys_of_part
        stop = tl.minimum(begin + keys_of_part, end)
    else:
        begin = tl.maximum(first, part * PART)
        stop = tl.minimum(part * PART + PART, end)

    row_max = tl.full((ROWS,), float("-inf"), ACC)
    row_sum = tl.zeros((ROWS,), ACC)
    if sinks_ptr is not None:
        if part == 0:
            sink = tl.load(sinks_ptr + tl.reshape(rows.head, (ROWS,))).to(ACC)
            row_max = sink
            row_sum = tl.where(sink == float("-inf"), 0.0, 1.0).to(ACC)
    state = State(make_zeros(ROWS, DV, ACC), row_max, row_sum)
    for start in range(begin, stop, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        n = offs_n[None, :]
        keep = rows.inside[:, None] & (offs_n < stop)[None, :]
        keep = apply_masks(keep, rows.m, n, move_to_key(place, start), args.masks, TERMS)
        keep = tl.broadcast_to(keep, (ROWS, BLOCK_N))
        # Keys that no query of the tile sees are loaded as zero: 0 times NaN would be NaN.
        seen = tl.max(keep.to(tl.int32), 0) > 0
        k_rows, missing = find_block(k_view, rows, start, offs_n, seen, pages_view, PAGE, CUT)
        k_tile = load_cached(k_rows, seen, DK, BLOCK_N, CUT.wide, DTYPE)
        score = multiply_rows(q_tile, k_tile, DK, ACC, CUT)  # (ROWS, BLOCK_N)
        score = apply_scale(score, scale, HEADS.scale)
        if k_scale_ptr is not None:
            score *= tl.load(k_scale_ptr + rows.key_head)
        score, _ = apply_scores(score, rows.m, n, move_to_key(place, start), args.scores, TERMS)
        if len(missing) > 0:
            score = tl.where(missing[0], float("nan"), score)
        score = tl.where(keep, score, float("-inf"))
        if SHARED:
            v_tile = (k_tile[0],)
        else:
            v_rows, _ = find_block(v_view, rows, start, offs_n, seen, pages_view, PAGE, CUT)
            v_tile = load_cached(v_rows, seen, DV, BLOCK_N, CUT.wide, DTYPE)
        state = add_block(state, score, v_tile, DV, CUT)

    acc, row_max, row_sum = state
    empty = row_sum == 0.0
    inverse = 1.0 / tl.where(empty, 1.0, row_sum)
    if v_scale_ptr is not None:
        inverse *= tl.load(v_scale_ptr + rows.key_head)
    acc = scale_tile(acc, inverse[:, None], DV)
    lse = tl.where(empty, float("-inf"), row_max + tl.log(tl.where(empty, 1.0, row_sum)))
    batches = tl.num_programs(0) // tl.cdiv(queries * HEADS.group, ROWS)
    batches = batches // (HEADS.count // HEADS.group)
    matrix = (part * batches + rows.batch).to(tl.int64) * HEADS.count + rows.head
    row = tl.reshape(matrix * queries + rows.m, (ROWS,))
    o = HeadRows(o_ptr, DV.dim)
    store_chunk(o, row, rows.inside, acc[0], 0, DV.width, DV.dim)
    if DV.tail > 0:
        store_chunk(o, row, rows.inside, acc[1], DV.width, DV.tail, DV.dim)
    tl.store(lse_ptr + row, lse, rows.inside)


@triton.jit
def add_block(state, score, v_tile, DV: tl.constexpr, CUT: tl.constexpr):
    """The state after a block of keys, whose scores are -inf where they do not count."""
    acc, row_max, row_sum = state
    new_max = tl.maximum(row_max, tl.max(score, 1))
    # Without any key so far: every weight is 0, where -inf - -inf would be NaN.
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = tl.exp2((score - shift[:, None]) * LOG2E)
    rescale = tl.exp2((row_max - shift) * LOG2E)
    row_sum = tl.fma(row_sum, rescale, sum_weights(weights, CUT))
    acc = add_product(scale_tile(acc, rescale[:, None], DV), weights, v_tile, DV, CUT)
    return State(acc, new_max, row_sum)


def decode_attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    lengths: torch.Tensor,
    block_table: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    sinks: torch.Tensor | None,
    tensors: list[torch.Tensor],
    value_dim: int,
    scale: float,
    precision: str,
    terms: str,
    floats: list[float],
    integers: list[int],
    batch_invariant: bool = False,
    splits: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the forward: (o, lse), with terms as in attention_forward.

    Caches of float8 come as their bits, uint8. `splits` is in how many parts the keys of a sequence
    go, or None for what fits the device.
    """
    batch, heads, queries, _ = q.shape
    group = heads // k.shape[1]
    page = k.shape[2]
    capacity = page if block_table is None else page * block_table.shape[1]
    o = torch.empty((batch, heads, queries, value_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, queries), dtype=statistics_dtype(q), device=q.device)
    if lse.numel() == 0:
        return o, lse
    k = unit_rows(k)
    values = k[..., :value_dim] if v is None else unit_rows(v)
    nothing = (None, None, queries, capacity, None, 0.0)
    call = Call(
        make_rows(q),
        k,
        values,
        *nothing,
        scale,
        precision,
        terms,
        tensors,
        floats,
        integers,
        batch_invariant,
    )
    rule = decode_rules[choose_rows(queries * group, batch_invariant)]
    plan, given = prepare(decode_attention_kernel, rule, call, {}, sinks=sinks)
    config = plan.config
    given["keys_view"] = (None, make_odd(capacity))
    pages_view = None
    if block_table is not None:
        table = block_table.contiguous()
        pages_view = (table, make_odd(table.shape[1]), make_odd(k.shape[0]))
    programs = batch * k.shape[1] * cdiv(queries * group, config.block_m)
    part = 0
    # More would have nothing to do.
    most = max(cdiv(capacity, config.block_n), 1)
    if batch_invariant:
        part = INVARIANT_KEYS if find_target(q).backend != "interpreter" else 2 * config.block_n
        splits = max(cdiv(capacity, part), 1)
    elif splits is None:
        splits = part_keys(programs, capacity, config.block_n, find_target(q))
    splits = min(splits, most)
    whole = splits == 1
    part_o, part_lse = o, lse
    if not whole:
        part_o = torch.empty((splits, *o.shape), dtype=lse.dtype, device=q.device)
        part_lse = torch.empty((splits, *lse.shape), dtype=lse.dtype, device=q.device)
    plan.launch(
        (programs, splits, 1),
        o_ptr=part_o,
        lse_ptr=part_lse,
        lengths_ptr=lengths,
        pages_view=pages_view,
        k_scale_ptr=k_scale,
        v_scale_ptr=v_scale,
        SHARED=v is None and _shares(values.shape[3], q.shape[3]),
        PAGE=page if block_table is not None else 0,
        PART=part,
        **given,
    )
    return (o, lse) if whole else merge_attention_forward(part_o, part_lse, q.dtype)


def unit_rows(cache: torch.Tensor) -> torch.Tensor:
    """A cache whose columns lie next to each other: itself, or a copy if it must be."""
    return cache if cache.stride(-1) == 1 or cache.shape[-1] == 1 else cache.contiguous()


def _shares(value_dim: int, key_dim: int) -> bool:
    """Whether the values are held as the first chunk of the keys is."""
    first_chunk, _ = head_chunks(key_dim)
    return value_dim == first_chunk and head_chunks(value_dim) == (first_chunk, 0)
