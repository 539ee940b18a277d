"""Rows that belong to experts: which rows a tile has, and which expert they have in common.

The rows of a grouped product are sorted by expert: expert e of E has those from offsets[e] up to
offsets[e + 1], an integer tensor (E + 1,) that begins with 0. Rows from offsets[E] on belong to no
expert. A launch knows how many rows there are, and starts as many programs as could be needed
however they are spread. Each finds its tile from offsets on the device, so that nothing waits for
the host; a program too many ends at once. Whatever offsets hold, no access leaves a tensor.

An operand may be gathered: row r of the product is then row index[r] of it.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..matmul.tiles import Panel, Tile, number_elements, slice_rows


class Group(NamedTuple):
    """Some rows of one expert: its number, the first row, and how many there are from it on.

    The expert's number is E for rows that belong to none, and larger where there are no rows.
    """

    expert: Any
    first_row: Any
    left: Any


@triton.jit
def find_group(tile_m, offsets_ptr, rows, experts, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """The rows of row of tiles number `tile_m`. EXPERTS is a power of two above `experts`."""
    rows = rows.to(tl.int64)
    number = tl.arange(0, EXPERTS)
    # Behind the last expert come the rows of none; they begin where it ends, and end with all.
    before = tl.where(number == 0, 0, rows)
    known = (number > 0) & (number <= experts)
    start = tl.load(offsets_ptr + number, known, other=0).to(tl.int64)
    start = tl.where(known, tl.minimum(tl.maximum(start, 0), rows), before)
    known = number < experts
    end = tl.load(offsets_ptr + 1 + number, known, other=0).to(tl.int64)
    end = tl.where(known, tl.minimum(tl.maximum(end, 0), rows), rows)
    tiles = tl.cdiv(tl.maximum(end - start, 0), BLOCK_M).to(tl.int32)
    tiles_up_to = tl.cumsum(tiles, 0)
    expert = tl.sum((tiles_up_to <= tile_m).to(tl.int32), 0)
    own = number == expert
    tiles_before = tl.sum(tl.where(own, tiles_up_to - tiles, 0), 0)
    first_row = tl.sum(tl.where(own, start, 0), 0)
    first_row += (tile_m - tiles_before).to(tl.int64) * BLOCK_M
    return Group(expert, first_row, tl.sum(tl.where(own, end, 0), 0) - first_row)


@triton.jit
def choose_group(offsets_ptr, rows, experts, tiles_m, n, EXPERTS: tl.constexpr, CUT: tl.constexpr):
    """This program's group, and its tile of the result of n columns.

    `tiles_m` is the number of rows of tiles that were launched.
    """
    index = tl.program_id(0)
    group_size = CUT.group_m * tl.cdiv(n, CUT.block_n)
    first = index // group_size * CUT.group_m
    height = tl.minimum(tiles_m - first, CUT.group_m)
    tile_m = first + index % group_size % height
    first_n = (index % group_size // height).to(tl.int64) * CUT.block_n
    group = find_group(tile_m, offsets_ptr, rows, experts, EXPERTS, CUT.block_m)
    return group, Tile(group.first_row, first_n, group.left, n - first_n)


@triton.jit
def find_rows(index_ptr, tile, BLOCK_M: tl.constexpr):
    """Where an operand has the rows of a tile, (BLOCK_M,) in 64 bits; 0 for rows past its end."""
    offs_m = tl.arange(0, BLOCK_M)
    if index_ptr is None:
        return tile.first_m + offs_m
    else:
        place = index_ptr + tile.first_m + offs_m
        return tl.load(place, offs_m < tile.left_m, other=0).to(tl.int64)


@triton.jit
def gather_rows(pointer, stride, index_ptr, tile, CUT: tl.constexpr):
    """The rows that a tile needs of an operand, gathered where there is an index."""
    if index_ptr is None:
        return slice_rows(pointer, stride, 1, tile, CUT)
    else:
        offs_k = number_elements(CUT.block_k, CUT.far_apart)
        offsets = (find_rows(index_ptr, tile, CUT.block_m) * stride)[:, None] + offs_k[None, :]
        mask = (tl.arange(0, CUT.block_m) < tile.left_m)[:, None]
        return Panel(pointer, offsets, mask, 1)


@triton.jit
def find_expert_rows(expert, offsets_ptr, rows):
    """The first row of an expert, and the end of its rows."""
    rows = rows.to(tl.int64)
    start = tl.minimum(tl.maximum(tl.load(offsets_ptr + expert).to(tl.int64), 0), rows)
    end = tl.minimum(tl.maximum(tl.load(offsets_ptr + expert + 1).to(tl.int64), 0), rows)
    return tl.where(expert == 0, 0, start), end


def most_tiles(rows: int, experts: int, block_m: int) -> int:
    """Rows of tiles that the rows of all experts, and those of none, can take at most."""
    return rows // block_m + min(experts + 1, rows)
