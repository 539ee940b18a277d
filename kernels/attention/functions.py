"""How score terms and masks are composed, and how attention's kernels walk them.

Attention's kernels know no term by name. They get tuples of Triton functions as constexprs, with
the arguments of each in parallel tuples, and call them in order on whatever tile they hold:

    score(score, m, n, place, args) -> score
    score_backward(dscore, score, m, n, place, args) -> dscore     (score: what `score` was given)
    parameter_backward(dscore, score, m, n, place, args) -> what each score adds to a gradient
    index(m, n, place, args) -> to which entry of the term's table it adds that
    keep(m, n, place, args) -> which scores count
    key_range(first, last, place, args) -> first, end, full_first, full_end
    query_range(first, last, place, args) -> first, end, full_first, full_end

m and n are the indices of queries and keys, of shapes that broadcast to the tile's: the same
function serves a tile and its transpose. `place` is a `Place`: (batch, head, queries, keys,
first_m, first_n). `args` holds a term's tensors and floats, then its integers.

A range function says for the queries (or keys) first to last, inclusive, which keys (queries) some
of them may see, and within those which all of them see. Outside the first range nothing is
computed, inside the second without `keep`. Ranges may reach beyond the ends of a sequence. A mask
whose blocks are listed (see `MaskFunctions`) leaves out more: what stands in none of its blocks.

The library's own terms stand in scores.py and masks.py.
"""

from typing import Any, NamedTuple


class ParameterFunctions(NamedTuple):
    """The Triton functions of the gradient of one of the tensors that a score term learns."""

    backward: Any
    """As `parameter_backward`."""
    index: Any
    """As `index`."""
    tensor: int
    """The tensor's place among those of the term. With several of one tensor, it gets their sum."""
    per_score: bool
    """Whether the tensor has a number for each score, (B, H, M, N) or 1 for any of these."""


class ScoreFunctions(NamedTuple):
    """The Triton functions of a score term."""

    score: Any
    score_backward: Any
    parameter_backward: Any = None
    """What each score adds to the gradient of the term's first tensor; None where that has none.

    The tensor has a number for each head, (B or 1, H or 1); or with `index` a table for each,
    (B or 1, H or 1, entries); or else, where `loads_tiles`, a number for each score, (B, H, M, N)
    or 1 for any of these.
    """
    index: Any = None
    """Which entry of its table a score depends on, an integer in [0, entries)."""
    hides: bool = False
    """Whether a score may become -inf."""
    loads_tiles: bool = False
    """Whether it loads a number for each score, which takes registers: tiles are smaller then."""
    parameters: tuple[ParameterFunctions, ...] = ()
    """In place of parameter_backward and index, for a term that learns other tensors than one."""
    shared: bool = False
    """Whether each matrix of the learned tensor serves several batch elements, as the last two of
    the args say; see `move_to_shared` in places.py."""

    def learners(self, tensors: int) -> tuple[ParameterFunctions, ...]:
        """What sums the gradients of the tensors that a term learns, of which it has so many."""
        if self.parameter_backward is None or tensors == 0:
            return self.parameters
        per_score = self.loads_tiles and self.index is None
        return (ParameterFunctions(self.parameter_backward, self.index, 0, per_score),)


class MaskFunctions(NamedTuple):
    """The Triton functions of a mask."""

    keep: Any
    key_range: Any = None
    """None where a mask may hide any key from any query."""
    query_range: Any = None
    hides_first_keys: bool = False
    """Whether later queries may see fewer of the first keys, as in a sliding window."""
    hides_last_keys: bool = False
    """Whether earlier queries may see fewer of the last keys, as in causal attention."""
    loads_tiles: bool = False
    """Whether it loads a number for each score, which takes registers: tiles are smaller then."""
    listed: bool = False
    """Whether its args begin and end with what `BlockLists` in structures.py has: lists of the
    blocks that anybody sees."""
    ends_with_keys: bool = False
    """Whether `keep` is false of all keys beyond the last, and the last query sees every key that
    there is: where it is the only mask, dK/dV does not ask whether a key or query exists. In the
    other kernels what is compared instead would take registers that they do not have."""


class Place(NamedTuple):
    """Where a tile of scores lies. Terms may take its fields by name or by number."""

    batch: Any
    """The batch element, or the number of a packed sequence."""
    head: Any
    """The query head."""
    queries: Any
    """How many queries the sequence has."""
    keys: Any
    first_m: Any
    """The tile's first query."""
    first_n: Any
    """The tile's first key."""
