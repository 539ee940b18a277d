"""The gradient of queries by warps that have parts of their own, for sm_90.

The formulas and the arguments are those of ../backward_queries.py. A program has a tile of queries
of one head, and goes over the keys that they see, which its producer copies to a ring, and their
values to another. Its consumers are warpgroups with 64 queries each.

In a turn a consumer issues its scores and do v^T, and then dq of the turn before, whose ds it has
kept: so the tensor cores have work while its warps make the next ds.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma_wait

from ...launch import launchable
from ..prologue import locate_queries
from ..ranges import find_keys
from ..terms import LOG2E, apply_masks, part_arguments
from ..views import HeadsView, SequencesView, find_rows, find_statistics
from .consumer import ROWS, await_values, issue_scores, make_sums, product_layout
from .forward import allocate_used, join_chunks
from .gradients import clear_rows, issue_sums, store_rows, store_zeros, take_tiles
from .ring import (
    Rows,
    allocate_barriers,
    allocate_chunks,
    await_block,
    free_block,
    make_ring,
    put_block,
    start_copy,
)
from .turns import find_first, find_masked, order_blocks


class QueryTask(NamedTuple):
    """What a consumer multiplies."""

    q: Any
    """Its queries, for each chunk of columns a tile in shared memory."""
    do: Any
    shift: Any
    """-lse of its queries, to base 2."""
    delta: Any
    offs_m: Any
    place: Any
    masks: Any
    """The arguments of all masks."""
    turns: Any
    seen: Any
    """The keys that any of the program's queries sees."""
    scale: Any


@gluon.jit
def produce_keys(copied, CUT: gl.constexpr):
    """Copy the queries of every consumer, and the keys and values of all turns.

    Values go before keys, for their buffer becomes empty half a turn earlier.
    """
    q_descs, k_descs, v_descs, do_descs = copied[0]
    q_chunks, do_chunks, q_ready, do_ready, k_ring, v_ring = copied[1]
    q_rows, k_rows, turns = copied[2]
    CONSUMERS: gl.constexpr = CUT.consumers
    for consumer in gl.static_range(CONSUMERS):
        rows = Rows(q_rows.element, q_rows.head, q_rows.row + ROWS * consumer)
        start_copy(q_descs, rows, q_chunks, q_ready.index(consumer), consumer)
        start_copy(do_descs, rows, do_chunks, do_ready.index(consumer), consumer)
    for turn in range(turns.masked + turns.full):
        masked = find_masked(turns, turn)
        block = gl.where(turn < turns.masked, masked, turns.first_full + turn - turns.masked)
        # The ring's first block is that of the first turn.
        rows = Rows(k_rows.element, k_rows.head, k_rows.row + (block - turn) * CUT.block_n)
        put_block(v_ring, v_descs, rows, turn, CUT)
        put_block(k_ring, k_descs, rows, turn, CUT)


