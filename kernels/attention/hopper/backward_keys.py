"""The gradients of keys and values by warps that have parts of their own, for sm_90.

The formulas and the arguments are those of ../backward_keys.py. A program has a tile of keys of one
key head, and goes over the queries that see it, of all the query heads that share it. Its producer
copies them, with do and what belongs to either, to two rings. Its consumers, warpgroups with 64
keys each, hold everything transposed: weights are then made where the product of weights and do
wants them, in registers.

    s^T = k q^T - lse / scale       p^T  = exp(scale s^T)              dv += p^T do
    t^T = v do^T - delta            ds^T = p^T t^T                     dk += ds^T q

In a turn a consumer issues its scores, then dk of the turn before, whose ds it has kept, then t: so
the tensor cores have work while its warps make weights, and dv while they make ds.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma_wait

from ...launch import launchable
from ...structures import restore_odd
from ..prologue import locate_keys
from ..ranges import find_queries
from ..structures import KeyGradients
from ..terms import LOG2E, apply_masks, part_arguments
from ..views import HeadsView, SequencesView, find_rows
from .consumer import ROWS, await_values, make_sums, product_layout
from .forward import allocate_used, join_chunks
from .gradients import (
    await_sums,
    clear_rows,
    issue_sums,
    issue_transposed,
    make_numbered_ring,
    put_rows,
    round_weights,
    store_rows,
    store_zeros,
    take_tiles,
)
from .ring import Rows, allocate_barriers, allocate_chunks, await_block, free_block, start_copy
from .turns import find_first, find_masked, order_blocks


class KeyTask(NamedTuple):
    """What a consumer multiplies."""

    k: Any
    """Its keys, for each chunk of columns a tile in shared memory."""
    v: Any
    offs_n: Any
    place: Any
    masks: Any
    """The arguments of all masks."""
    turns: Any
    seen: Any
    """The queries that see any of the program's keys."""
    scale: Any


@gluon.jit
def produce_queries(copied, HEADS: gl.constexpr, CUT: gl.constexpr):
    """Copy the keys and values of every consumer, and the queries of all turns.

    do goes before q, for its buffer becomes empty half a turn earlier.
    """
    q_descs, k_descs, v_descs, do_descs, lse_desc, delta_desc = copied[0]
    k_chunks, v_chunks, k_ready, v_ready, q_ring, do_ring = copied[1]
    k_rows, q_rows, first_number, rows_of_head, turns = copied[2]
    CONSUMERS: gl.constexpr = CUT.consumers
    for consumer in gl.static_range(CONSUMERS):
        rows = Rows(k_rows.element, k_rows.head, k_rows.row + ROWS * consumer)
        start_copy(k_descs, rows, k_chunks, k_ready.index(consumer), consumer)
        start_copy(v_descs, rows, v_chunks, v_ready.index(consumer), consumer)
    turn = 0
    for member in range(HEADS.group):
        for number in range(turns.masked):
            start = find_masked(turns, number) * CUT.block_m
            rows = Rows(q_rows.element, q_rows.head + member, q_rows.row + start)
            at = first_number + member * rows_of_head + start
            put_rows(do_ring, do_descs, delta_desc, rows, at, turn, CUT)
            put_rows(q_ring, q_descs, lse_desc, rows, at, turn, CUT)
            turn += 1
    for member in range(HEADS.group):
        for number in range(turns.full):
            start = (turns.first_full + number) * CUT.block_m
            rows = Rows(q_rows.element, q_rows.head + member, q_rows.row + start)
            at = first_number + member * rows_of_head + start
            put_rows(do_ring, do_descs, delta_desc, rows, at, turn, CUT)
            put_rows(q_ring, q_descs, lse_desc, rows, at, turn, CUT)
            turn += 1


