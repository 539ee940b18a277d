"""What a consumer does: 64 queries of its own against the blocks of K and V that go by.

It issues the product of its queries with a block of keys before it waits for that of the weights of
the block before with its values: the tensor cores do the latter while the consumer's warps make
weights of the former's scores. Consumers may take turns to issue: else all of them may wait for the
tensor cores at once, and then leave them idle at once.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..structures import State
from ..terms import apply_masks
from .ring import await_block, free_block, take_tile

ROWS = gl.constexpr(64)
"""Queries of a consumer: as many rows has a product of one warpgroup."""


class Span(NamedTuple):
    """The keys of a program, and how its blocks fall into parts, see `has_part`."""

    first_n: Any
    """Where the first block begins."""
    seen_n: Any
    """The first key that any query sees."""
    end_n: Any
    first_full: Any
    """The number of the first block that all queries see whole; the blocks before have masks."""
    end_full: Any
    """The number of the first block after these."""
    blocks: Any


class Supply(NamedTuple):
    """What consumers have in common."""

    k: Any
    """The ring of keys."""
    v: Any
    may_issue: Any
    """(consumers, 1): whether each may issue the products of its next block, see `await_issue`."""


class Task(NamedTuple):
    """What a consumer multiplies."""

    q: Any
    """Its queries, for each chunk of columns a tile in shared memory."""
    offs_m: Any
    place: Any
    masks: Any
    """The arguments of all masks."""
    scale_log2: Any


@gluon.constexpr_function
def product_layout(columns):
    """How the four warps of a warpgroup hold a product of so many columns."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.jit
def make_sums(COLUMNS: gl.constexpr):
    """An accumulator of zeros, in chunks."""
    WIDTH: gl.constexpr = COLUMNS.width
    TAIL: gl.constexpr = COLUMNS.tail
    head = gl.zeros([ROWS, WIDTH], gl.float32, product_layout(WIDTH))
    if TAIL == 0:
        return (head,)
    else:
        return (head, gl.zeros([ROWS, TAIL], gl.float32, product_layout(TAIL)))


@gluon.jit
def issue_scores(q, ring, block, CUT: gl.constexpr):
    """Issue the product of the queries with a block of keys, (ROWS, BLOCK_N)."""
    BLOCK_N: gl.constexpr = CUT.block_n
    place = await_block(ring, block, CUT)
    scores = gl.zeros([ROWS, BLOCK_N], gl.float32, product_layout(BLOCK_N))
    for i in gl.static_range(len(q)):
        keys = take_tile(ring.chunks[i], place).permute((1, 0))
        scores = warpgroup_mma(q[i], keys, scores, use_acc=i > 0, is_async=True)
    return scores


@gluon.jit
def make_operand(weights, acc, DTYPE: gl.constexpr):
    """Weights as the products take them that are added to a chunk of the accumulator."""
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, 2)
    return gl.convert_layout(weights.to(DTYPE), OPERAND)


@gluon.jit
def issue_chunk(acc, weights, values):
    """Issue the product of weights with a chunk of values."""
    operand = make_operand(weights, acc, values.dtype)
    return warpgroup_mma(operand, values, acc, is_async=True)


@gluon.jit
def issue_values(acc, weights, ring, block, CUT: gl.constexpr):
    """Issue the product of weights with a block of values, which is added to `acc`."""
    place = await_block(ring, block, CUT)
    issued = ()
    for i in gl.static_range(len(acc)):
        issued = issued + (issue_chunk(acc[i], weights, take_tile(ring.chunks[i], place)),)
    return issued


@gluon.jit
def await_values(issued):
    """The accumulator when all products are done."""
    if len(issued) == 1:
        return (warpgroup_mma_wait(0, deps=(issued[0],)),)
    else:
        return warpgroup_mma_wait(0, deps=(issued[0], issued[1]))


@gluon.jit
def scale_rows(tile, factor):
    """Each row of a tile times a factor."""
    ROW: gl.constexpr = gl.SliceLayout(1, tile.type.layout)
    return tile * gl.convert_layout(factor, ROW)[:, None]


@gluon.jit
def scale_sums(acc, factor):
    """Each row of the accumulator times a factor."""
    scaled = ()
    for i in gl.static_range(len(acc)):
        scaled = scaled + (scale_rows(acc[i], factor),)
    return scaled


@gluon.jit
def await_issue(supply, block, NUMBER: gl.constexpr):
    """Wait until the consumer before has issued its products of a block, from block 1 on.

    The first consumer comes before the last one: what it waits for is the last one's block before,
    and nothing for block 1.
    """
    phase = (block - 1) & 1
    mbarrier.wait(supply.may_issue.index(NUMBER), phase ^ 1 if NUMBER == 0 else phase)


@gluon.jit
def pass_issue(supply, NUMBER: gl.constexpr, CUT: gl.constexpr):
    """Let the next consumer issue its products."""
    mbarrier.arrive(supply.may_issue.index((NUMBER + 1) % CUT.consumers), count=1)


@gluon.jit
def weigh_scores(
    scores, block, row_max, row_sum, task, span, TERMS: gl.constexpr, CUT: gl.constexpr,
    MASKED: gl.constexpr,
):  # fmt: skip
    """Weights of a block's scores; by what the sums before are multiplied; and max and sum now."""
    if MASKED:
        LAYOUT: gl.constexpr = gl.SliceLayout(0, scores.type.layout)
        n = (span.first_n + block * CUT.block_n + gl.arange(0, CUT.block_n, LAYOUT))[None, :]
        keep = (n >= span.seen_n) & (n < span.end_n)
        keep = apply_masks(keep, task.offs_m[:, None], n, task.place, task.masks, TERMS)
        scores = gl.where(keep, scores, float("-inf"))
    largest = gl.maximum(row_max, gl.max(scores, 1) * task.scale_log2)
    shift = largest
    if MASKED:
        # Without any key so far: every weight is 0, where -inf - -inf would be NaN.
        shift = gl.where(largest == float("-inf"), 0.0, largest)
    weights = gl.exp2(gl.fma(scores, task.scale_log2, -shift[:, None]))
    rescale = gl.exp2(row_max - shift)
    return weights, rescale, largest, gl.fma(row_sum, rescale, gl.sum(weights, 1))


@gluon.jit
def attend(
    state, weights, first, end, task, span, supply, NUMBER: gl.constexpr, TERMS: gl.constexpr,
    CUT: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """The state after the blocks from first to end, and the weights of the last one.

    These, as those that are given, have not been multiplied by their values yet.
    """
    acc, row_max, row_sum = state
    # An instruction that copies two weights at a time keeps loops apart that follow one another:
    # NVIDIA's assembler would else unpack and pack the weights in every step.
    weights = gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [weights], dtype=weights.dtype, is_pure=True, pack=2
    )
    for block in range(first, end):
        if CUT.alternates:
            await_issue(supply, block, NUMBER)
        scores = issue_scores(task.q, supply.k, block, CUT)
        issued = issue_values(acc, weights, supply.v, block - 1, CUT)
        if CUT.alternates:
            pass_issue(supply, NUMBER, CUT)
        scores = warpgroup_mma_wait(len(acc), deps=(scores,))
        free_block(supply.k, block, CUT)
        exact, rescale, row_max, row_sum = weigh_scores(
            scores, block, row_max, row_sum, task, span, TERMS, CUT, MASKED
        )
        acc = await_values(issued)
        free_block(supply.v, block - 1, CUT)
        weights = make_operand(exact, acc[0], weights.dtype)
        acc = scale_sums(acc, rescale)
    return State(acc, row_max, row_sum), weights
