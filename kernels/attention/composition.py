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
function serves a tile and its transpose. `place` is (batch, query head, number of queries, number
of keys, the tile's first query, the tile's first key). `args` holds a term's tensors and floats,
then its integers.

A range function says for the queries (or keys) first to last, inclusive, which keys (queries) some
of them may see, and within those which all of them see. Outside the first range nothing is
computed, inside the second without `keep`. Ranges may reach beyond the ends of a sequence. A mask
whose blocks are listed (see `MaskFunctions`) leaves out more: what stands in none of its blocks.

The library's own terms stand in attention_scores.py.
"""

import functools
import hashlib
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


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
    """Whether its args begin and end as BLOCK_LISTS in attention_lists.py says, with lists of the
    blocks that anybody sees."""


_defined: dict[str, ScoreFunctions | MaskFunctions] = {}


def define(name: str, functions: ScoreFunctions | MaskFunctions) -> None:
    """Enter a term's functions under a name."""
    _defined[name] = functions


def define_own(name: str, functions: ScoreFunctions | MaskFunctions) -> str:
    """Enter a user's functions under a name that none has yet, and return it.

    A class may be defined again, in a notebook for example, and then means something else.
    """
    if not isinstance(functions, ScoreFunctions | MaskFunctions):
        raise TypeError(
            f"triton_functions() of {name} must return ScoreFunctions or MaskFunctions, "
            f"got {functions!r}"
        )
    free = name
    while free in _defined:
        free = f"{name} {len(_defined)}"
    define(free, functions)
    return free


ANY_SIZE = 2**30
"""No bound of a tile."""

# The integers that the terms of one call may have in all.
MOST_INTEGERS = 24
INTEGERS = tuple(f"integer_{place}" for place in range(MOST_INTEGERS))


class Parameter(NamedTuple):
    """What a term learns."""

    term: int
    """Its place among the score terms."""
    per_score: bool
    """Whether it has a number for each score."""


@dataclass(frozen=True, eq=False)
class Composition:
    """The terms of a call, as constexprs of the kernels. There is one object a composition."""

    layout: tuple[tuple[bool, int, int], ...]
    """Of each term: whether it is a mask, and how many tensors and floats it has."""
    constants: dict[str, Any]
    """The constexprs of all terms together, of which a kernel takes those that it needs."""
    integers: int
    """How many integers there are."""
    has_arguments: bool
    """Whether there is anything to pass at all."""
    hides_first_keys: bool
    term_class: str
    """Which of the TERM_CLASSES of attention_config.py all terms together are."""
    parameters: dict[int, Parameter]
    """The tensors that may get a gradient, by their places among the tensors of all terms."""
    largest_tile: tuple[int, int]
    """How many queries and keys a tile may have so that it lies within one listed block."""

    def arguments(
        self,
        tensors: Sequence[torch.Tensor | None],
        floats: Sequence[float],
        integers: Sequence[int],
    ) -> dict[str, Any]:
        """The runtime arguments of a kernel: score_args, mask_args, and as many integers."""
        score_args, mask_args = (), ()
        first_tensor = first_float = 0
        for is_mask, tensor_count, float_count in self.layout:
            own = (
                *tensors[first_tensor : first_tensor + tensor_count],
                *floats[first_float : first_float + float_count],
            )
            first_tensor += tensor_count
            first_float += float_count
            if is_mask:
                mask_args += (own,)
            else:
                score_args += (own,)
        named = dict(zip(INTEGERS, integers, strict=False))
        return {**named, "score_args": score_args, "mask_args": mask_args}


