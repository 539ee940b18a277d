"""In which order the programs of attention's kernels go over heads and tiles.

What one program streams, the keys and values of its head or the queries that see its keys, the
programs of other tiles of the head stream as well. Those that run at the same time find it in the
last cache before memory, if the heads that are under way fit there together. So a grid takes heads
in groups that do: a group's first tiles of all its heads, then its second tiles, and after its last
ones the next group. Where tiles differ in length, the longest of a group come first.
"""

import triton
import triton.language as tl

from ..config import Target, cdiv, find_target
from .config import AttentionConfig, find_kind
from .launch import Call
from .structures import Program

CACHED_BYTES = {
    "sm_80": 20_000_000,
    "sm_86": 3_000_000,
    "sm_90": 25_000_000,
    "sm_100": 60_000_000,
    "sm_120": 24_000_000,
    "gfx9": 128_000_000,
    "gfx11": 48_000_000,
}
"""Half of the last cache before memory, of the smallest common device of each kind: L2, or on AMD
the one behind it. The other half is for what programs read and write once."""


WARPS_AT_THE_END = 16
"""How many warps for each multiprocessor the programs of the last group have at least: twice what
it runs at a time. With fewer, long programs would begin when all else ends."""


def part_pairs(
    target: Target, pairs: int, tiles: int, warps: int, bytes_of_pair: int, sharing: int = 1
) -> tuple[int, int]:
    """How many of a grid's pairs of a sequence and a head make a group, and how many groups.

    The last group has all pairs that are left.

    Args:
        target: the device.
        pairs: all of them.
        tiles: how many programs a pair has.
        warps: how many a program has.
        bytes_of_pair: what the programs of a pair stream.
        sharing: how many neighbours stream the same, as query heads that share a key head do.
    """
    if target.backend == "interpreter":
        # Small, so that a few heads are several groups.
        together, at_the_end = sharing, 2
    else:
        fitting = CACHED_BYTES[find_kind(target)] // max(bytes_of_pair, 1)
        together = max(fitting, 1) * sharing
        at_the_end = cdiv(WARPS_AT_THE_END * target.multiprocessors, warps * tiles)
    return together, max(pairs - at_the_end, 0) // together + 1


def group_queries(call: Call, config: AttentionConfig, pairs: int, tiles: int) -> dict[str, int]:
    """The order of programs that own queries, and stream the keys of their head."""
    q, k, v = call.q, call.k, call.v
    row = (k.shape[3] + v.shape[3]) * k.itemsize
    streamed, sharing = call.longest_keys * row, q.shape[1] // k.shape[1]
    parts = part_pairs(find_target(q), pairs, tiles, config.num_warps, streamed, sharing)
    return {"pairs": pairs, "pairs_of_group": parts[0], "groups": parts[1]}


def group_keys(call: Call, config: AttentionConfig, pairs: int, tiles: int) -> dict[str, int]:
    """The order of programs that own keys, and stream the queries that share them."""
    q, k, v = call.q, call.k, call.v
    row = (q.shape[3] + v.shape[3]) * q.itemsize
    streamed = q.shape[1] // k.shape[1] * call.longest_queries * row
    parts = part_pairs(find_target(q), pairs, tiles, config.num_warps, streamed)
    return {"pairs": pairs, "pairs_of_group": parts[0], "groups": parts[1]}


def order_queries(call: Call, config: AttentionConfig) -> tuple[tuple[int, ...], dict[str, int]]:
    """The grid of programs that own queries, and their order."""
    pairs, tiles = call.q.shape[1] * call.batches, cdiv(call.longest_queries, config.block_m)
    return (pairs * tiles, 1, 1), group_queries(call, config, pairs, tiles)


def order_keys(call: Call, config: AttentionConfig) -> tuple[tuple[int, ...], dict[str, int]]:
    """The grid of programs that own keys, and their order."""
    pairs, tiles = call.k.shape[1] * call.batches, cdiv(call.longest_keys, config.block_n)
    return (pairs * tiles, 1, 1), group_keys(call, config, pairs, tiles)


@triton.jit
def find_program(pairs, pairs_of_group, groups):
    """A program's pair of a sequence and a head, and the number of its tile."""
    program = tl.program_id(0)
    tiles = tl.num_programs(0) // pairs
    group = tl.minimum(program // (pairs_of_group * tiles), groups - 1)
    first = group * pairs_of_group
    members = tl.where(group < groups - 1, pairs_of_group, pairs - first)
    within = program - first * tiles
    return Program(first + within % members, within // members, tiles)
