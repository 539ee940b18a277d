"""How attention's kernels find and read their tiles.

Heads whose dimension is no power of two are held as two chunks that are: 80 columns as 64 and 16.
A tile is therefore a tuple of one or two tensors, `WIDTH` and `TAIL` columns wide; without a tail
`TAIL` is 0. Columns beyond the head's dimension `DIM` are zero.

An address is an int64 base of the program, plus offsets within the tile.
"""

import triton
import triton.language as tl

from ..common import divisible, dot, dropout_keep


@triton.jit
def load_chunk(
    base,
    rows,
    stride,
    inside,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    DIM: tl.constexpr,
    VOLATILE: tl.constexpr = False,
):
    """Columns FIRST to FIRST + WIDTH of some rows; zeros beyond DIM and where not `inside`.

    A VOLATILE load stays where it is, also in a loop that it has nothing of.
    """
    cols = FIRST + tl.arange(0, WIDTH)
    pointers = base + rows[:, None] * stride + cols[None, :]
    if FIRST + WIDTH > DIM:
        mask = cols[None, :] < DIM
        if inside is not None:
            mask = mask & inside[:, None]
        return tl.load(pointers, mask, other=0.0, volatile=VOLATILE)
    elif inside is not None:
        return tl.load(pointers, inside[:, None], other=0.0, volatile=VOLATILE)
    else:
        return tl.load(pointers, volatile=VOLATILE)


@triton.jit
def load_tile(
    base,
    rows,
    stride,
    inside,
    WIDTH: tl.constexpr,
    TAIL: tl.constexpr,
    DIM: tl.constexpr,
    VOLATILE: tl.constexpr = False,
):
    """Some rows of a tensor, of which those not `inside` are zero; None for all of them."""
    head = load_chunk(base, rows, stride, inside, 0, WIDTH, DIM, VOLATILE)
    if TAIL == 0:
        return (head,)
    else:
        return (head, load_chunk(base, rows, stride, inside, WIDTH, TAIL, DIM, VOLATILE))


@triton.jit
def held_tile(
    base,
    rows,
    stride,
    inside,
    WIDTH: tl.constexpr,
    TAIL: tl.constexpr,
    DIM: tl.constexpr,
    RELOADS: tl.constexpr,
):
    """A tile that a loop needs in every step, or where it RELOADS, what to load it from.

    Where registers do not hold it, loading it again is cheaper than to spill it.
    """
    if RELOADS:
        return (base, rows, stride, inside)
    else:
        return load_tile(base, rows, stride, inside, WIDTH, TAIL, DIM)


@triton.jit
def in_hand(
    held, WIDTH: tl.constexpr, TAIL: tl.constexpr, DIM: tl.constexpr, RELOADS: tl.constexpr
):
    """The tile that `held_tile` gave, loaded now where it RELOADS."""
    if RELOADS:
        return load_tile(held[0], held[1], held[2], held[3], WIDTH, TAIL, DIM, True)
    else:
        return held


@triton.jit
def store_chunk(
    base, rows, stride, inside, x, FIRST: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr
):
    cols = FIRST + tl.arange(0, WIDTH)
    pointers = base + rows[:, None] * stride + cols[None, :]
    mask = inside[:, None] & (cols[None, :] < DIM)
    tl.store(pointers, x.to(base.dtype.element_ty), mask)


@triton.jit
def store_tile(
    base, rows, stride, inside, tile, WIDTH: tl.constexpr, TAIL: tl.constexpr, DIM: tl.constexpr
):
    """Store a tile's rows that are `inside`."""
    store_chunk(base, rows, stride, inside, tile[0], 0, WIDTH, DIM)
    if TAIL > 0:
        store_chunk(base, rows, stride, inside, tile[1], WIDTH, TAIL, DIM)


@triton.jit
def zero_tile(ROWS: tl.constexpr, WIDTH: tl.constexpr, TAIL: tl.constexpr, ACC: tl.constexpr):
    if TAIL == 0:
        return (tl.zeros((ROWS, WIDTH), ACC),)
    else:
        return (tl.zeros((ROWS, WIDTH), ACC), tl.zeros((ROWS, TAIL), ACC))


@triton.jit
def scaled_tile(tile, factor, TAIL: tl.constexpr):
    """The tile times a factor, a scalar or something that broadcasts to each chunk."""
    if TAIL == 0:
        return (tile[0] * factor,)
    else:
        return (tile[0] * factor, tile[1] * factor)


@triton.jit
def dot_of_rows(a, b, TAIL: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """Each row of tile a times each row of tile b: (rows of a, rows of b)."""
    product = tl.zeros((a[0].shape[0], b[0].shape[0]), ACC)
    product = dot(a[0], tl.trans(b[0]), product, PRECISION)
    if TAIL > 0:
        product = dot(a[1], tl.trans(b[1]), product, PRECISION)
    return product


@triton.jit
def add_product(acc, weights, tile, TAIL: tl.constexpr, PRECISION: tl.constexpr):
    """acc + weights @ tile, for weights (rows of acc, rows of tile)."""
    weights = weights.to(tile[0].dtype)
    if TAIL == 0:
        return (dot(weights, tile[0], acc[0], PRECISION),)
    else:
        return (
            dot(weights, tile[0], acc[0], PRECISION),
            dot(weights, tile[1], acc[1], PRECISION),
        )


@triton.jit
def sequence(cumulative_ptr, batch, length):
    """Where a sequence lies: its batch element in memory, its first row there, and its length.

    Packed sequences share one batch element and have cumulative lengths.
    """
    element = batch
    begin = 0
    if cumulative_ptr is not None:
        element = 0
        begin = tl.load(cumulative_ptr + batch)
        length = tl.load(cumulative_ptr + batch + 1) - begin
    return element, begin, length


@triton.jit
def base_of(pointer, element, head, row, stride_b, stride_h, stride_row, DIVISOR: tl.constexpr):
    """The address of a row of one head."""
    return (
        pointer
        + element * divisible(stride_b, DIVISOR).to(tl.int64)
        + head * divisible(stride_h, DIVISOR).to(tl.int64)
        + row * divisible(stride_row, DIVISOR).to(tl.int64)
    )


@triton.jit
def statistics_of(pointer, element, head, row, stride_b, stride_h):
    """The address of one query's number in a tensor (B, H, M)."""
    return pointer + element * stride_b.to(tl.int64) + head * stride_h.to(tl.int64) + row


@triton.jit
def load_log_sum(pointers, inside):
    """lse of some queries. It is infinite for those without keys: their weights are all 0."""
    lse = tl.load(pointers, inside, other=float("inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse)


@triton.jit
def dropout_of(seed_ptr, pair, max_queries, threshold, ACC: tl.constexpr):
    """What decides upon dropout in a head: seed, the number of its first row, threshold, scale.

    `pair` counts heads over all batch elements. Every query of every head has a row of its own in
    which keys are the columns; what is kept depends on the seed and on row and column alone.
    """
    scale = 2147483648.0 / (2147483648.0 - threshold.to(ACC))
    return tl.load(seed_ptr), pair.to(tl.int64) * max_queries, threshold, scale


@triton.jit
def dropout_factor(dropout, offs_m, start_n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """By what dropout multiplies the weights of a tile, (BLOCK_M, BLOCK_N): 0 or 1 / (1 - p)."""
    seed, first_row, threshold, scale = dropout
    keep = dropout_keep(seed, first_row + offs_m, start_n, threshold, BLOCK_M, BLOCK_N)
    return tl.where(keep, scale, 0.0)