@functools.cache
def compose(terms: str) -> Composition:
    """The composition that a description names.

    A description has `name:tensors:floats:integers` for each term, these being how many it has, and
    semicolons between them. A name may end with `@queries,keys`: tiles must divide these.
    """
    # The library's own terms, whose file needs this one first.
    importlib.import_module(f"{__package__}.scores")
    layout, score_bounds, mask_bounds = [], [], []
    listed: int | None = None
    largest_tile = (ANY_SIZE, ANY_SIZE)
    scores: list[ScoreFunctions] = []
    masks: list[MaskFunctions] = []
    parameters: dict[int, Parameter] = {}
    integers = arguments = tensors = 0
    for term in filter(None, terms.split(";")):
        name, tensor_count, float_count, integer_count = term.rsplit(":", 3)
        name, _, sizes = name.partition("@")
        functions = _defined[name]
        bounds = (integers, integers + int(integer_count))
        integers = bounds[1]
        arguments += int(tensor_count) + int(float_count) + int(integer_count)
        if isinstance(functions, MaskFunctions):
            if functions.listed:
                if listed is not None:
                    raise ValueError("attention: only one mask may list its blocks")
                listed = len(masks)
                queries, keys = sizes.split(",")
                largest_tile = (power_of_two_in(int(queries)), power_of_two_in(int(keys)))
            masks.append(functions)
            mask_bounds.append(bounds)
        else:
            if functions.parameter_backward is not None:
                per_score = functions.loads_tiles and functions.index is None
                parameters[tensors] = Parameter(len(scores), per_score)
            scores.append(functions)
            score_bounds.append(bounds)
        tensors += int(tensor_count)
        is_mask = isinstance(functions, MaskFunctions)
        layout.append((is_mask, int(tensor_count), int(float_count)))
    if integers > MOST_INTEGERS:
        raise ValueError(
            f"attention: terms may have {MOST_INTEGERS} integers in all, got {integers}"
        )
    return Composition(
        layout=tuple(layout),
        constants={
            "SOURCES": sources_of([f for term in (*scores, *masks) for f in term]),
            "SCORES": tuple(term.score for term in scores),
            "SCORES_BACKWARD": tuple(term.score_backward for term in scores),
            "PARAMETERS_BACKWARD": tuple(term.parameter_backward for term in scores),
            "INDICES": tuple(term.index for term in scores),
            "SCORE_BOUNDS": tuple(score_bounds),
            # Whether a term may make a score -inf.
            "SCORES_HIDE": any(term.hides for term in scores),
            "KEEPS": tuple(mask.keep for mask in masks),
            "MASK_BOUNDS": tuple(mask_bounds),
            # Whether a mask may hide any key from any query; it has no range then.
            "SCATTERED": any(mask.key_range is None for mask in masks),
            # Which of the masks lists its blocks.
            "LISTED": listed,
            "KEY_RANGES": tuple(mask.key_range for mask in masks),
            "QUERY_RANGES": tuple(mask.query_range for mask in masks),
            "HIDES_FIRST": any(mask.hides_first_keys for mask in masks),
            "HIDES_LAST": any(mask.hides_last_keys for mask in masks),
        },
        integers=integers,
        has_arguments=arguments > 0,
        hides_first_keys=any(mask.hides_first_keys for mask in masks),
        term_class=term_class(scores, masks, arguments),
        parameters=parameters,
        largest_tile=largest_tile,
    )


def sources_of(functions: Sequence[Any]) -> str:
    """What the Triton functions among these are made of, with all that they call, in one word.

    Triton keeps compiled kernels on disk, and of functions in a tuple it looks at the names alone:
    without this a kernel compiled for a term would go on being taken when the term is another.
    """
    keys = [function.cache_key for function in functions if hasattr(function, "cache_key")]
    return hashlib.sha256("".join(keys).encode()).hexdigest()[:16] if keys else ""


def power_of_two_in(size: int) -> int:
    """The largest power of two that divides a block's size."""
    return size & -size


def term_class(
    scores: Sequence[ScoreFunctions], masks: Sequence[MaskFunctions], arguments: int
) -> str:
    """The class of some terms that have so many tensors, floats and integers in all."""
    if any(term.loads_tiles for term in (*scores, *masks)):
        return "tensor"
    scattered = any(mask.key_range is None for mask in masks)
    return "index" if scores or scattered or arguments else "plain"


@triton.constexpr_function
def bound(bounds, term, side):
    """Where the integers of a term begin (side 0) and end (side 1) among those of all terms."""
    return bounds[term][side]


