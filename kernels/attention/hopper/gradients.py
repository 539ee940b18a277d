"""What the backward kernels share: products that begin at a number, and buffers of numbers.

A product is added to what its registers hold. Those of scores begin at -lse / scale, and those of
do . v at -delta: the sums are then what is taken to the power, and what weights are multiplied
by, and no register has to keep lse or delta while a product runs.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .consumer import ROWS, issue_chunk, make_sums, product_layout
from .ring import Ring, allocate_barriers, allocate_chunks, await_block, copy_box, take_tile


class NumberedRing(NamedTuple):
    """A ring of rows that have a number each, lse or delta, which come with them."""

    ring: Any
    numbers: Any
    """(STAGES, rows) float32."""


@gluon.jit
def make_numbered_ring(descs, numbers_desc, CUT: gl.constexpr):
    """An empty ring. Its `ready` awaits the rows of each chunk and the numbers together."""
    ring = Ring(
        allocate_chunks(descs, CUT.stages),
        allocate_barriers(CUT.stages, 1),
        allocate_barriers(CUT.stages, CUT.consumers),
    )
    SHAPE: gl.constexpr = [CUT.stages, numbers_desc.block_shape[0]]
    numbers = gl.allocate_shared_memory(gl.float32, SHAPE, numbers_desc.layout)
    return NumberedRing(ring, numbers)


@gluon.jit
def put_rows(target, descs, numbers_desc, rows, first_number, turn, CUT: gl.constexpr):
    """Begin to copy rows and their numbers for a turn as soon as its buffer is empty."""
    ring = target.ring
    stage = turn % CUT.stages
    phase = (turn // CUT.stages) & 1
    mbarrier.wait(ring.empty.index(stage), phase ^ 1)
    ready = ring.ready.index(stage)
    first = [rows.element, rows.head, rows.row, 0]
    HEAD: gl.constexpr = descs[0].block_type.nbytes + numbers_desc.block_type.nbytes
    if len(descs) == 1:
        mbarrier.expect(ready, HEAD)
    else:
        mbarrier.expect(ready, HEAD + descs[1].block_type.nbytes)
        tail = [rows.element, rows.head, rows.row, descs[0].block_shape[3]]
        copy_box(descs[1], tail, ready, ring.chunks[1].index(stage))
    copy_box(descs[0], first, ready, ring.chunks[0].index(stage))
    copy_box(numbers_desc, [first_number], ready, target.numbers.index(stage))


@gluon.jit
def issue_transposed(own, source, factor, turn, CUT: gl.constexpr):
    """Issue the product of a consumer's keys with the rows of a turn, (ROWS, BLOCK_M).

    It begins at the rows' numbers times a factor.
    """
    BLOCK_M: gl.constexpr = CUT.block_m
    S: gl.constexpr = product_layout(BLOCK_M)
    place = await_block(source.ring, turn, CUT)
    numbers = source.numbers.index(place).load(gl.SliceLayout(0, S))
    factors = gl.full([ROWS, BLOCK_M], factor, gl.float32, S)
    begin, _ = gl.broadcast(numbers[None, :], factors)
    # LLVM would move an ordinary multiplication behind the fence that registers must be written
    # before, and so it would a copy.
    sums = gl.inline_asm_elementwise(
        "mul.rn.f32 $0, $1, $2;", "=f,f,f", [begin, factors], gl.float32, is_pure=False, pack=1
    )
    for i in gl.static_range(len(own)):
        rows = take_tile(source.ring.chunks[i], place).permute((1, 0))
        sums = warpgroup_mma(own[i], rows, sums, is_async=True)
    return sums


@gluon.jit
def issue_sums(acc, weights, ring, turn, CUT: gl.constexpr):
    """Issue the product of weights with the rows of a turn, which is added to `acc`."""
    place = turn % CUT.stages
    if len(acc) == 1:
        return (issue_chunk(acc[0], weights, take_tile(ring.chunks[0], place)),)
    else:
        return (
            issue_chunk(acc[0], weights, take_tile(ring.chunks[0], place)),
            issue_chunk(acc[1], weights, take_tile(ring.chunks[1], place)),
        )


@gluon.constexpr_function
def rounding(dtype):
    """The instruction that rounds two numbers to a dtype of 16 bits."""
    return f"cvt.rn.{'bf16x2' if dtype == gl.bfloat16 else 'f16x2'}.f32 $0, $2, $1;"


@gluon.jit
def round_weights(weights, tile):
    """Weights in the dtype of a tile, of 16 bits. LLVM would do that behind the fence too."""
    ROUNDING: gl.constexpr = rounding(tile.dtype)
    return gl.inline_asm_elementwise(
        ROUNDING, "=r,r,r", [weights], tile.dtype, is_pure=False, pack=2
    )


@gluon.jit
def await_sums(acc, other, PENDING: gl.constexpr):
    """`acc` and another product when all but the last few are done."""
    if len(acc) == 1:
        head, other = warpgroup_mma_wait(PENDING, deps=(acc[0], other))
        return (head,), other
    else:
        head, tail, other = warpgroup_mma_wait(PENDING, deps=(acc[0], acc[1], other))
        return (head, tail), other


@gluon.jit
def clear_chunk(tile, first, end):
    """Set all rows of a tile but those from first to end to zero."""
    WIDTH: gl.constexpr = tile.shape[1]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [4, 1], [1, 0])
    rows = gl.arange(0, tile.shape[0], gl.SliceLayout(1, LAYOUT))
    kept = (rows >= first) & (rows < end)
    tile.store(gl.where(kept[:, None], tile.load(LAYOUT), 0.0))


@gluon.jit
def clear_rows(ring, turn, first, end, CUT: gl.constexpr):
    """Set all rows of a turn but those from first to end to zero, for nobody here sees them.

    What they are multiplied by is 0, but 0 times NaN would be NaN.
    """
    place = await_block(ring, turn, CUT)
    for i in gl.static_range(len(ring.chunks)):
        clear_chunk(take_tile(ring.chunks[i], place), first, end)
    fence_async_shared()


@gluon.jit
def take_tiles(chunks, place):
    """The tiles at a place of each chunk's buffers."""
    if len(chunks) == 1:
        return (take_tile(chunks[0], place),)
    else:
        return (take_tile(chunks[0], place), take_tile(chunks[1], place))