@gluon.jit
def clear_keys(
    k_ring, cleared, turn, start_n, task, NUMBER: gl.constexpr, CUT: gl.constexpr
):  # fmt: skip
    """Clear the keys of a masked turn that none of the program's queries sees.

    The first consumer does so for all, which wait for it in every masked turn.
    """
    if NUMBER == 0:
        # A buffer that is full again says that the others have left the turn it served before.
        await_block(k_ring, turn, CUT)
        first, end = task.seen.first - start_n, task.seen.end - start_n
        if (first > 0) | (end < CUT.block_n):
            clear_rows(k_ring, turn, first, end, CUT)
        mbarrier.arrive(cleared.index(turn % CUT.stages), count=1)
    mbarrier.wait(cleared.index(turn % CUT.stages), (turn // CUT.stages) & 1)


@gluon.jit
def finish_turn(
    scores, dweights, start_n, turn, v_ring, task,
    PENDING: gl.constexpr, TERMS: gl.constexpr, CUT: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """The ds of a turn once its products are issued.

    PENDING products were issued after `dweights`.
    """
    AFTER_SCORES: gl.constexpr = PENDING + len(task.do)
    scores = warpgroup_mma_wait(AFTER_SCORES, deps=(scores,))
    factors = gl.full(scores.shape, task.scale * LOG2E, gl.float32, scores.type.layout)
    weights = gl.exp2(gl.fma(scores, factors, gl.broadcast(task.shift[:, None], factors)[0]))
    dweights = warpgroup_mma_wait(PENDING, deps=(dweights,))
    free_block(v_ring, turn, CUT)
    dscores = weights * (dweights - task.delta[:, None])
    if MASKED:
        LAYOUT: gl.constexpr = gl.SliceLayout(0, scores.type.layout)
        n = (start_n + gl.arange(0, CUT.block_n, LAYOUT))[None, :]
        keep = (n >= task.seen.first) & (n < task.seen.end)
        keep = apply_masks(keep, task.offs_m[:, None], n, task.place, task.masks, TERMS)
        dscores = gl.where(keep, dscores, 0.0)
    return dscores


@gluon.jit
def add_turns(
    dq, dscores, first, end, k_ring, v_ring, cleared, task,
    NUMBER: gl.constexpr, TERMS: gl.constexpr, CUT: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """dq with what the turns from first to end add, and ds of the last one.

    That, as the one that is given, has not been multiplied by its keys yet.
    """
    for turn in range(first, end):
        start_n = 0
        if MASKED:
            start_n = find_masked(task.turns, turn) * CUT.block_n
            if CUT.clears:
                clear_keys(k_ring, cleared, turn, start_n, task, NUMBER, CUT)
        scores = issue_scores(task.q, k_ring, turn, CUT)
        dweights = issue_scores(task.do, v_ring, turn, CUT)
        issued = issue_sums(dq, dscores, k_ring, turn - 1, CUT)
        made = finish_turn(
            scores, dweights, start_n, turn, v_ring, task, len(task.q), TERMS, CUT, MASKED
        )
        dq = await_values(issued)
        free_block(k_ring, turn - 1, CUT)
        dscores = made.to(dscores.dtype)
    return dq, dscores


@gluon.jit
def consume_keys(
    given, NUMBER: gl.constexpr, TERMS: gl.constexpr, HEADS: gl.constexpr, CUT: gl.constexpr
):
    """Sum the gradient of one consumer's queries, and store it."""
    q_chunks, do_chunks, q_ready, do_ready, k_ring, v_ring = given[0]
    dq_rows, lse, delta, cleared, place, masks, turns, seen, scale = given[1]
    ROW: gl.constexpr = gl.SliceLayout(1, product_layout(CUT.block_n))
    offs = ROWS * NUMBER + gl.arange(0, ROWS, ROW)
    offs_m = place.first_m + offs
    inside = offs_m < place.queries
    q, do = take_tiles(q_chunks, NUMBER), take_tiles(do_chunks, NUMBER)
    shift = gl.load(lse + offs, inside, other=0.0) * -LOG2E
    deltas = gl.load(delta + offs, inside, other=0.0)
    task = QueryTask(q, do, shift, deltas, offs_m, place, masks, turns, seen, scale)
    mbarrier.wait(q_ready.index(NUMBER), 0)
    mbarrier.wait(do_ready.index(NUMBER), 0)
    dq = make_sums(HEADS.k)

    # The first turn has masks, whether it needs them or not: that saves code.
    start_n = find_first(turns) * CUT.block_n
    if CUT.clears:
        if turns.masked > 0:
            clear_keys(k_ring, cleared, 0, start_n, task, NUMBER, CUT)
    scores = issue_scores(q, k_ring, 0, CUT)
    dweights = issue_scores(do, v_ring, 0, CUT)
    made = finish_turn(scores, dweights, start_n, 0, v_ring, task, 0, TERMS, CUT, True)
    dscores = made.to(dq_rows.base.dtype.element_ty)
    count = turns.masked + turns.full
    dq, dscores = add_turns(
        dq, dscores, 1, turns.masked, k_ring, v_ring, cleared, task, NUMBER, TERMS, CUT, True
    )
    dq, dscores = add_turns(
        dq, dscores, gl.maximum(turns.masked, 1), count, k_ring, v_ring, cleared, task,
        NUMBER, TERMS, CUT, False,
    )  # fmt: skip
    dq = await_values(issue_sums(dq, dscores, k_ring, count - 1, CUT))
    store_rows(dq_rows, dq, scale, place.queries - place.first_m, NUMBER)


@launchable
@gluon.jit(do_not_specialize=["pairs", "pairs_of_group", "groups"])
def attention_hopper_queries_backward_kernel(
    dq_view: HeadsView,
    lse_ptr,
    delta_ptr,
    q_desc,
    k_desc,
    v_desc,
    do_desc,
    q_tail_desc,
    k_tail_desc,
    v_tail_desc,
    do_tail_desc,
    queries_view: SequencesView,
    keys_view: SequencesView,
    terms_args,
    pairs,
    pairs_of_group,
    groups,
    scale,
    TERMS: gl.constexpr,
    HEADS: gl.constexpr,
    CUT: gl.constexpr,
):
    """One program a tile of queries of one head, in the order of the forward."""
    args = part_arguments(terms_args, TERMS)
    place, queries, keys = locate_queries(
        queries_view, keys_view, pairs, pairs_of_group, groups, TERMS, HEADS, CUT
    )
    # Packed sequences differ in length, and the grid is made for the longest.
    if place.first_m >= place.queries:
        return

    row = queries.first + place.first_m
    dq_rows = find_rows(dq_view, queries.element, place.head, row, CUT.divisor)
    seen = find_keys(place, args, TERMS, CUT)
    if seen.end <= seen.first:
        store_zeros(dq_rows, place.queries - place.first_m, HEADS.k, CUT)
        return

    turns = order_blocks(seen, CUT.block_n)
    q_descs = join_chunks(q_desc, q_tail_desc)
    k_descs = join_chunks(k_desc, k_tail_desc)
    v_descs = join_chunks(v_desc, v_tail_desc)
    do_descs = join_chunks(do_desc, do_tail_desc)
    buffers = (
        allocate_chunks(q_descs, CUT.consumers),
        allocate_chunks(do_descs, CUT.consumers),
        allocate_barriers(CUT.consumers, 1),
        allocate_barriers(CUT.consumers, 1),
        make_ring(k_descs, CUT),
        make_ring(v_descs, CUT),
    )
    cleared = allocate_used(CUT.clears, CUT.stages)
    copied = (
        (q_descs, k_descs, v_descs, do_descs),
        buffers,
        (
            Rows(queries.element, place.head, row),
            Rows(keys.element, place.head // HEADS.group, keys.first),
            turns,
        ),
    )
    lse = find_statistics(lse_ptr, queries_view, queries, place.head, place.first_m, HEADS)
    delta = find_statistics(delta_ptr, queries_view, queries, place.head, place.first_m, HEADS)
    given = (buffers, (dq_rows, lse, delta, cleared, place, args.masks, turns, seen, scale))
    gl.warp_specialize(
        [
            (consume_keys, (given, 0, TERMS, HEADS, CUT)),
            (consume_keys, (given, 1, TERMS, HEADS, CUT)),
            (produce_keys, (copied, CUT)),
        ],
        [4, 1],
        [CUT.registers, 24],
    )
