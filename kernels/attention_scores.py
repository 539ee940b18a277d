"""Score terms and masks of attention: the Triton functions of each, and how a kernel walks them.

Attention's kernels know none of these functions by name. They get tuples of them as constexprs,
with the arguments of each in parallel tuples, and call them in order on whatever tile they hold:

    score(score, m, n, place, args) -> score
    score_backward(dscore, score, m, n, place, args) -> dscore     (score: what `score` was given)
    keep(m, n, place, args) -> which scores count
    key_range(first, last, place, args) -> first, end, full_first, full_end
    query_range(first, last, place, args) -> first, end, full_first, full_end

m and n are the indices of queries and keys, of shapes that broadcast to the tile's: the same
function serves a tile and its transpose. `place` is (batch, query head, number of queries, number
of keys, the tile's first query, the tile's first key). `args` holds a term's tensors and floats,
then its integers.

A range function says for the queries (or keys) first to last, inclusive, which keys (queries) some
of them may see, and within those which all of them see. Outside the first range nothing is
computed, inside the second without `keep`. Ranges may reach beyond the ends of a sequence.

A term is added by a `ScoreFunctions` or `MaskFunctions` under a name, see `define`.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .common import tanh

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


class ScoreFunctions(NamedTuple):
    """The Triton functions of a score term."""

    score: Any
    score_backward: Any
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


# The integers that the terms of one call may have in all.
MOST_INTEGERS = 12
INTEGERS = tuple(f"integer_{place}" for place in range(MOST_INTEGERS))


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
    semicolons between them.
    """
    layout, score_bounds, mask_bounds = [], [], []
    scores: list[ScoreFunctions] = []
    masks: list[MaskFunctions] = []
    integers = arguments = 0
    for term in filter(None, terms.split(";")):
        name, tensor_count, float_count, integer_count = term.rsplit(":", 3)
        functions = _defined[name]
        bounds = (integers, integers + int(integer_count))
        integers = bounds[1]
        arguments += int(tensor_count) + int(float_count) + int(integer_count)
        if isinstance(functions, MaskFunctions):
            masks.append(functions)
            mask_bounds.append(bounds)
        else:
            scores.append(functions)
            score_bounds.append(bounds)
        is_mask = isinstance(functions, MaskFunctions)
        layout.append((is_mask, int(tensor_count), int(float_count)))
    if integers > MOST_INTEGERS:
        raise ValueError(
            f"attention: terms may have {MOST_INTEGERS} integers in all, got {integers}"
        )
    return Composition(
        layout=tuple(layout),
        constants={
            "SCORES": tuple(term.score for term in scores),
            "SCORES_BACKWARD": tuple(term.score_backward for term in scores),
            "SCORE_BOUNDS": tuple(score_bounds),
            # Whether a term may make a score -inf.
            "SCORES_HIDE": any(term.hides for term in scores),
            "KEEPS": tuple(mask.keep for mask in masks),
            "MASK_BOUNDS": tuple(mask_bounds),
            # Whether a mask may hide any key from any query; it has no range then.
            "SCATTERED": any(mask.key_range is None for mask in masks),
            "KEY_RANGES": tuple(mask.key_range for mask in masks),
            "QUERY_RANGES": tuple(mask.query_range for mask in masks),
            "HIDES_FIRST": any(mask.hides_first_keys for mask in masks),
            "HIDES_LAST": any(mask.hides_last_keys for mask in masks),
        },
        integers=integers,
        has_arguments=arguments > 0,
        hides_first_keys=any(mask.hides_first_keys for mask in masks),
        term_class=term_class(scores, masks, arguments),
    )


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
    """The gradient before all terms, from that after them and what each was given."""
    for i in tl.static_range(len(SCORES_BACKWARD) - 1, -1, -1):
        dscore = SCORES_BACKWARD[i](dscore, given[i], m, n, place, args[i])
    return dscore


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
def has_part(part, hides_first, scattered):
    """Whether a range has a part at all: the last one also holds a sequence's incomplete block."""
    return (hides_first, not scattered, True)[part]