@gluon.jit
def store_chunk(rows, tile, factor, left, NUMBER: gl.constexpr, COLUMN: gl.constexpr):
    """Store a chunk times a factor, from a column on."""
    WIDTH: gl.constexpr = tile.shape[1]
    LAYOUT: gl.constexpr = tile.type.layout
    offs = ROWS * NUMBER + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    columns = COLUMN + gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT))
    pointers = rows.base + offs.to(gl.int64)[:, None] * rows.stride + columns[None, :]
    gl.store(pointers, (tile * factor).to(rows.base.dtype.element_ty), (offs < left)[:, None])


@gluon.jit
def store_rows(rows, tile, factor, left, NUMBER: gl.constexpr):
    """Store a consumer's rows times a factor. The program's begin at `rows`, and so many are left
    of the sequence."""
    store_chunk(rows, tile[0], factor, left, NUMBER, 0)
    if len(tile) == 2:
        store_chunk(rows, tile[1], factor, left, NUMBER, tile[0].shape[1])


@gluon.jit
def store_zeros(rows, left, COLUMNS: gl.constexpr, CUT: gl.constexpr):
    """Store zeros to a program's rows, of which so many are left of the sequence."""
    CONSUMERS: gl.constexpr = CUT.consumers
    zeros = make_sums(COLUMNS)
    for consumer in gl.static_range(CONSUMERS):
        store_rows(rows, zeros, 1.0, left, consumer)
