"""The forward whose warps have parts of their own, for sm_90.

The formulas and the arguments are those of ../forward.py. A program has a producer, one warp that
copies tiles of Q, K and V to shared memory by tensor descriptors, and two or three consumers,
warpgroups with 64 queries each, see consumer.py. Between them lie two rings of buffers, see
ring.py; K goes one block ahead of V, for that is the order in which consumers need them.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma_wait,
)

from ...launch import launchable
from ..prologue import locate_queries
from ..ranges import find_keys, part_keys
from ..structures import State
from ..terms import LN2, LOG2E, part_arguments
from ..views import HeadsView, SequencesView, find_rows, find_statistics
from .consumer import (
    ROWS,
    Span,
    Supply,
    Task,
    attend,
    await_values,
    issue_scores,
    issue_values,
    make_operand,
    make_sums,
    product_layout,
    scale_sums,
    weigh_scores,
)
from .ring import (
    Rows,
    allocate_barriers,
    allocate_chunks,
    await_block,
    free_block,
    make_ring,
    put_block,
    start_copy,
    take_tile,
)


@gluon.jit
def produce(given, CUT: gl.constexpr):
    """Copy the queries of every consumer, and all blocks of keys and values."""
    descs, q_chunks, q_ready, supply, q_rows, k_rows, blocks = given
    q_descs, k_descs, v_descs = descs
    CONSUMERS: gl.constexpr = CUT.consumers
    for number in gl.static_range(CONSUMERS):
        rows = Rows(q_rows.element, q_rows.head, q_rows.row + ROWS * number)
        start_copy(q_descs, rows, q_chunks, q_ready.index(number), number)
    put_block(supply.k, k_descs, k_rows, 0, CUT)
    for block in range(1, blocks):
        put_block(supply.k, k_descs, k_rows, block, CUT)
        put_block(supply.v, v_descs, k_rows, block - 1, CUT)
    put_block(supply.v, v_descs, k_rows, blocks - 1, CUT)


@gluon.jit
def clear_rows(tile, first):
    """Set the rows of a tile in shared memory to zero from one on."""
    BLOCK_N: gl.constexpr = tile.shape[0]
    WIDTH: gl.constexpr = tile.shape[1]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [4, 1], [1, 0])
    rows = gl.arange(0, BLOCK_N, gl.SliceLayout(1, LAYOUT))
    tile.store(gl.where((rows < first)[:, None], tile.load(LAYOUT), 0.0))


@gluon.jit
def clear_values(ring, block, first, cleared, NUMBER: gl.constexpr, CUT: gl.constexpr):
    """Set a block's values to zero from the row `first` on, which are of no key that anybody sees.

    Their weights are 0, but 0 times NaN would be NaN. The first consumer does it for all.
    """
    if NUMBER == 0:
        place = await_block(ring, block, CUT)
        for i in gl.static_range(len(ring.chunks)):
            clear_rows(take_tile(ring.chunks[i], place), first)
        fence_async_shared()
        mbarrier.arrive(cleared.index(0), count=1)
    mbarrier.wait(cleared.index(0), 0)


@gluon.jit
def consume(
    given, NUMBER: gl.constexpr, TERMS: gl.constexpr, HEADS: gl.constexpr, CUT: gl.constexpr
):
    """Attend with the queries of one consumer, and store what comes of it."""
    q_chunks, q_ready, supply, cleared, o, lse_ptr, place, span, masks, scale = given
    S: gl.constexpr = product_layout(CUT.block_n)
    ROW: gl.constexpr = gl.SliceLayout(1, S)
    DTYPE: gl.constexpr = o.base.dtype.element_ty
    q = ()
    for i in gl.static_range(len(q_chunks)):
        q = q + (take_tile(q_chunks[i], NUMBER),)
    offs_m = place.first_m + ROWS * NUMBER + gl.arange(0, ROWS, ROW)
    task = Task(q, offs_m, place, masks, scale * LOG2E)

    mbarrier.wait(q_ready.index(NUMBER), 0)
    scores = issue_scores(q, supply.k, 0, CUT)
    scores = warpgroup_mma_wait(0, deps=(scores,))
    free_block(supply.k, 0, CUT)
    row_max = gl.full([ROWS], float("-inf"), gl.float32, ROW)
    row_sum = gl.full([ROWS], 0.0, gl.float32, ROW)
    exact, _, row_max, row_sum = weigh_scores(
        scores, 0, row_max, row_sum, task, span, TERMS, CUT, True
    )
    acc = make_sums(HEADS.v)
    weights = make_operand(exact, acc[0], DTYPE)
    state = State(acc, row_max, row_sum)
    if TERMS.hides_first:
        state, weights = attend(
            state, weights, 1, span.first_full, task, span, supply, NUMBER, TERMS, CUT, True
        )
    first = gl.maximum(span.first_full, 1)
    state, weights = attend(
        state, weights, first, span.end_full, task, span, supply, NUMBER, TERMS, CUT, False
    )
    first = gl.maximum(span.end_full, 1)
    state, weights = attend(
        state, weights, first, span.blocks, task, span, supply, NUMBER, TERMS, CUT, True
    )
    acc, row_max, row_sum = state
    last = span.blocks - 1
    if CUT.clears:
        left = span.end_n - (span.first_n + last * CUT.block_n)
        if left < CUT.block_n:
            clear_values(supply.v, last, left, cleared, NUMBER, CUT)
    acc = await_values(issue_values(acc, weights, supply.v, last, CUT))

    empty = row_sum == 0.0
    total = gl.where(empty, 1.0, row_sum)
    acc = scale_sums(acc, 1.0 / total)
    lse = gl.where(empty, float("-inf"), row_max * LN2 + gl.log(total))
    gl.store(lse_ptr + (ROWS * NUMBER + gl.arange(0, ROWS, ROW)), lse, offs_m < place.queries)
    store_sums(o, acc, place, NUMBER)


@gluon.jit
def store_chunk(o, acc, place, NUMBER: gl.constexpr, COLUMN: gl.constexpr):
    """Store a chunk of a consumer's rows, from a column on."""
    WIDTH: gl.constexpr = acc.shape[1]
    LAYOUT: gl.constexpr = acc.type.layout
    rows = ROWS * NUMBER + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    columns = COLUMN + gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT))
    pointers = o.base + rows.to(gl.int64)[:, None] * o.stride + columns[None, :]
    inside = place.first_m + rows < place.queries
    gl.store(pointers, acc.to(o.base.dtype.element_ty), inside[:, None])


