"""How attention's kernels go over the blocks that a mask lists, and over no others.

The args of such a mask begin with the four tensors of `BlockLists` and end with its six integers,
in that order. What the mask has besides stands between them.
"""

import triton
import triton.language as tl


@triton.jit
def count_listed(before_ptr, x, cols, size, BLOCK: tl.constexpr):
    """How many tiles of BLOCK are listed before x, a multiple of BLOCK."""
    block = x // size
    before = tl.load(before_ptr + block)
    # Behind the last block there is none to be listed.
    listed = tl.load(before_ptr + tl.minimum(block + 1, cols)) - before
    return before * (size // BLOCK) + listed * (x % size // BLOCK)


@triton.jit
def find_span(before_ptr, first, end, table_row, cols, size, BLOCK: tl.constexpr):
    """The positions in a row's list of the tiles from first to end."""
    before_ptr += table_row.to(tl.int64) * (cols + 1)
    first = tl.minimum(first // BLOCK * BLOCK, cols * size)
    # What nobody sees may end before the sequence begins.
    end = tl.maximum(tl.minimum(tl.cdiv(end, BLOCK) * BLOCK, cols * size), first)
    return (
        count_listed(before_ptr, first, cols, size, BLOCK),
        count_listed(before_ptr, end, cols, size, BLOCK),
    )


@triton.jit
def find_start(blocks_ptr, position, table_row, cols, size, BLOCK: tl.constexpr):
    """The first row or column of the tile at a position in a row's list."""
    tiles = size // BLOCK
    block = tl.load(blocks_ptr + table_row.to(tl.int64) * cols + position // tiles)
    return tl.multiple_of(block * size + position % tiles * BLOCK, BLOCK)


@triton.jit
def find_table(lists, place):
    """The table of a batch element and head."""
    return place.batch * lists.batch_step + place.head * lists.head_step


@triton.jit
def find_row(lists, place):
    """The row of a tile's queries, counted over all tables."""
    return find_table(lists, place) * lists.rows + place.first_m // lists.queries


@triton.jit
def find_column(lists, place):
    """The column of a tile's keys, counted over all tables."""
    return find_table(lists, place) * lists.columns + place.first_n // lists.keys


@triton.jit
def find_listed_keys(first, end, place, lists, BLOCK: tl.constexpr):
    """The first and end position in the list of key tiles, of those from key first to end."""
    row = find_row(lists, place)
    return find_span(lists.row_counts, first, end, row, lists.columns, lists.keys, BLOCK)


@triton.jit
def find_listed_key(position, place, lists, BLOCK: tl.constexpr):
    """The first key of the tile at a position in the list."""
    row = find_row(lists, place)
    return find_start(lists.row_blocks, position, row, lists.columns, lists.keys, BLOCK)


@triton.jit
def find_listed_queries(first, end, place, lists, BLOCK: tl.constexpr):
    """The first and end position in the list of query tiles, of those from query first to end."""
    column = find_column(lists, place)
    return find_span(lists.column_counts, first, end, column, lists.rows, lists.queries, BLOCK)


@triton.jit
def find_listed_query(position, place, lists, BLOCK: tl.constexpr):
    """The first query of the tile at a position in the list."""
    column = find_column(lists, place)
    return find_start(lists.column_blocks, position, column, lists.rows, lists.queries, BLOCK)
