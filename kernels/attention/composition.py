"""What the terms of a call are, together, to attention's kernels; see functions.py."""

import functools
import hashlib
import importlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..structures import make_odd
from .functions import MaskFunctions, ParameterFunctions, ScoreFunctions
from .structures import BlockLists, Terms

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


class Parameter(NamedTuple):
    """What sums the gradient of a tensor that a term learns."""

    learner: int
    """Its place among all of these."""
    per_score: bool
    """Whether the tensor has a number for each score."""
    repeat: int | None
    """The place, among the integers, of how many batch elements in a row share one of its matrices;
    None where each has its own, or all share one."""


@dataclass(frozen=True, eq=False)
class Composition:
    """The terms of a call, as constexprs of the kernels. There is one object a composition."""

    terms: Terms
    has_arguments: bool
    """Whether there is anything to pass at all."""
    term_class: str
    """Which of the TERM_CLASSES of tables.py all terms together are."""
    parameters: dict[int, list[Parameter]]
    """The tensors that may get a gradient, by their places among the tensors of all terms. That is
    the sum of several where there are several."""
    largest_tile: tuple[int, int]
    """How many queries and keys a tile may have so that it lies within one listed block."""


def join_arguments(
    tensors: Sequence[torch.Tensor], floats: Sequence[float], integers: Sequence[int]
) -> tuple[Any, ...]:
    """The arguments of all terms as kernels take them, integers as odd numbers."""
    return (*tensors, *floats, *map(_pack, integers))


def _pack(integer: int) -> int | tuple[int, int]:
    """An integer as an odd number, or where that has not room in 64 bits, as two."""
    if -(2**62) <= integer < 2**62 - 1:
        return make_odd(integer)
    return make_odd(integer >> 32), make_odd(integer & 0xFFFFFFFF)


@functools.cache
def compose(terms: str) -> Composition:
    """The composition that a description names.

    A description has `name:tensors:floats:integers` for each term, these being how many it has, and
    semicolons between them. A name may end with `@queries,keys`: tiles must divide these.
    """
    # The library's own terms, whose files need this one first.
    for own in ("scores", "masks"):
        importlib.import_module(f"{__package__}.{own}")
    described = [
        (name, *map(int, counts))
        for name, *counts in (term.rsplit(":", 3) for term in filter(None, terms.split(";")))
    ]
    tensors, floats, integers = (sum(term[kind] for term in described) for kind in (1, 2, 3))
    # All tensors come first, then all floats, then all integers.
    starts = (0, tensors, tensors + floats)
    free_places = [itertools.count(start) for start in starts]
    lists, largest_tile = None, (ANY_SIZE, ANY_SIZE)
    scores: list[ScoreFunctions] = []
    masks: list[MaskFunctions] = []
    score_places, mask_places = [], []
    learners: list[ParameterFunctions] = []
    terms_of_learners: list[int] = []
    parameters: dict[int, list[Parameter]] = {}
    for name, *counts in described:
        name, _, sizes = name.partition("@")
        functions = _defined[name]
        places = tuple(
            place
            for free, count in zip(free_places, counts, strict=True)
            for place in itertools.islice(free, count)
        )
        if isinstance(functions, ScoreFunctions):
            for learner in functions.learners(counts[0]):
                own = parameters.setdefault(places[learner.tensor], [])
                repeat = places[-2] - tensors - floats if functions.shared else None
                own.append(Parameter(len(learners), learner.per_score, repeat))
                learners.append(learner)
                terms_of_learners.append(len(scores))
            scores.append(functions)
            score_places.append(places)
        else:
            if functions.listed:
                if lists is not None:
                    raise ValueError("attention: only one mask may list its blocks")
                lists = BlockLists(*places[:4], *places[-6:])
                queries, keys = sizes.split(",")
                largest_tile = (power_of_two_in(int(queries)), power_of_two_in(int(keys)))
            masks.append(functions)
            mask_places.append(places)
    scattered = any(mask.key_range is None for mask in masks)
    return Composition(
        terms=Terms(
            scores=tuple(term.score for term in scores),
            scores_backward=tuple(term.score_backward for term in scores),
            parameters_backward=tuple(learner.backward for learner in learners),
            indices=tuple(learner.index for learner in learners),
            learners=tuple(terms_of_learners),
            keeps=tuple(mask.keep for mask in masks),
            key_ranges=tuple(mask.key_range for mask in masks),
            query_ranges=tuple(mask.query_range for mask in masks),
            score_counts=tuple(map(len, score_places)),
            score_places=tuple(itertools.chain(*score_places)),
            mask_counts=tuple(map(len, mask_places)),
            mask_places=tuple(itertools.chain(*mask_places)),
            first_integer=tensors + floats,
            scores_hide=any(term.hides for term in scores),
            scattered=scattered,
            lists=lists,
            hides_first=any(mask.hides_first_keys for mask in masks),
            hides_last=any(mask.hides_last_keys for mask in masks),
            ends_with_keys=any(mask.ends_with_keys for mask in masks) and not scattered,
            sources=digest([f for term in (*scores, *masks, *learners) for f in term]),
        ),
        has_arguments=tensors + floats + integers > 0,
        term_class=classify(scores, masks, tensors + floats + integers),
        parameters=parameters,
        largest_tile=largest_tile,
    )


def digest(functions: Sequence[Any]) -> str:
    """What the Triton functions among these are made of, with all that they call, in one word.

    Triton keeps compiled kernels on disk, and of functions in a tuple it looks at the names alone:
    without this a kernel compiled for a term would go on being taken when the term is another.
    """
    keys = [function.cache_key for function in functions if hasattr(function, "cache_key")]
    return hashlib.sha256("".join(keys).encode()).hexdigest()[:16] if keys else ""


def power_of_two_in(size: int) -> int:
    """The largest power of two that divides a block's size."""
    return size & -size


def classify(
    scores: Sequence[ScoreFunctions], masks: Sequence[MaskFunctions], arguments: int
) -> str:
    """The class of some terms that have so many tensors, floats and integers in all."""
    if any(term.loads_tiles for term in (*scores, *masks)):
        return "tensor"
    scattered = any(mask.key_range is None for mask in masks)
    return "index" if scores or scattered or arguments else "plain"