@gluon.jit
def store_sums(o, acc, place, NUMBER: gl.constexpr):
    """Store a consumer's rows that are queries of the sequence."""
    store_chunk(o, acc[0], place, NUMBER, 0)
    if len(acc) == 2:
        store_chunk(o, acc[1], place, NUMBER, acc[0].shape[1])


@gluon.jit
def allocate_used(USED: gl.constexpr, COUNT: gl.constexpr):
    """COUNT barriers of one arrival, if they are USED: what is not has its memory for others."""
    if USED:
        return allocate_barriers(COUNT, 1)
    else:
        return ()


@gluon.jit
def join_chunks(head, tail):
    """The descriptors of a head's chunks of columns."""
    if tail is None:
        return (head,)
    else:
        return (head, tail)


@gluon.jit
def find_span(place, args, TERMS: gl.constexpr, CUT: gl.constexpr):
    """The keys of a program: one block at least, of which a query without keys sees nothing."""
    seen = find_keys(place, args, TERMS, CUT)
    first, first_full, end_full, end = part_keys(seen, place, args, TERMS, CUT)
    # Lengths may have 64 bits, which numbers of buffers may not.
    first, end = gl.cast(first, gl.int32), gl.cast(end, gl.int32)
    first_full = (gl.cast(first_full, gl.int32) - first) // CUT.block_n
    end_full = (gl.cast(end_full, gl.int32) - first) // CUT.block_n
    blocks = gl.maximum(gl.cdiv(end - first, CUT.block_n), 1)
    return Span(first, gl.cast(seen.first, gl.int32), end, first_full, end_full, blocks)


@launchable
@gluon.jit(do_not_specialize=["pairs", "pairs_of_group", "groups"])
def attention_hopper_forward_kernel(
    lse_ptr,
    o_view: HeadsView,
    q_desc,
    k_desc,
    v_desc,
    q_tail_desc,
    k_tail_desc,
    v_tail_desc,
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
    """One program a tile of queries of one head, see `locate_queries`."""
    args = part_arguments(terms_args, TERMS)
    place, queries, keys = locate_queries(
        queries_view, keys_view, pairs, pairs_of_group, groups, TERMS, HEADS, CUT
    )
    # Packed sequences differ in length, and the grid is made for the longest.
    if place.first_m >= place.queries:
        return

    span = find_span(place, args, TERMS, CUT)
    q_descs = join_chunks(q_desc, q_tail_desc)
    k_descs = join_chunks(k_desc, k_tail_desc)
    v_descs = join_chunks(v_desc, v_tail_desc)
    q_chunks = allocate_chunks(q_descs, CUT.consumers)
    q_ready = allocate_barriers(CUT.consumers, 1)
    may_issue = allocate_used(CUT.alternates, CUT.consumers)
    supply = Supply(make_ring(k_descs, CUT), make_ring(v_descs, CUT), may_issue)
    cleared = allocate_used(CUT.clears, 1)
    row = queries.first + place.first_m
    q_rows = Rows(queries.element, place.head, row)
    k_rows = Rows(keys.element, place.head // HEADS.group, keys.first + span.first_n)
    o = find_rows(o_view, queries.element, place.head, row, CUT.divisor)
    lse = find_statistics(lse_ptr, queries_view, queries, place.head, place.first_m, HEADS)
    descs = (q_descs, k_descs, v_descs)
    copied = (descs, q_chunks, q_ready, supply, q_rows, k_rows, span.blocks)
    given = (q_chunks, q_ready, supply, cleared, o, lse, place, span, args.masks, scale)
    if CUT.consumers == 2:
        gl.warp_specialize(
            [
                (consume, (given, 0, TERMS, HEADS, CUT)),
                (consume, (given, 1, TERMS, HEADS, CUT)),
                (produce, (copied, CUT)),
            ],
            [4, 1],
            [CUT.registers, CUT.producers_registers],
        )
    else:
        gl.warp_specialize(
            [
                (consume, (given, 0, TERMS, HEADS, CUT)),
                (consume, (given, 1, TERMS, HEADS, CUT)),
                (consume, (given, 2, TERMS, HEADS, CUT)),
                (produce, (copied, CUT)),
            ],
            [4, 4, 1],
            [CUT.registers, CUT.registers, CUT.producers_registers],
        )
