"""Rings: the buffers in shared memory that blocks of K or of V go round in.

A ring has STAGES buffers, each with two barriers: `ready`, which is completed by the bytes of a
block that have arrived, and `empty`, by all consumers that have done with it. Block i lies in
buffer i mod STAGES, whose barriers serve it for the (i div STAGES)-th time. One waits for a barrier
by the parity of that, its phase: a wait for phase p ends when the last phase completed has this
parity, and of a new barrier that is 1. So the first blocks find their buffers empty.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

# Triton 3.9 renamed it.
copy_box = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


class Ring(NamedTuple):
    """The buffers of a ring and their barriers."""

    chunks: Any
    """For each chunk of columns (see `Columns`) its buffers, (STAGES, 1, 1, rows, columns)."""
    ready: Any
    empty: Any
    """Both (STAGES, 1)."""


class Rows(NamedTuple):
    """The rows of a head from `row` on, for a copy."""

    element: Any
    head: Any
    row: Any


@gluon.jit
def allocate_barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """COUNT barriers, each completed by so many arrivals."""
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers


@gluon.jit
def allocate_chunk(desc, COUNT: gl.constexpr):
    """COUNT buffers for the blocks of a descriptor."""
    SHAPE: gl.constexpr = [COUNT, 1, 1, desc.block_shape[2], desc.block_shape[3]]
    return gl.allocate_shared_memory(desc.dtype, SHAPE, desc.layout)


@gluon.jit
def allocate_chunks(descs, COUNT: gl.constexpr):
    """COUNT buffers for the blocks of each descriptor."""
    if len(descs) == 1:
        return (allocate_chunk(descs[0], COUNT),)
    else:
        return (allocate_chunk(descs[0], COUNT), allocate_chunk(descs[1], COUNT))


@gluon.jit
def make_ring(descs, CUT: gl.constexpr):
    """An empty ring for the blocks of some descriptors."""
    return Ring(
        allocate_chunks(descs, CUT.stages),
        allocate_barriers(CUT.stages, 1),
        allocate_barriers(CUT.stages, CUT.consumers),
    )


@gluon.jit
def start_copy(descs, rows, chunks, ready, place):
    """Begin to copy rows to the buffers at a place; the last byte completes `ready`."""
    first = [rows.element, rows.head, rows.row, 0]
    if len(descs) == 1:
        mbarrier.expect(ready, descs[0].block_type.nbytes)
        copy_box(descs[0], first, ready, chunks[0].index(place))
    else:
        mbarrier.expect(ready, descs[0].block_type.nbytes + descs[1].block_type.nbytes)
        copy_box(descs[0], first, ready, chunks[0].index(place))
        tail = [rows.element, rows.head, rows.row, descs[0].block_shape[3]]
        copy_box(descs[1], tail, ready, chunks[1].index(place))


@gluon.jit
def put_block(ring, descs, rows, block, CUT: gl.constexpr):
    """Begin to copy the block of a number into the ring as soon as its buffer is empty."""
    stage = block % CUT.stages
    phase = (block // CUT.stages) & 1
    mbarrier.wait(ring.empty.index(stage), phase ^ 1)
    own = Rows(rows.element, rows.head, rows.row + block * CUT.block_n)
    start_copy(descs, own, ring.chunks, ring.ready.index(stage), stage)


@gluon.jit
def await_block(ring, block, CUT: gl.constexpr):
    """Wait for the block of a number, and return the place of its buffer."""
    stage = block % CUT.stages
    phase = (block // CUT.stages) & 1
    mbarrier.wait(ring.ready.index(stage), phase)
    return stage


@gluon.jit
def free_block(ring, block, CUT: gl.constexpr):
    """Tell that a consumer has done with a block."""
    mbarrier.arrive(ring.empty.index(block % CUT.stages), count=1)


@gluon.jit
def take_tile(chunk, place):
    """The tile at a place of a chunk's buffers, (rows, columns)."""
    tile = chunk.index(place)
    return tile.reshape([tile.shape[2], tile.shape[3]])
