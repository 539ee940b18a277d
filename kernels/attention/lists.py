"""How attention's kernels go over the blocks that a mask lists, and over no others."""

import triton
import triton.language as tl

BLOCK_LISTS = 6
"""How the args of a mask whose blocks are listed begin and end.

They begin with four int32 tensors, of a table with a row for each block of queries and a column for
each block of keys: (tables, rows, columns + 1) how many blocks a row lists before each column,
(tables, rows, columns) the columns that it lists in rising order, and the same two of the table's
transpose. They end with so many integers: the queries and the keys of a block, the rows and the
columns, and the steps between the tables of batch elements and of heads.
"""


@triton.jit
def listed_tiles_before(before_ptr, x, cols, size, BLOCK: tl.constexpr):
    """How many tiles of BLOCK are listed before x, a multiple of BLOCK."""
    block = x // size
    before = tl.load(before_ptr + block)
    # Behind the last block there is none to be listed.
    listed = tl.load(before_ptr + tl.minimum(block + 1, cols)) - before
    return before * (size // BLOCK) + listed * (x % size // BLOCK)


@triton.jit
def listed_span(before_ptr, first, end, table_row, cols, size, BLOCK: tl.constexpr):
    before_ptr += table_row.to(tl.int64) * (cols + 1)
    first = tl.minimum(first // BLOCK * BLOCK, cols * size)
    # What nobody sees may end before the sequence begins.
    end = tl.maximum(tl.minimum(tl.cdiv(end, BLOCK) * BLOCK, cols * size), first)
    return (
        listed_tiles_before(before_ptr, first, cols, size, BLOCK),
        listed_tiles_before(before_ptr, end, cols, size, BLOCK),
    )


@triton.jit
def listed_start(blocks_ptr, position, table_row, cols, size, BLOCK: tl.constexpr):
    tiles = size // BLOCK
    block = tl.load(blocks_ptr + table_row.to(tl.int64) * cols + position // tiles)
    return tl.multiple_of(block * size + position % tiles * BLOCK, BLOCK)


@triton.jit
def table_row(row, rows, place, args):
    """A row of the table of a batch element and head, counted over all tables."""
    table = place[0] * args[len(args) - 2] + place[1] * args[len(args) - 1]
    return table * rows + row


@triton.jit
def listed_keys(first, end, place, args, BLOCK: tl.constexpr):
    """The first and end position in the list of key tiles, of those from key first to end."""
    row = table_row(place[4] // args[len(args) - 6], args[len(args) - 4], place, args)
    return listed_span(args[0], first, end, row, args[len(args) - 3], args[len(args) - 5], BLOCK)


@triton.jit
def listed_key(position, place, args, BLOCK: tl.constexpr):
    """The first key of the tile at a position in the list."""
    row = table_row(place[4] // args[len(args) - 6], args[len(args) - 4], place, args)
    return listed_start(args[1], position, row, args[len(args) - 3], args[len(args) - 5], BLOCK)


@triton.jit
def listed_queries(first, end, place, args, BLOCK: tl.constexpr):
    """The first and end position in the list of query tiles, of those from query first to end."""
    row = table_row(place[5] // args[len(args) - 5], args[len(args) - 3], place, args)
    return listed_span(args[2], first, end, row, args[len(args) - 4], args[len(args) - 6], BLOCK)


@triton.jit
def listed_query(position, place, args, BLOCK: tl.constexpr):
    """The first query of the tile at a position in the list."""
    row = table_row(place[5] // args[len(args) - 5], args[len(args) - 3], place, args)
    return listed_start(args[3], position, row, args[len(args) - 4], args[len(args) - 6], BLOCK)
