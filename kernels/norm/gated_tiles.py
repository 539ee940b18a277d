"""What the gated norms' kernels do with one tile of a group: reading it, and what the gate does.

The names are those of gated_forward.py.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..common import divisible
from ..gated_activation import activation_and_slope
from ..row_tiles import load_tile
from ..structures import Rows


class GatedNorm(NamedTuple):
    """Which gated norm it is, as a constexpr."""

    gate_first: bool
    activation: str
    casting: str | None = None
    """Where the forward rounds, which the backward is not told."""


class Layout(NamedTuple):
    """How rows lie in memory, and how many groups of how many columns they have."""

    stride_x: Any
    stride_gate: Any
    stride_dy: Any
    """Of the backward alone."""
    cols: Any
    groups: Any


class Place(NamedTuple):
    """What of a launch's rows is a program's: a group, columns of it from one on, rows."""

    group: Any
    first_col: Any
    block: Any
    """Which of the blocks of rows."""


class Group(NamedTuple):
    """One group of columns: rows of x and gate, the weight and rstd that begin there."""

    x: Any
    gate: Any
    weight_ptr: Any
    rstd_ptr: Any
    first: Any
    """Its first column."""
    cols: Any


class GatedTile(NamedTuple):
    """Tiles of x, of the gate's activation and its slope, and of h."""

    x: Any
    activated: Any
    slope: Any
    hidden: Any


@triton.jit
def place_program(layout, BLOCKS: tl.constexpr):
    """Neighbouring programs have neighbouring columns of the same rows."""
    column_tiles = tl.cdiv(layout.cols, BLOCKS.block_n)
    tiles = layout.groups * column_tiles
    program = tl.program_id(0)
    tile = program % tiles
    return Place(tile // column_tiles, tile % column_tiles * BLOCKS.block_n, program // tiles)


@triton.jit
def find_group(x_ptr, gate_ptr, weight_ptr, rstd_ptr, layout, number, BLOCKS: tl.constexpr):
    """The group of this number."""
    cols = divisible(layout.cols, BLOCKS.divisor)
    first = number * cols
    return Group(
        Rows(x_ptr + first, divisible(layout.stride_x, BLOCKS.divisor)),
        Rows(gate_ptr + first, divisible(layout.stride_gate, BLOCKS.divisor)),
        None if weight_ptr is None else weight_ptr + first,
        rstd_ptr + number,
        first,
        cols,
    )


@triton.jit
def load_gated(group, tile, NORM: tl.constexpr):
    """Read a tile of x and one of the gate."""
    ACTIVATION: tl.constexpr = NORM.activation
    x = load_tile(group.x, tile)
    activated, slope = activation_and_slope(load_tile(group.gate, tile), ACTIVATION, 1.0)
    return GatedTile(x, activated, slope, x * activated if NORM.gate_first else x)


@triton.jit
def load_hidden(group, tile, NORM: tl.constexpr):
    """A tile of h alone, for which the gate may not be needed."""
    if NORM.gate_first:
        hidden = load_gated(group, tile, NORM).hidden
    else:
        hidden = load_tile(group.x, tile)
    return hidden


@triton.jit
def load_weight(group, tile, ACC: tl.constexpr):
    """The weight of a tile's columns (1, BLOCK_N)."""
    return tl.load(group.weight_ptr + tile.offs_n, tile.mask_n, other=0.0).to(ACC)[None, :]
