"""The terms of a call as its kernels take them: what composes them, and all their arguments."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.compiler import is_dynamo_compiling

from .terms import Causal, CausalFromFirst, Softcap, Term, WindowLeft, WindowRight

CONSTANT = frozenset({Causal, CausalFromFirst, Softcap, WindowLeft, WindowRight})
"""Terms that are numbers which never change."""


class Prepared(NamedTuple):
    """The terms of a call as its kernels take them."""

    terms: Sequence[Term]
    description: str
    tensors: list[torch.Tensor]
    floats: list[float]
    integers: list[int]
    learned: list[int]


def prepare_terms(terms: Sequence[Term], dtype: torch.dtype) -> Prepared:
    """What kernels are told of terms, for q, k and v of a dtype."""
    if is_dynamo_compiling() or not all(type(term) in CONSTANT for term in terms):
        terms = resolve_tensors(terms)
        described = description(terms, dtype)
        return Prepared(terms, described, *gather_arguments(terms), find_learned(terms))
    key = (*terms, dtype)
    prepared = _prepared.get(key)
    if prepared is None:
        if len(_prepared) >= MOST_PREPARED:
            _prepared.clear()
        described = description(terms, dtype)
        prepared = Prepared(terms, described, *gather_arguments(terms), [])
        _prepared[key] = prepared
    return prepared


MOST_PREPARED = 256

_prepared: dict[tuple, Prepared] = {}
"""Of terms that never change, what has been prepared."""


def description(terms: Sequence[Term], dtype: torch.dtype) -> str:
    """The terms as `kernels.attention.composition.compose` takes them."""
    described = [
        f"{term.function_name(dtype)}:{len(term.tensors)}:{len(term.floats)}:{len(term.integers)}"
        for term in terms
    ]
    return ";".join(described)


def resolve_tensors(terms: Sequence[Term]) -> Sequence[Term]:
    """The terms without lazily negated tensors, whose numbers kernels would read unnegated.

    That is for all others left to the launchers, but what they made has strides of its own.
    """
    # Dynamo cannot ask, and what it resolves in vain costs nothing.
    return [
        term.with_tensors([tensor.resolve_neg() for tensor in term.tensors])
        if term.tensors
        and (is_dynamo_compiling() or any(tensor.is_neg() for tensor in term.tensors))
        else term
        for term in terms
    ]


def gather_arguments(
    terms: Sequence[Term],
) -> tuple[list[torch.Tensor], list[float], list[int]]:
    """The tensors, floats and integers of all terms, one term after another."""
    tensors: list[torch.Tensor] = []
    floats: list[float] = []
    integers: list[int] = []
    for term in terms:
        tensors += term.tensors
        floats += term.floats
        integers += term.integers
    return tensors, floats, integers


def find_learned(terms: Sequence[Term]) -> list[int]:
    """The places, among the tensors of all terms, of those that get a gradient."""
    places, first = [], 0
    for term in terms:
        places += [first + place for place in term.learned_tensors]
        first += len(term.tensors)
    return places


def rebind_tensors(terms: Sequence[Term], tensors: Sequence[torch.Tensor]) -> list[Term]:
    """The terms with these as the tensors of all of them together."""
    result: list[Term] = []
    first = 0
    for term in terms:
        count = len(term.tensors)
        result.append(term.with_tensors(tensors[first : first + count]))
        first += count
    return result
