"""The turns of a backward kernel: in which order it goes over the blocks that its tile meets.

A program numbers the blocks that it multiplies with from 0 on, over all heads that it sums. First
come those that need masks, before and behind the others, and then those that all of its tile sees
whole. So two loops serve whatever mask there is.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


class Turns(NamedTuple):
    """The blocks of one head that a program goes over, by their numbers in the sequence."""

    first: Any
    """The first block of all."""
    before: Any
    """How many with masks come before the full ones."""
    masked: Any
    """How many have masks."""
    first_full: Any
    full: Any
    """How many are full."""


@gluon.jit
def order_blocks(seen, BLOCK: gl.constexpr):
    """The turns of a Range that is not empty."""
    first, end = seen.first // BLOCK, gl.cdiv(seen.end, BLOCK)
    none_full = seen.full_end <= seen.full_first
    first_full = gl.where(none_full, end, seen.full_first // BLOCK)
    full = gl.where(none_full, 0, seen.full_end // BLOCK - first_full)
    # Lengths may have 64 bits, which numbers of buffers may not.
    first, end = gl.cast(first, gl.int32), gl.cast(end, gl.int32)
    first_full, full = gl.cast(first_full, gl.int32), gl.cast(full, gl.int32)
    return Turns(first, first_full - first, end - first - full, first_full, full)


@gluon.jit
def find_first(turns):
    """The block of the first turn."""
    return gl.where(turns.masked > 0, find_masked(turns, 0), turns.first_full)


@gluon.jit
def find_masked(turns, number):
    """The block of the masked turn of this number within a head."""
    behind = turns.first_full + turns.full + number - turns.before
    return gl.where(number < turns.before, turns.first + number, behind)