@triton.jit
def with_integers(args, integers, BOUNDS: tl.constexpr):
    """Each term's arguments: its tensors and floats, then its integers.

    Integers come to a kernel on their own, because those within a tuple are specialised upon, and a
    kernel would be compiled again for some lengths.
    """
    complete = ()
    for i in tl.static_range(len(BOUNDS)):
        own = args[i]
        for j in tl.static_range(bound(BOUNDS, i, 0), bound(BOUNDS, i, 1)):
            own = own + (integers[j],)
        complete = complete + (own,)
    return complete


@triton.jit
def scaled(product, scale, SCALE: tl.constexpr):
    """A product of q and k as a score, by SCALE where that is given."""
    if SCALE is not None:
        return product * SCALE
    else:
        return product * scale


@triton.jit
def weight_of(score, lse, scale, FOLDED: tl.constexpr):
    """exp(score - lse). A FOLDED score has not been scaled yet."""
    if FOLDED:
        return tl.exp2(score * (scale * LOG2E) - lse * LOG2E)
    else:
        # The difference first: it has fewer digits to lose than its parts.
        return tl.exp2((score - lse) * LOG2E)


@triton.jit
def composed_score(score, m, n, place, args, SCORES: tl.constexpr):
    """The scores after all terms, and what each term was given."""
    given = ()
    for i in tl.static_range(len(SCORES)):
        given = given + (score,)
        score = SCORES[i](score, m, n, place, args[i])
    return score, given


@triton.jit
def composed_score_backward(dscore, given, m, n, place, args, SCORES_BACKWARD: tl.constexpr):
    """The gradient before all terms, from that after them and what each was given.

    Also the gradient after each term, the last term's first.
    """
    after = ()
    for i in tl.static_range(len(SCORES_BACKWARD) - 1, -1, -1):
        after = after + (dscore,)
        dscore = SCORES_BACKWARD[i](dscore, given[i], m, n, place, args[i])
    return dscore, after


@triton.jit
def composed_keep(keep, m, n, place, args, KEEPS: tl.constexpr):
    """Which of the scores of `keep` all masks keep."""
    for i in tl.static_range(len(KEEPS)):
        keep = keep & KEEPS[i](m, n, place, args[i])
    return keep


@triton.jit
def composed_range(first, last, length, place, args, RANGES: tl.constexpr, BLOCK: tl.constexpr):
    """What a block sees of a sequence of `length`, by whole blocks.

    Returns (first, end, full_first, full_end): the first and end of what is seen by some, and those
    of the blocks within it that are seen by all, in multiples of BLOCK where they are inside.
    """
    begin = 0
    end = length
    full_begin = 0
    full_end = length
    for i in tl.static_range(len(RANGES)):
        if RANGES[i] is None:
            full_end = 0
        else:
            seen = RANGES[i](first, last, place, args[i])
            begin = tl.maximum(begin, seen[0])
            end = tl.minimum(end, seen[1])
            full_begin = tl.maximum(full_begin, seen[2])
            full_end = tl.minimum(full_end, seen[3])
    return begin, end, tl.cdiv(full_begin, BLOCK) * BLOCK, full_end // BLOCK * BLOCK


@triton.jit
def three_parts(first, end, full_first, full_end, BLOCK: tl.constexpr):
    """The bounds of the parts of a range: what some see, what all see, and what some see again."""
    first = first // BLOCK * BLOCK
    none_full = full_end <= full_first
    return (
        first,
        tl.where(none_full, first, full_first),
        tl.where(none_full, first, full_end),
        end,
    )


# A range has three parts: blocks that some see before those that all see, these, and blocks after.
FULL = tl.constexpr(1)


@triton.constexpr_function
def has_part(part, hides_first, scattered, listed):
    """Whether a range has a part at all: the last one also holds a sequence's incomplete block.

    Where blocks are listed, the last part is all there is.
    """
    unlisted = listed is None
    return (hides_first and unlisted, not scattered and unlisted, True)[part]
