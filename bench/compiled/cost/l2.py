"""How many bytes attention's kernels read from HBM, by the order in which their grids go.

Programs start in the grid's order, one for each that has ended. All go on in step, a block at a
time, and what they read passes through one cache that forgets what was used longest ago. What a
program reads or writes once, its own tile, is not sent through it.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from fastattn.kernels.attention.order import part_pairs
from fastattn.kernels.config import Target
from fastattn.machine.driver import TARGETS

from ..measure import Row
from .hardware import HARDWARE, Hardware

USABLE = 0.8
"""The share of L2 that streamed blocks have."""

ELEMENT = 2
"""Bytes of a 16-bit number."""

ROWS = 128
"""Rows of a block that is cached as a whole; kernels read fewer at a time, and all of them soon."""


@dataclass(frozen=True)
class Attention:
    """Attention as its kernels meet it: as many queries as keys."""

    batch: int
    heads: int
    key_heads: int
    length: int
    dim: int
    causal: bool

    @property
    def name(self) -> str:
        """The registry's name of the op."""
        return "attention causal" if self.causal else "attention full"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape as the registry has it."""
        return (self.batch, self.heads, self.key_heads, self.length, self.dim, self.dim)


PROBLEMS = tuple(
    Attention(*sizes, causal=causal)
    for sizes, causal in (
        ((2, 16, 16, 8192, 128), True),
        ((4, 32, 32, 4096, 128), True),
        ((4, 32, 32, 4096, 128), False),
        ((4, 32, 8, 4096, 128), True),
        ((1, 64, 8, 8192, 128), True),
    )
)
"""Shapes of training, few heads and many."""


@dataclass(frozen=True)
class Traffic:
    """Bytes that a kernel moves from and to HBM, and the least it could."""

    target: str
    kernel: str
    op: str
    shape: tuple[int, ...]
    moved: int
    least: int


Program = Sequence[tuple[int, int, int]]
"""What one program streams: blocks by batch element, head and number."""


def order_programs(
    pairs: int, tiles: int, pairs_of_group: int, groups: int
) -> Iterator[tuple[int, int]]:
    """The pair and the tile of each program, as `find_program` in kernels/attention/order.py."""
    for group in range(groups):
        first = group * pairs_of_group
        end = first + pairs_of_group if group < groups - 1 else pairs
        yield from ((pair, tile) for tile in range(tiles) for pair in range(first, end))


def describe_device(target: str) -> Target:
    """A target as the rules of kernels take it."""
    known = TARGETS[target]
    return Target("cuda", int(target[3:]), 32, known.multiprocessors, known.shared_memory)


def query_programs(problem: Attention, block_m: int, warps: int, target: str) -> list[Program]:
    """The forward and dQ, a program a tile of queries, in the order of `locate_queries`."""
    pairs, tiles = problem.batch * problem.heads, -(-problem.length // block_m)
    group = problem.heads // problem.key_heads
    streamed = 2 * problem.length * problem.dim * ELEMENT
    parts = part_pairs(describe_device(target), pairs, tiles, warps, streamed, group)
    programs = []
    for pair, tile in order_programs(pairs, tiles, *parts):
        batch, head = divmod(pair, problem.heads)
        if problem.causal:
            tile = tiles - 1 - tile
        end = min(problem.length, (tile + 1) * block_m) if problem.causal else problem.length
        programs.append([(batch, head // group, i) for i in range(-(-end // ROWS))])
    return programs


def key_programs(problem: Attention, block_n: int, warps: int, target: str) -> list[Program]:
    """dK/dV, a program a tile of keys, in the order of `locate_keys`: all heads of the group."""
    pairs, tiles = problem.batch * problem.key_heads, -(-problem.length // block_n)
    group, blocks = problem.heads // problem.key_heads, -(-problem.length // ROWS)
    streamed = 2 * group * problem.length * problem.dim * ELEMENT
    parts = part_pairs(describe_device(target), pairs, tiles, warps, streamed)
    programs = []
    for pair, tile in order_programs(pairs, tiles, *parts):
        batch, key_head = divmod(pair, problem.key_heads)
        first = tile * block_n // ROWS if problem.causal else 0
        heads = range(key_head * group, (key_head + 1) * group)
        programs.append([(batch, head, i) for head in heads for i in range(first, blocks)])
    return programs


def count_misses(programs: Sequence[Program], slots: int, capacity: int) -> int:
    """The blocks that come from HBM while `slots` programs run, for a cache of `capacity`."""
    cached: OrderedDict[tuple[int, int, int], None] = OrderedDict()
    misses, started = 0, min(slots, len(programs))
    running = [(0, slot, slot, 0) for slot in range(started)]
    while running:
        time, slot, program, at = heapq.heappop(running)
        block = programs[program][at]
        if block in cached:
            cached.move_to_end(block)
        else:
            misses += 1
            cached[block] = None
            if len(cached) > capacity:
                cached.popitem(last=False)
        at += 1
        if at < len(programs[program]):
            heapq.heappush(running, (time + 1, slot, program, at))
        elif started < len(programs):
            # The end of one program and the beginning of the next take about a step.
            heapq.heappush(running, (time + 2, slot, started, 0))
            started += 1
    return misses


PROGRAMS: dict[str, Callable[[Attention, int, int, str], list[Program]]] = {
    "attention_forward_kernel": query_programs,
    "attention_queries_backward_kernel": query_programs,
    "attention_keys_backward_kernel": key_programs,
}


def count_traffic(
    target: str, kernel: str, problem: Attention, rows: int, warps: int, blocks: int
) -> Traffic:
    """What a kernel moves whose programs have `rows` queries, or keys, at `blocks` CTAs an SM."""
    hardware: Hardware = HARDWARE[target]
    of_keys = kernel == "attention_keys_backward_kernel"
    size = 2 * ROWS * problem.dim * ELEMENT
    programs = PROGRAMS[kernel](problem, rows, warps, target)
    capacity = int(hardware.l2_megabytes * 1e6 * USABLE / size)
    misses = count_misses(programs, hardware.multiprocessors * blocks, capacity)
    row = problem.batch * problem.length * problem.dim * ELEMENT
    queries, keys = row * problem.heads, row * problem.key_heads
    # q and o; q, do and dq; k, v and their gradients.
    own = {
        "attention_forward_kernel": 2 * queries,
        "attention_queries_backward_kernel": 3 * queries,
    }
    once = own.get(kernel, 4 * keys)
    streamed = 2 * queries if of_keys else 2 * keys
    return Traffic(
        target, kernel, problem.name, problem.shape, once + misses * size, once + streamed
    )


def count_all(rows: Iterable[Row]) -> list[Traffic]:
    """The traffic of the kernels among `rows`, with the tiles that they have for a head of 128."""
    return [
        count_traffic(
            row.target,
            row.kernel,
            problem,
            row.cost.tile[0],
            row.num_warps,
            row.cost.occupancy.blocks,
        )
        for row in rows
        if row.cost is not None and row.kernel in PROGRAMS and row.shape[-2:] == (128, 128)
        for problem in PROBLEMS
        if problem.name == row.op
    ]