# Causal attention and sliding windows. The last query stands at the last key, or, as torch has it,
# the first query at the first key.


@triton.jit
def shift_of(place):
    """The key at which query 0 stands when the last query stands at the last key."""
    return place[3] - place[2]


@triton.jit
def causal_keep(m, n, place, args):
    return n <= m + shift_of(place)


@triton.jit
def causal_key_range(first, last, place, args):
    shift = shift_of(place)
    return 0, last + shift + 1, 0, first + shift + 1


@triton.jit
def causal_query_range(first, last, place, args):
    shift = shift_of(place)
    return first - shift, place[2], last - shift, place[2]


@triton.jit
def right_keep(m, n, place, args):
    return n <= m + shift_of(place) + args[0]


@triton.jit
def right_key_range(first, last, place, args):
    shift = shift_of(place) + args[0]
    return 0, last + shift + 1, 0, first + shift + 1


@triton.jit
def right_query_range(first, last, place, args):
    shift = shift_of(place) + args[0]
    return first - shift, place[2], last - shift, place[2]


@triton.jit
def left_keep(m, n, place, args):
    return n >= m + shift_of(place) - args[0]


@triton.jit
def left_key_range(first, last, place, args):
    shift = shift_of(place) - args[0]
    return first + shift, place[3], last + shift, place[3]


@triton.jit
def left_query_range(first, last, place, args):
    shift = shift_of(place) - args[0]
    return 0, last - shift + 1, 0, first - shift + 1


@triton.jit
def causal_from_first_keep(m, n, place, args):
    return n <= m


@triton.jit
def causal_from_first_key_range(first, last, place, args):
    return 0, last + 1, 0, first + 1


@triton.jit
def causal_from_first_query_range(first, last, place, args):
    return first, place[2], last, place[2]


# Key lengths: each batch element has its own number of keys that count.


@triton.jit
def key_lengths_keep(m, n, place, args):
    return n < tl.load(args[0] + place[0])


@triton.jit
def key_lengths_key_range(first, last, place, args):
    length = tl.load(args[0] + place[0])
    return 0, length, 0, length


@triton.jit
def key_lengths_query_range(first, last, place, args):
    length = tl.load(args[0] + place[0])
    end = tl.where(first < length, place[2], 0)
    return 0, end, tl.where(last < length, 0, end), end


# A boolean mask, (B, H, M, N) by strides that are 0 where it is broadcast.


@triton.jit
def boolean_mask_keep(m, n, place, args):
    stride_b, stride_h, stride_m, stride_n = args[1], args[2], args[3], args[4]
    batch, head, queries, keys, first_m, first_n = place
    base = args[0] + batch * tl.cast(stride_b, tl.int64) + head * tl.cast(stride_h, tl.int64)
    base += first_m * tl.cast(stride_m, tl.int64) + first_n * tl.cast(stride_n, tl.int64)
    offsets = (m - first_m) * stride_m + (n - first_n) * stride_n
    return tl.load(base + offsets, (m < queries) & (n < keys), other=0) != 0


@triton.jit
def far_pointers(m, n, place, args):
    """The addresses of a tile's elements where offsets within it need 64 bits."""
    base = args[0] + place[0] * tl.cast(args[1], tl.int64) + place[1] * tl.cast(args[2], tl.int64)
    return base + m * tl.cast(args[3], tl.int64) + n * tl.cast(args[4], tl.int64)


@triton.jit
def far_boolean_mask_keep(m, n, place, args):
    """The same where offsets within a tile need 64 bits."""
    pointers = far_pointers(m, n, place, args)
    return tl.load(pointers, (m < place[2]) & (n < place[3]), other=0) != 0


