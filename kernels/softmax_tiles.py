"""What the softmax kernels are handed, and what they do with one tile of a row.

The names are those of softmax.py.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .common import accumulator_dtype, divisible
from .config import INTERPRETED
from .row_tiles import store_tile
from .structures import restore_odd

# Columns that are read together or not at all.
GROUP = tl.constexpr(16)


class Mask(NamedTuple):
    """A mask of bytes (batch, heads, queries, cols) without its last stride; see structures.py."""

    pointer: Any
    heads: Any
    stride_b: Any
    stride_h: Any
    stride_m: Any


class Softmax(NamedTuple):
    """Which softmax it is, as a constexpr."""

    causal: bool
    log: bool
    mask_divisor: int
    """What divides the mask's strides but the last one, see `divisible`."""


class Scores(NamedTuple):
    """What z is computed from."""

    x: Any
    mask: Any
    stride_kn: Any
    queries: Any
    cols: Any
    scale: Any


@triton.jit
def locate_mask_rows(mask, row, query, queries, DIVISOR: tl.constexpr):
    """Where the mask's rows begin, whose strides may be 0."""
    matrix = row // queries
    heads = restore_odd(mask.heads)
    stride_b = divisible(restore_odd(mask.stride_b), DIVISOR)
    stride_h = divisible(restore_odd(mask.stride_h), DIVISOR)
    stride_m = divisible(restore_odd(mask.stride_m), DIVISOR)
    return matrix // heads * stride_b + matrix % heads * stride_h + query * stride_m


@triton.jit
def load_scores(scores, tile, SOFTMAX: tl.constexpr):
    """A tile (BLOCK_M, BLOCK_N) of z. Rows past the end are finite, unless they are masked."""
    row, offs_n, x = tile.row, tile.offs_n, scores.x
    kept = tile.mask_n[None, :]
    read = tile.mask_m[:, None] & kept
    query = row % scores.queries
    if SOFTMAX.causal:
        last_col = (query + (scores.cols - scores.queries))[:, None]
        kept = kept & (offs_n[None, :] <= last_col)
        # Whole groups, so that one instruction can read the columns of a group.
        read = read & ((offs_n // GROUP * GROUP)[None, :] <= last_col)
    if scores.mask is not None:
        mask_rows = locate_mask_rows(scores.mask, row, query, scores.queries, SOFTMAX.mask_divisor)
        mask_offsets = mask_rows[:, None] + (offs_n * scores.stride_kn)[None, :]
        kept = kept & (tl.load(scores.mask.pointer + mask_offsets, read, other=0) != 0)
    elements = tl.load(x.pointer + (row * x.stride)[:, None] + offs_n[None, :], read, other=0.0)
    z = elements.to(accumulator_dtype(x.pointer)) * scores.scale
    return tl.where(kept, z, float("-inf"))


@triton.jit
def normalize(z, row_max, total, LOG: tl.constexpr, MASKED: tl.constexpr):
    """A tile of y, from one of z and its rows' maximum and sum."""
    if MASKED:
        row_max = tl.where(row_max == float("-inf"), 0.0, row_max)
        total = tl.where(total == 0.0, 1.0, total)
    shifted = z - row_max[:, None]
    if LOG:
        y = shifted - tl.log(total)[:, None]
    else:
        y = tl.exp(shifted) * invert(total)[:, None]
    return y


# A constexpr, because kernels read it. The interpreter divides exactly, and its fma rounds twice.
FAST_DIVISION = tl.constexpr(not INTERPRETED)


@triton.jit
def invert(total):
    """1 / total within a unit in the last place."""
    inverse = 1.0 / total
    if total.dtype == tl.float32 and FAST_DIVISION:
        # Off by up to two, which one step of Newton's mends.
        inverse = tl.fma(tl.fma(-total, inverse, 1.0), inverse, inverse)
    return inverse


@triton.jit
def store_gradient(dx, tile, y, dy, shared, scale, LOG: tl.constexpr):
    """Store a tile of dx."""
    if LOG:
        gradient = dy - tl.exp(y) * shared[:, None]
    else:
        gradient = y * (dy - shared[:, None])
    store_tile(dx, tile, gradient * scale)