@gluon.jit
def clear_queries(
    q_ring, do_ring, cleared, turn, start_m, task, NUMBER: gl.constexpr, CUT: gl.constexpr
):  # fmt: skip
    """Clear the rows of a masked turn that are another sequence's.

    The first consumer does so for all, which wait for it in every masked turn.
    """
    if NUMBER == 0:
        # A buffer that is full again says that the others have left the turn it served before.
        await_block(q_ring.ring, turn, CUT)
        end = task.place.queries - start_m
        if end < CUT.block_m:
            clear_rows(q_ring.ring, turn, 0, end, CUT)
            clear_rows(do_ring.ring, turn, 0, end, CUT)
        mbarrier.arrive(cleared.index(turn % CUT.stages), count=1)
    mbarrier.wait(cleared.index(turn % CUT.stages), (turn // CUT.stages) & 1)


@gluon.jit
def weigh_transposed(
    scores, start_m, task, TERMS: gl.constexpr, CUT: gl.constexpr, MASKED: gl.constexpr
):  # fmt: skip
    """The weights of a turn, from scores that began at -lse / scale."""
    weights = gl.exp2(scores * (task.scale * LOG2E))
    if MASKED:
        LAYOUT: gl.constexpr = gl.SliceLayout(0, scores.type.layout)
        m = (start_m + gl.arange(0, CUT.block_m, LAYOUT))[None, :]
        keep = (m >= task.seen.first) & (m < task.seen.end)
        keep = apply_masks(keep, m, task.offs_n[:, None], task.place, task.masks, TERMS)
        weights = gl.where(keep, weights, 0.0)
    return weights


@gluon.jit
def finish_turn(
    scores, dweights, start_m, dk, dv, do_ring, turn, task,
    PENDING: gl.constexpr, TERMS: gl.constexpr, CUT: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """What comes of a turn's products once both are issued: dv with it, and its ds.

    PENDING products were issued after the scores. `dk` is passed on, done.
    """
    scores = warpgroup_mma_wait(PENDING, deps=(scores,))
    weights = weigh_transposed(scores, start_m, task, TERMS, CUT, MASKED)
    DTYPE: gl.constexpr = task.k[0].dtype
    issued = issue_sums(dv, round_weights(weights, task.k[0]), do_ring.ring, turn, CUT)
    dk, dweights = await_sums(dk, dweights, len(dv))
    dscores = weights * dweights
    if MASKED:
        # Of a key or value that is NaN and that nobody sees, nothing may stay.
        dscores = gl.where(weights == 0.0, 0.0, dscores)
    return dk, issued, dscores.to(DTYPE)


@gluon.jit
def add_turns(
    state, dscores, first, end, q_ring, do_ring, cleared, task,
    NUMBER: gl.constexpr, TERMS: gl.constexpr, CUT: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """The gradients with what the turns from first to end add, and ds of the last one.

    That, as the one that is given, has not been multiplied by its queries yet.
    """
    dk, dv = state
    number = 0
    for turn in range(first, end):
        start_m = 0
        if MASKED:
            number = gl.where(number == task.turns.masked - 1, 0, number + 1)
            start_m = find_masked(task.turns, number) * CUT.block_m
            if CUT.clears:
                clear_queries(q_ring, do_ring, cleared, turn, start_m, task, NUMBER, CUT)
        scores = issue_transposed(task.k, q_ring, -1.0 / task.scale, turn, CUT)
        dk_issued = issue_sums(dk, dscores, q_ring.ring, turn - 1, CUT)
        dweights = issue_transposed(task.v, do_ring, -1.0, turn, CUT)
        PENDING: gl.constexpr = len(task.k) + len(task.v)
        dk, dv_issued, dscores = finish_turn(
            scores, dweights, start_m, dk_issued, dv, do_ring, turn, task,
            PENDING, TERMS, CUT, MASKED,
        )  # fmt: skip
        free_block(q_ring.ring, turn - 1, CUT)
        dv = await_values(dv_issued)
        free_block(do_ring.ring, turn, CUT)
    return KeyGradients(dk, dv), dscores


@gluon.jit
def consume_queries(
    given, NUMBER: gl.constexpr, TERMS: gl.constexpr, HEADS: gl.constexpr, CUT: gl.constexpr
):
    """Sum the gradients of one consumer's keys and values, and store them."""
    k_chunks, v_chunks, k_ready, v_ready, q_ring, do_ring = given[0]
    dk_rows, dv_rows, cleared, place, masks, turns, seen, scale = given[1]
    k = take_tiles(k_chunks, NUMBER)
    v = take_tiles(v_chunks, NUMBER)
    offs_n = ROWS * NUMBER + gl.arange(0, ROWS, gl.SliceLayout(1, product_layout(CUT.block_m)))
    task = KeyTask(k, v, place.first_n + offs_n, place, masks, turns, seen, scale)
    mbarrier.wait(k_ready.index(NUMBER), 0)
    mbarrier.wait(v_ready.index(NUMBER), 0)
    dk, dv = make_sums(HEADS.k), make_sums(HEADS.v)

    # The first turn has masks, whether it needs them or not: that saves code.
    start_m = find_first(turns) * CUT.block_m
    if CUT.clears:
        if turns.masked > 0:
            clear_queries(q_ring, do_ring, cleared, 0, start_m, task, NUMBER, CUT)
    scores = issue_transposed(k, q_ring, -1.0 / scale, 0, CUT)
    dweights = issue_transposed(v, do_ring, -1.0, 0, CUT)
    dk, dv_issued, dscores = finish_turn(
        scores, dweights, start_m, dk, dv, do_ring, 0, task, len(v), TERMS, CUT, True
    )
    dv = await_values(dv_issued)
    free_block(do_ring.ring, 0, CUT)

    masked, turn_count = HEADS.group * turns.masked, HEADS.group * (turns.masked + turns.full)
    state = KeyGradients(dk, dv)
    state, dscores = add_turns(
        state, dscores, 1, masked, q_ring, do_ring, cleared, task, NUMBER, TERMS, CUT, True
    )
    state, dscores = add_turns(
        state, dscores, gl.maximum(masked, 1), turn_count, q_ring, do_ring, cleared, task,
        NUMBER, TERMS, CUT, False,
    )  # fmt: skip
    dk, dv = state
    dk = await_values(issue_sums(dk, dscores, q_ring.ring, turn_count - 1, CUT))
    left = place.keys - place.first_n
    store_rows(dk_rows, dk, scale, left, NUMBER)
    store_rows(dv_rows, dv, 1.0, left, NUMBER)


@launchable
@gluon.jit(do_not_specialize=["pairs", "pairs_of_group", "groups"])
def attention_hopper_keys_backward_kernel(
    dk_view: HeadsView,
    dv_view: HeadsView,
    q_desc,
    k_desc,
    v_desc,
    do_desc,
    q_tail_desc,
    k_tail_desc,
    v_tail_desc,
    do_tail_desc,
    lse_desc,
    delta_desc,
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
    """One program a tile of keys of one key head, for all the query heads that share it."""
    args = part_arguments(terms_args, TERMS)
    place, queries, keys = locate_keys(
        queries_view, keys_view, pairs, pairs_of_group, groups, HEADS, CUT
    )
    # Packed sequences differ in length, and the grid is made for the longest.
    if place.first_n >= place.keys:
        return

    row = keys.first + place.first_n
    key_head = place.head // HEADS.group
    dk_rows = find_rows(dk_view, keys.element, key_head, row, CUT.divisor)
    dv_rows = find_rows(dv_view, keys.element, key_head, row, CUT.divisor)
    seen = find_queries(place, args, TERMS, CUT)
    if seen.end <= seen.first:
        store_zeros(dk_rows, place.keys - place.first_n, HEADS.k, CUT)
        store_zeros(dv_rows, place.keys - place.first_n, HEADS.v, CUT)
        return

    turns = order_blocks(seen, CUT.block_m)
    q_descs = join_chunks(q_desc, q_tail_desc)
    k_descs = join_chunks(k_desc, k_tail_desc)
    v_descs = join_chunks(v_desc, v_tail_desc)
    do_descs = join_chunks(do_desc, do_tail_desc)
    buffers = (
        allocate_chunks(k_descs, CUT.consumers),
        allocate_chunks(v_descs, CUT.consumers),
        allocate_barriers(CUT.consumers, 1),
        allocate_barriers(CUT.consumers, 1),
        make_numbered_ring(q_descs, lse_desc, CUT),
        make_numbered_ring(do_descs, delta_desc, CUT),
    )
    cleared = allocate_used(CUT.clears, CUT.stages)
    rows_of_head = restore_odd(queries_view.rows)
    first_number = (queries.element * HEADS.count + place.head) * rows_of_head + queries.first
    copied = (
        (q_descs, k_descs, v_descs, do_descs, lse_desc, delta_desc),
        buffers,
        (
            Rows(keys.element, key_head, row),
            Rows(queries.element, place.head, queries.first),
            first_number,
            rows_of_head,
            turns,
        ),
    )
    given = (
        buffers,
        (dk_rows, dv_rows, cleared, place, args.masks, turns, seen, scale),
    )
    gl.warp_specialize(
        [
            (consume_queries, (given, 0, TERMS, HEADS, CUT)),
            (consume_queries, (given, 1, TERMS, HEADS, CUT)),
            (produce_queries, (copied, HEADS, CUT)),
        ],
        [4, 1],
        [CUT.registers, 24],
    )
