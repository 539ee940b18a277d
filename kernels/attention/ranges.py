"""Which keys a tile of queries sees, and which queries see a tile of keys."""

import triton
import triton.language as tl

from .lists import find_listed_keys
from .structures import Range


@triton.jit
def find_range(first, last, length, place, args, RANGES: tl.constexpr, BLOCK: tl.constexpr):
    """What a block, from first to last, sees of a sequence of `length`.

    That what all of it sees begins and ends at multiples of BLOCK, where these are inside.
    """
    begin = 0
    end = length
    full_begin = 0
    full_end = length
    for i in tl.static_range(len(RANGES)):
        if RANGES[i] is None:
            full_end = 0
        else:
            seen_begin, seen_end, all_begin, all_end = RANGES[i](first, last, place, args[i])
            begin = tl.maximum(begin, seen_begin)
            end = tl.minimum(end, seen_end)
            full_begin = tl.maximum(full_begin, all_begin)
            full_end = tl.minimum(full_end, all_end)
    return Range(begin, end, tl.cdiv(full_begin, BLOCK) * BLOCK, full_end // BLOCK * BLOCK)


@triton.jit
def find_keys(place, args, TERMS: tl.constexpr, CUT: tl.constexpr):
    """The keys that a tile of queries sees."""
    RANGES: tl.constexpr = TERMS.key_ranges
    last_m = tl.minimum(place.first_m + CUT.block_m, place.queries) - 1
    return find_range(place.first_m, last_m, place.keys, place, args.masks, RANGES, CUT.block_n)


@triton.jit
def find_queries(place, args, TERMS: tl.constexpr, CUT: tl.constexpr):
    """The queries that see a tile of keys."""
    RANGES: tl.constexpr = TERMS.query_ranges
    last_n = tl.minimum(place.first_n + CUT.block_n, place.keys) - 1
    return find_range(place.first_n, last_n, place.queries, place, args.masks, RANGES, CUT.block_m)


@triton.jit
def part_keys(keys, place, args, TERMS: tl.constexpr, CUT: tl.constexpr):
    """The bounds of the three parts of a range, see `has_part`: positions in the list if listed."""
    if TERMS.lists is not None:
        first, end = find_listed_keys(keys.first, keys.end, place, args.lists, CUT.block_n)
        return first, first, first, end
    else:
        first = keys.first // CUT.block_n * CUT.block_n
        none_full = keys.full_end <= keys.full_first
        return (
            first,
            tl.where(none_full, first, keys.full_first),
            tl.where(none_full, first, keys.full_end),
            keys.end,
        )


# A range has three parts: blocks that some see before those that all see, these, and blocks after.
FULL = tl.constexpr(1)


@triton.constexpr_function
def has_part(part, hides_first, scattered, is_listed):
    """Whether a range has a part at all: the last one also holds a sequence's incomplete block.

    Where blocks are listed, the last part is all there is.
    """
    if part == 2 or is_listed:
        return part == 2
    return hides_first if part == 0 else not scattered
