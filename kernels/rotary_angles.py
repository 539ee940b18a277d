"""Where the rotation's heads lie in memory, and how it finds the angles of each token.

The names are those of rotary.py.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .common import divisible
from .structures import restore_odd


class Heads(NamedTuple):
    """Heads of tokens, (B, H, S, head_dim), whose last stride is 1; a view, see structures.py."""

    pointer: Any
    count: Any
    stride_b: Any
    stride_h: Any
    stride_s: Any


class Table(NamedTuple):
    """Rows of angles, (B or 1, rows, half), of each batch entry's own or the same; a view."""

    pointer: Any
    rows: Any
    stride_b: Any
    stride_row: Any


class Positions(NamedTuple):
    """The position of each token, (B or 1, S); a view."""

    pointer: Any
    stride_b: Any
    stride_s: Any


class Sequences(NamedTuple):
    """Where sequences begin and the last one ends, and the steps of a search there; a view."""

    pointer: Any
    count: Any
    search_steps: Any


class Tokens(NamedTuple):
    """Tokens (BLOCK_M,) of a batch entry, and which of them there are."""

    batch: Any
    offs_m: Any
    mask_m: Any


class Angles(NamedTuple):
    """What the pairs (BLOCK_M, BLOCK_N) of every head are turned by."""

    cos: Any
    sin: Any


@triton.jit
def restore_heads(view, DIVISOR: tl.constexpr):
    """Heads with their strides as they are, in a form that shows that DIVISOR divides them."""
    return Heads(
        view.pointer,
        restore_odd(view.count),
        divisible(restore_odd(view.stride_b), DIVISOR),
        divisible(restore_odd(view.stride_h), DIVISOR),
        divisible(restore_odd(view.stride_s), DIVISOR),
    )


@triton.jit
def find_sequence_start(sequences, token):
    """Where the sequence of each token starts: the last boundary that is not past it."""
    low = tl.zeros_like(token)
    high = low + restore_odd(sequences.count)
    for _ in range(restore_odd(sequences.search_steps)):
        middle = (low + high + 1) // 2
        reached = tl.load(sequences.pointer + middle) <= token
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle - 1)
    return tl.load(sequences.pointer + low).to(tl.int64)


@triton.jit
def find_table_row(tokens, positions, sequences, offset, BY_TOKEN: tl.constexpr):
    """The row of each token in the tables, which they need not have."""
    row = tokens.offs_m
    if not BY_TOKEN:
        if positions is not None:
            offsets = tokens.batch * restore_odd(positions.stride_b)
            offsets += tokens.offs_m * restore_odd(positions.stride_s)
            row = tl.load(positions.pointer + offsets, tokens.mask_m, other=0).to(tl.int64)
        elif sequences is not None:
            row = tokens.offs_m - find_sequence_start(sequences, tokens.offs_m) + offset
        else:
            row = tokens.offs_m + offset
    return row


@triton.jit
def load_pairs(table_ptr, row_offsets, has_row, ROTATION: tl.constexpr, BLOCKS: tl.constexpr):
    """The first and the second of each pair in the tokens' rows, NaN where there is no such row."""
    offs_pair = tl.arange(0, 2 * BLOCKS.block_n)
    mask = has_row[:, None] & (offs_pair < 2 * ROTATION.half)[None, :]
    pairs = tl.load(table_ptr + row_offsets + offs_pair[None, :], mask, other=float("nan"))
    return tl.split(tl.reshape(pairs, (BLOCKS.block_m, BLOCKS.block_n, 2)))


@triton.jit
def load_angles(cos, sin_ptr, tokens, table_row, ROTATION: tl.constexpr, BLOCKS: tl.constexpr):
    """The tokens' rows of both tables, NaN where there is no such row."""
    offs_n = tl.arange(0, BLOCKS.block_n)
    has_row = tokens.mask_m & (table_row >= 0) & (table_row < restore_odd(cos.rows))
    stride_b = divisible(restore_odd(cos.stride_b), BLOCKS.divisor)
    stride_row = divisible(restore_odd(cos.stride_row), BLOCKS.divisor)
    row_offsets = (tokens.batch * stride_b + table_row * stride_row)[:, None]
    if ROTATION.paired:
        first, second = load_pairs(cos.pointer, row_offsets, has_row, ROTATION, BLOCKS)
        if sin_ptr is not None:
            second, _ = load_pairs(sin_ptr, row_offsets, has_row, ROTATION, BLOCKS)
        angles = Angles(first, second)
    else:
        mask = has_row[:, None] & (offs_n < ROTATION.half)[None, :]
        offsets = row_offsets + offs_n[None, :]
        sin_tile = tl.load(sin_ptr + offsets, mask, other=float("nan"))
        angles = Angles(tl.load(cos.pointer + offsets, mask, other=float("nan")), sin_tile)
    return angles
