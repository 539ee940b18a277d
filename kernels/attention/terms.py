"""How attention's kernels apply the terms of a call to their tiles; see functions.py."""

import triton
import triton.language as tl

from ..structures import restore_odd
from .structures import Arguments, BlockLists

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.constexpr_function
def is_pair(argument):
    """Whether an integer came in two halves."""
    return isinstance(argument, tuple | tl.tuple)


@triton.jit
def unpack(argument):
    """The integer that `_pack` was given."""
    if is_pair(argument):
        high, low = argument
        return (restore_odd(high).to(tl.int64) << 32) | restore_odd(low).to(tl.int64)
    else:
        return restore_odd(argument)


@triton.constexpr_function
def sum_before(counts, term):
    """How many arguments come before a term's."""
    return sum(counts[:term])


@triton.jit
def take_arguments(given, COUNTS: tl.constexpr, PLACES: tl.constexpr, FIRST_INTEGER: tl.constexpr):
    """Of the arguments of all terms those of some terms, one tuple for each of these."""
    taken = ()
    for i in tl.static_range(len(COUNTS)):
        own = ()
        for j in tl.static_range(sum_before(COUNTS, i), sum_before(COUNTS, i + 1)):
            if PLACES[j] < FIRST_INTEGER:
                own = own + (given[PLACES[j]],)
            else:
                own = own + (unpack(given[PLACES[j]]),)
        taken = taken + (own,)
    return taken


@triton.jit
def part_arguments(given, TERMS: tl.constexpr):
    """The arguments of all terms as those of each: its tensors, its floats, then its integers."""
    lists = ()
    if TERMS.lists is not None:
        lists = BlockLists(
            given[TERMS.lists.row_counts],
            given[TERMS.lists.row_blocks],
            given[TERMS.lists.column_counts],
            given[TERMS.lists.column_blocks],
            unpack(given[TERMS.lists.queries]),
            unpack(given[TERMS.lists.keys]),
            unpack(given[TERMS.lists.rows]),
            unpack(given[TERMS.lists.columns]),
            unpack(given[TERMS.lists.batch_step]),
            unpack(given[TERMS.lists.head_step]),
        )
    SCORE_COUNTS: tl.constexpr = TERMS.score_counts
    SCORE_PLACES: tl.constexpr = TERMS.score_places
    MASK_COUNTS: tl.constexpr = TERMS.mask_counts
    MASK_PLACES: tl.constexpr = TERMS.mask_places
    return Arguments(
        take_arguments(given, SCORE_COUNTS, SCORE_PLACES, TERMS.first_integer),
        take_arguments(given, MASK_COUNTS, MASK_PLACES, TERMS.first_integer),
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
def take_log_sum(lse, FOLDED: tl.constexpr):
    """lse as `weigh` takes it: to base 2 where scores are FOLDED."""
    return lse * LOG2E if FOLDED else lse


@triton.jit
def weigh(score, log_sum, scale, FOLDED: tl.constexpr):
    """exp(score - lse), lse as `take_log_sum` gives it. A FOLDED score has not been scaled yet."""
    if FOLDED:
        return tl.exp2(tl.fma(score, scale * LOG2E, -log_sum))
    else:
        # The difference first: it has fewer digits to lose than its parts.
        return tl.exp2((score - log_sum) * LOG2E)


@triton.jit
def apply_scores(score, m, n, place, args, TERMS: tl.constexpr):
    """The scores after all terms, and what each term was given."""
    given = ()
    for i in tl.static_range(len(TERMS.scores)):
        given = given + (score,)
        score = TERMS.scores[i](score, m, n, place, args[i])
    return score, given


@triton.jit
def apply_scores_backward(dscore, given, m, n, place, args, TERMS: tl.constexpr):
    """The gradient before all terms, from that after them and what each was given.

    Also the gradient after each term, the last term's first.
    """
    after = ()
    for i in tl.static_range(len(TERMS.scores_backward) - 1, -1, -1):
        after = after + (dscore,)
        dscore = TERMS.scores_backward[i](dscore, given[i], m, n, place, args[i])
    return dscore, after


@triton.jit
def apply_masks(keep, m, n, place, args, TERMS: tl.constexpr):
    """Which of the scores of `keep` all masks keep; with None, which of all scores."""
    for i in tl.static_range(len(TERMS.keeps)):
        kept = TERMS.keeps[i](m, n, place, args[i])
        keep = kept if keep is None else keep & kept
    return keep