@triton.jit
def boolean_mask_of_rows_keep(m, n, place, args):
    """The same where keys lie next to each other and rows are aligned to 16 bytes."""
    stride_m = args[3] // 16 * 16
    batch, head, queries, keys, first_m, first_n = place
    base = args[0] + batch * tl.cast(args[1], tl.int64) // 16 * 16
    base += head * tl.cast(args[2], tl.int64) // 16 * 16
    base += first_m * tl.cast(stride_m, tl.int64) + first_n
    offsets = (m - first_m) * stride_m + (n - first_n)
    return tl.load(base + offsets, (m < queries) & (n < keys), other=0) != 0


# A bias, (B, H, M, N) by strides like the mask's, that gets no gradient.


@triton.jit
def additive_bias_score(score, m, n, place, args):
    base = args[0] + place[0] * tl.cast(args[1], tl.int64) + place[1] * tl.cast(args[2], tl.int64)
    base += place[4] * tl.cast(args[3], tl.int64) + place[5] * tl.cast(args[4], tl.int64)
    offsets = (m - place[4]) * args[3] + (n - place[5]) * args[4]
    bias = tl.load(base + offsets, (m < place[2]) & (n < place[3]), other=0.0)
    return score + bias.to(score.dtype)


@triton.jit
def far_additive_bias_score(score, m, n, place, args):
    pointers = far_pointers(m, n, place, args)
    bias = tl.load(pointers, (m < place[2]) & (n < place[3]), other=0.0)
    return score + bias.to(score.dtype)


# ALiBi: a slope a head, or a batch element and head, times the distance to the key.


@triton.jit
def alibi_score(score, m, n, place, args):
    slope = tl.load(args[0] + place[0] * args[1] + place[1] * args[2])
    return score - slope.to(score.dtype) * tl.abs(m + shift_of(place) - n)


@triton.jit
def unchanged(dscore, score, m, n, place, args):
    """The gradient of what adds to the score."""
    return dscore


# Softcap: cap * tanh(score / cap), exact in float32 or to 16 bits.


@triton.jit
def softcap_score(score, m, n, place, args):
    e = tl.exp2(score * (2.0 * LOG2E / args[0]))
    return args[0] - 2.0 * args[0] / (e + 1.0)


@triton.jit
def softcap_exact_score(score, m, n, place, args):
    return args[0] * tanh(score / args[0])[0]


@triton.jit
def softcap_score_backward(dscore, score, m, n, place, args):
    e = tl.exp2(tl.abs(score) * (-2.0 * LOG2E / args[0]))
    return dscore * (4.0 * e / ((1.0 + e) * (1.0 + e)))


define(
    "causal",
    MaskFunctions(causal_keep, causal_key_range, causal_query_range, hides_last_keys=True),
)
define(
    "right",
    MaskFunctions(right_keep, right_key_range, right_query_range, hides_last_keys=True),
)
define(
    "left",
    MaskFunctions(left_keep, left_key_range, left_query_range, hides_first_keys=True),
)
define(
    "causal from first",
    MaskFunctions(
        causal_from_first_keep,
        causal_from_first_key_range,
        causal_from_first_query_range,
        hides_last_keys=True,
    ),
)
define(
    "key lengths",
    MaskFunctions(key_lengths_keep, key_lengths_key_range, key_lengths_query_range),
)
define("boolean mask", MaskFunctions(boolean_mask_keep, loads_tiles=True))
define("boolean mask of rows", MaskFunctions(boolean_mask_of_rows_keep, loads_tiles=True))
define("far boolean mask", MaskFunctions(far_boolean_mask_keep, loads_tiles=True))
define(
    "additive bias", ScoreFunctions(additive_bias_score, unchanged, hides=True, loads_tiles=True)
)
define(
    "far additive bias",
    ScoreFunctions(far_additive_bias_score, unchanged, hides=True, loads_tiles=True),
)
define("alibi", ScoreFunctions(alibi_score, unchanged))
define("softcap", ScoreFunctions(softcap_score, softcap_score_backward))
define("softcap exact", ScoreFunctions(softcap_exact_score, softcap_score_backward))
