"""How attention's kernels apply the terms of a call to their tiles; see functions.py."""

import triton
import triton.language as tl

from ..structures import restore_odd
from .structures import Arguments, BlockLists

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def unpack(argument):
    """The integer that `_pack` was given."""
    if hasattr(argument, "dtype"):
        return restore_odd(argument)
    else:
        high, low = argument
        return (restore_odd(high).to(tl.int64) << 32) | restore_odd(low).to(tl.int64)


@triton.jit
def take_arguments(given, PLACES: tl.constexpr, FIRST_INTEGER: tl.constexpr):
    """Of the arguments of all terms those at some places, one tuple for each tuple of places."""
    taken = ()
    for i in tl.static_range(len(PLACES)):
        own = ()
        for j in tl.static_range(len(PLACES[i])):
            if PLACES[i][j] < FIRST_INTEGER:
                own = own + (given[PLACES[i][j]],)
            else:
                own = own + (unpack(given[PLACES[i][j]]),)
        taken = taken + (own,)
    return taken


@triton.jit
def part_arguments(given, TERMS: tl.constexpr):
    """The arguments of all terms as those of each: its tensors, its floats, then its integers."""
    lists = None
    if TERMS.lists is not None:
        PLACES: tl.constexpr = TERMS.lists
        lists = BlockLists(
            given[PLACES.row_counts],
            given[PLACES.row_blocks],
            given[PLACES.column_counts],
            given[PLACES.column_blocks],
            unpack(given[PLACES.queries]),
            unpack(given[PLACES.keys]),
            unpack(given[PLACES.rows]),
            unpack(given[PLACES.columns]),
            unpack(given[PLACES.batch_step]),
            unpack(given[PLACES.head_step]),
        )
    return Arguments(
        take_arguments(given, TERMS.score_places, TERMS.first_integer),
        take_arguments(given, TERMS.mask_places, TERMS.first_integer),
        lists,
    )


@triton.jit
def apply_scale(product, scale, SCALE: tl.constexpr):
    """A product of q and k as a score, by SCALE where that is given."""
    if SCALE is not None:
        return product * SCALE
    else:
        return product * scale


@triton.jit
def weigh(score, lse, scale, FOLDED: tl.constexpr):
    """exp(score - lse). A FOLDED score has not been scaled yet."""
    if FOLDED:
        return tl.exp2(score * (scale * LOG2E) - lse * LOG2E)
    else:
        # The difference first: it has fewer digits to lose than its parts.
        return tl.exp2((score - lse) * LOG2E)


@triton.jit
def apply_scores(score, m, n, place, args, SCORES: tl.constexpr):
    """The scores after all terms, and what each term was given."""
    given = ()
    for i in tl.static_range(len(SCORES)):
        given = given + (score,)
        score = SCORES[i](score, m, n, place, args[i])
    return score, given


@triton.jit
def apply_scores_backward(dscore, given, m, n, place, args, SCORES_BACKWARD: tl.constexpr):
    """The gradient before all terms, from that after them and what each was given.

    Also the gradient after each term, the last term's first.
    """
    after = ()
    for i in tl.static_range(len(SCORES_BACKWARD) - 1, -1, -1):
        after = after + (dscore,)
        dscore = SCORES_BACKWARD[i](dscore, given[i], m, n, place, args[i])
    return dscore, after


@triton.jit
def apply_masks(keep, m, n, place, args, KEEPS: tl.constexpr):
    """Which of the scores of `keep` all masks keep."""
    for i in tl.static_range(len(KEEPS)):
        keep = keep & KEEPS[i](m, n, place, args[i])
    return keep
