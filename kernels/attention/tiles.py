"""How attention's kernels read, multiply and write their tiles.

Heads whose dimension is no power of two are held as two chunks that are: 80 columns as 64 and 16.
A tile is therefore a tuple of one or two tensors, `width` and `tail` columns wide as COLUMNS says;
without a tail that is 0. Columns beyond the head's dimension are zero.

An address is an int64 base of the program, plus offsets within the tile.
"""

import triton
import triton.language as tl

from ..common import dot, dropout_keep
from ..structures import restore_odd
from .structures import Dropout, HeadRows, Held


@triton.jit
def load_chunk(
    x,
    rows,
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
    pointers = x.base + rows[:, None] * x.stride + cols[None, :]
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
def count_rows(BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """The numbers of a tile's rows, from which offsets are computed: of 64 bits where WIDE."""
    rows = tl.arange(0, BLOCK)
    return rows.to(tl.int64) if WIDE else rows


@triton.jit
def load_rows(
    x,
    inside,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    VOLATILE: tl.constexpr = False,
):
    """The first BLOCK rows, of which those not `inside` are zero; None for all of them."""
    rows = count_rows(BLOCK, WIDE)
    head = load_chunk(x, rows, inside, 0, COLUMNS.width, COLUMNS.dim, VOLATILE)
    if COLUMNS.tail == 0:
        return (head,)
    else:
        tail = load_chunk(x, rows, inside, COLUMNS.width, COLUMNS.tail, COLUMNS.dim, VOLATILE)
        return (head, tail)


@triton.jit
def skip_rows(x, count):
    """The rows from the one of this number on.

    Loops that go over neighbouring blocks take this step again and again, from each block to the
    next. An address computed from the block's number would make the loop's counter one of 64 bits,
    and NVIDIA's assembler then lets each product on the tensor core wait for the one before.
    """
    return HeadRows(x.base + count * x.stride.to(tl.int64), x.stride)


@triton.jit
def hold_rows(x, inside, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, CUT: tl.constexpr):
    """A tile that a loop needs in every step, or where the cut reloads, what to load it from.

    Where registers do not hold it, loading it again is cheaper than to spill it.
    """
    if CUT.reloads:
        return Held(x, inside)
    else:
        return load_rows(x, inside, COLUMNS, BLOCK, CUT.wide)


@triton.jit
def take_rows(held, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, CUT: tl.constexpr):
    """The tile that `hold_rows` gave, loaded now where the cut reloads."""
    if CUT.reloads:
        return load_rows(held.rows, held.inside, COLUMNS, BLOCK, CUT.wide, True)
    else:
        return held


@triton.jit
def store_chunk(
    x, rows, inside, chunk, FIRST: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr
):
    """Store columns FIRST to FIRST + WIDTH of the rows that are `inside`."""
    cols = FIRST + tl.arange(0, WIDTH)
    pointers = x.base + rows[:, None] * x.stride + cols[None, :]
    mask = inside[:, None] & (cols[None, :] < DIM)
    tl.store(pointers, chunk.to(x.base.dtype.element_ty), mask)


@triton.jit
def store_rows(x, inside, tile, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Store a tile's rows that are `inside`."""
    rows = count_rows(BLOCK, WIDE)
    store_chunk(x, rows, inside, tile[0], 0, COLUMNS.width, COLUMNS.dim)
    if COLUMNS.tail > 0:
        store_chunk(x, rows, inside, tile[1], COLUMNS.width, COLUMNS.tail, COLUMNS.dim)


@triton.jit
def make_zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr, ACC: tl.constexpr):
    """A tile of zeros."""
    WIDTH: tl.constexpr = COLUMNS.width
    TAIL: tl.constexpr = COLUMNS.tail
    if TAIL == 0:
        return (tl.zeros((ROWS, WIDTH), ACC),)
    else:
        return (tl.zeros((ROWS, WIDTH), ACC), tl.zeros((ROWS, TAIL), ACC))


@triton.jit
def scale_tile(tile, factor, COLUMNS: tl.constexpr):
    """The tile times a factor, a scalar or something that broadcasts to each chunk."""
    if COLUMNS.tail == 0:
        return (tile[0] * factor,)
    else:
        return (tile[0] * factor, tile[1] * factor)


@triton.jit
def multiply_rows(a, b, COLUMNS: tl.constexpr, ACC: tl.constexpr, CUT: tl.constexpr):
    """Each row of tile a times each row of tile b: (rows of a, rows of b)."""
    PRECISION: tl.constexpr = CUT.precision
    product = tl.zeros((a[0].shape[0], b[0].shape[0]), ACC)
    product = dot(a[0], tl.trans(b[0]), product, PRECISION)
    if COLUMNS.tail > 0:
        product = dot(a[1], tl.trans(b[1]), product, PRECISION)
    return product


@triton.jit
def sum_weights(weights, CUT: tl.constexpr):
    """The sum of each row of weights in [0, 1].

    In which order that adds up hangs on how the compiler lays the tile out over threads, and thus
    on what else is loaded: a mask, for example. Where CUT asks for exact sums, weights are parted
    in two multiples of such units that no sum of them is rounded, and no order shows. What is left
    of a row is less than half a unit in the last place of 1.
    """
    if CUT.exact_sums:
        BLOCK_N: tl.constexpr = CUT.block_n
        # Whatever such a number is added to loses what is below its last place.
        COARSE: tl.constexpr = 1.5 * BLOCK_N
        FINE: tl.constexpr = 1.5 * BLOCK_N * BLOCK_N * 2.0**-24
        coarse = (weights + COARSE) - COARSE
        fine = ((weights - coarse) + FINE) - FINE
        return tl.sum(coarse, 1) + tl.sum(fine, 1)
    else:
        return tl.sum(weights, 1)


@triton.jit
def add_product(acc, weights, tile, COLUMNS: tl.constexpr, CUT: tl.constexpr):
    """acc + weights @ tile, for weights (rows of acc, rows of tile)."""
    PRECISION: tl.constexpr = CUT.precision
    weights = weights.to(tile[0].dtype)
    if COLUMNS.tail == 0:
        return (dot(weights, tile[0], acc[0], PRECISION),)
    else:
        return (
            dot(weights, tile[0], acc[0], PRECISION),
            dot(weights, tile[1], acc[1], PRECISION),
        )


@triton.jit
def load_log_sum(pointers, inside):
    """lse of some queries. It is infinite for those without keys: their weights are all 0."""
    lse = tl.load(pointers, inside, other=float("inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse)


@triton.jit
def load_prepared(log_sums, deltas, inside, FOLDED: tl.constexpr):
    """What `attention_delta_kernel` has stored of some queries: log sums, and deltas.

    Beyond the last query the one is infinite, and every weight 0. Where scores are FOLDED, and so
    have no terms, they are 0 there and add nothing with a weight of 1 either; what is not 0 would
    be put in again wherever a copy to shared memory is read.
    """
    log_sum = tl.load(log_sums, inside, other=0.0 if FOLDED else float("inf"))
    return log_sum, tl.load(deltas, inside, other=0.0)


@triton.jit
def prepare_dropout(view, pair, ACC: tl.constexpr):
    """What decides upon dropout in a head; () without dropout.

    `pair` counts heads over all batch elements. Every query of every head has a row of its own in
    which keys are the columns; what is kept depends on the seed and on row and column alone.
    """
    if view is None:
        return ()
    else:
        threshold = restore_odd(view.threshold).to(tl.int32)
        factor = 2147483648.0 / (2147483648.0 - threshold.to(ACC))
        first_row = pair.to(tl.int64) * restore_odd(view.max_queries)
        return Dropout(tl.load(view.seed), first_row, threshold, factor)


@triton.jit
def compute_dropout(dropout, offs_m, start_n, CUT: tl.constexpr):
    """By what dropout multiplies the weights of a tile, (BLOCK_M, BLOCK_N): 0 or 1 / (1 - p)."""
    row = dropout.first_row + offs_m
    keep = dropout_keep(dropout.seed, row, start_n, dropout.threshold, CUT.block_m, CUT.block_n)
    return tl.where(keep, dropout.factor, 0.0)
