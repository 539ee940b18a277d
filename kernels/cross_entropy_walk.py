"""How cross entropy's forward goes over the logits of its rows: once, in tiles of columns.

The names are those of cross_entropy_kernels.py. A tile is taken in as lanes, see lanes.py.

Where 16 bytes do not divide the distance between rows, as with 50,257 classes, a row begins
anywhere, and loads along it would be as narrow as one logit. There the tiles begin at the row's
first address that a whole load may begin at, and end with the last load that is whole; the logits
before and after, fewer than a load's on either side, are taken in first.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .cross_entropy_terms import scale_and_cap
from .lanes import accumulate_lanes, accumulate_moments, merge_lanes, merge_moments


class Asked(NamedTuple):
    """What is wanted of a row besides its lse, as a constexpr."""

    entropy: bool
    correct: bool
    weighted: bool
    """Whether classes have weights."""


class RowStart(NamedTuple):
    """What a walk compares the logits of rows (BLOCK_M,) with; zeros of what nothing asks for."""

    first: Any
    """A logit of the row."""
    target: Any
    """The target's number."""
    x_target: Any
    """The target's logit, as it is in memory."""


class Lanes(NamedTuple):
    """What lanes (BLOCK_M, LANES) have seen so far; zeros of what nothing asks for."""

    largest: Any
    total: Any
    moment: Any
    beaten: Any
    """Whether any logit goes before the target's."""
    distance: Any
    """The sum of how far logits lie below the row's first."""


class Part(NamedTuple):
    """The logits of rows that whole loads take: from an address on, a row at a time."""

    rows: Any
    """Their addresses (BLOCK_M,)."""
    begin: Any
    """The column of the first, (BLOCK_M,)."""
    count: Any
    """How many there are, (BLOCK_M,)."""


@triton.jit
def start_lanes(BLOCK_M: tl.constexpr, LANES: tl.constexpr, ACC: tl.constexpr):
    """Lanes that have seen nothing."""
    zeros = tl.zeros((BLOCK_M, LANES), ACC)
    largest = tl.full((BLOCK_M, LANES), float("-inf"), ACC)
    return Lanes(largest, zeros, zeros, tl.zeros((BLOCK_M, LANES), tl.int32), zeros)


@triton.jit
def take_columns(
    lanes,
    x,
    offs_n,
    mask,
    start,
    weight_ptr,
    coefficients,
    LOSS: tl.constexpr,
    ASKED: tl.constexpr,
):
    """The lanes after a tile x (BLOCK_M, BLOCK_N) of logits, of columns that broadcast to it.

    Where `mask` is not, x is -inf, or 0 where there is a softcap.
    """
    BLOCK_M: tl.constexpr = lanes.largest.shape[0]
    LANES: tl.constexpr = lanes.largest.shape[1]
    LANE: tl.constexpr = x.shape[1] // LANES
    moment, beaten, distance = lanes.moment, lanes.beaten, lanes.distance
    if ASKED.correct:
        # Scale, cap and temperature leave the order of logits as it is. NaN is beaten by all.
        is_less = x < start.x_target[:, None]
        is_later = (x == start.x_target[:, None]) & (offs_n >= start.target[:, None])
        before = tl.where(mask & ~(is_less | is_later), 1, 0)
        before = tl.max(tl.reshape(before, (BLOCK_M, LANES, LANE)), 2)
        beaten = tl.maximum(beaten, before)
    x = scale_and_cap(x, coefficients, LOSS)[0]
    if LOSS.softcap is not None:
        x = tl.where(mask, x, float("-inf"))
    if LOSS.smoothed:
        below = tl.where(mask, start.first[:, None] - x, 0.0)
        if ASKED.weighted:
            below *= tl.load(weight_ptr + offs_n, mask, other=0.0).to(x.dtype)
        distance += tl.sum(tl.reshape(below, (BLOCK_M, LANES, LANE)), 2)
    x = tl.reshape(x, (BLOCK_M, LANES, LANE))
    if ASKED.entropy:
        moment = accumulate_moments(x, lanes.largest, lanes.total, moment)
    largest, total = accumulate_lanes(x, lanes.largest, lanes.total)
    return Lanes(largest, total, moment, beaten, distance)


@triton.jit
def take_edges(
    part,
    row_starts,
    cols,
    start,
    weight_ptr,
    coefficients,
    LOSS: tl.constexpr,
    ASKED: tl.constexpr,
    LANES: tl.constexpr,
    LANE: tl.constexpr,
    PADDING: tl.constexpr,
):
    """Lanes of which the first has seen what lies before and after a part."""
    BLOCK_M: tl.constexpr = part.begin.shape[0]
    ACC: tl.constexpr = start.first.dtype
    offs = tl.arange(0, 2 * LANE)[None, :]
    is_after = offs >= LANE
    offs_n = offs + tl.where(is_after, (part.begin + part.count)[:, None] - LANE, 0)
    mask = offs_n < tl.where(is_after, cols, tl.minimum(part.begin, cols)[:, None])
    x = tl.load(row_starts[:, None] + offs_n, mask, other=PADDING).to(ACC)
    edges = start_lanes(BLOCK_M, 2, ACC)
    edges = take_columns(edges, x, offs_n, mask, start, weight_ptr, coefficients, LOSS, ASKED)
    largest, total = merge_lanes(edges.largest, edges.total)
    moment, distance = edges.moment, edges.distance
    if ASKED.entropy:
        moment = merge_moments(edges.largest, edges.total, moment)[:, None]
    else:
        moment = tl.zeros((BLOCK_M, 1), ACC)
    is_first = tl.arange(0, LANES)[None, :] == 0
    return Lanes(
        tl.where(is_first, largest[:, None], float("-inf")),
        tl.where(is_first, total[:, None], 0.0),
        tl.where(is_first, moment, 0.0),
        tl.where(is_first, tl.max(edges.beaten, 1)[:, None], 0),
        tl.where(is_first, tl.sum(distance, 1)[:, None], 0.0),
    )


@triton.jit
def find_part(logits_ptr, row_offsets, cols, LANE: tl.constexpr, WHOLE: tl.constexpr):
    """What whole loads take of rows at offsets (BLOCK_M,): all of them where rows are WHOLE."""
    if WHOLE:
        begin = tl.zeros(row_offsets.shape, tl.int32)
        return Part(logits_ptr + row_offsets, begin, begin + cols)
    else:
        first = tl.cdiv(row_offsets, LANE) * LANE
        begin = (first - row_offsets).to(tl.int32)
        return Part(logits_ptr + first, begin, tl.maximum(cols - begin, 0) // LANE * LANE)
