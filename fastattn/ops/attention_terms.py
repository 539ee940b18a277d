"""What is composed into attention's scores: terms that change them, and masks that drop some.

Each term is a small class that says the same thing twice: in PyTorch, for the reference, and as
Triton functions, for the kernels (see `fastattn/kernels/attention_scores.py`). Attention knows none
of them by name; a user's own goes where the library's go.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

import torch

Index = Any
"""Indices of queries or keys, or their numbers: integers or tensors that broadcast."""

OwnTerm = TypeVar("OwnTerm", bound="Term")


class Term:
    """What score terms and masks have in common. Derive from `ScoreTerm` or `MaskTerm`.

    Attributes:
        functions: The name of its Triton functions in attention_scores.py; None where the class
            gives them by `triton_functions`.
        learned: Whether the first tensor gets a gradient. Its Triton functions then have a
            `parameter_backward`.
        tensors: The tensors that its Triton functions get, as the first of their `args`; the first
            two dimensions of each are batch and heads, or 1 where it is the same for all.
        floats: The floats, which come after the tensors.
        integers: The integers, which come last. No value of theirs makes a kernel compile again.
    """

    functions: ClassVar[str | None] = None
    learned: ClassVar[bool] = False
    tensors: Sequence[torch.Tensor] = ()
    floats: Sequence[float] = ()
    integers: Sequence[int] = ()

    @classmethod
    def triton_functions(cls) -> Any:
        """The `ScoreFunctions` or `MaskFunctions` of a class that names none."""
        raise TypeError(f"{cls.__name__} must define triton_functions() or name its functions")

    def function_name(self, dtype: torch.dtype) -> str:
        """The name of its functions, for q, k and v of a dtype."""
        if self.functions is not None:
            return self.functions
        return _own_functions(type(self))

    def with_tensors(self: OwnTerm, tensors: Sequence[torch.Tensor]) -> OwnTerm:
        """The same term of other tensors."""
        other = copy.copy(self)
        other.tensors = tuple(tensors)
        return other


class ScoreTerm(Term):
    """A change of the scores, such as a cap or a bias. Gradients pass through it."""

    def score(
        self, score: torch.Tensor, m: Index, n: Index, queries: Index, keys: Index
    ) -> torch.Tensor:
        """The new scores, from scores (B, H, M, N)."""
        raise TypeError(f"{type(self).__name__} must define score()")


class MaskTerm(Term):
    """A mask: a score counts where all masks keep it."""

    def keep(self, m: Index, n: Index, queries: Index, keys: Index) -> torch.Tensor:
        """Which scores count: booleans that broadcast to (B, H, M, N)."""
        raise TypeError(f"{type(self).__name__} must define keep()")


# The names of the functions that classes brought along.
_own_names: dict[type[Term], str] = {}


def _own_functions(cls: type[Term]) -> str:
    """Enter the functions that a class brings along; they must be known before a kernel asks."""
    if cls not in _own_names:
        name = f"{cls.__module__}.{cls.__qualname__}".replace(":", ".").replace(";", ".")
        composition = importlib.import_module("fastattn.kernels.attention_composition")
        functions = cls.triton_functions()
        if cls.learned and getattr(functions, "parameter_backward", None) is None:
            raise TypeError(
                f"{cls.__name__} is learned, so that its triton_functions() must be ScoreFunctions "
                "with a parameter_backward"
            )
        _own_names[cls] = composition.define_own(name, functions)
    return _own_names[cls]


# Dynamo runs it instead of tracing it. The mark is all that torch.compiler.assume_constant_result
# sets, but that imports Dynamo.
_own_functions._dynamo_marked_constant = True  # type: ignore[attr-defined]


class Causal(MaskTerm):
    """Query i sees the keys up to its own place; the last query stands at the last key."""

    functions = "causal"

    def keep(self, m: Index, n: Index, queries: Index, keys: Index) -> torch.Tensor:
        return n <= m + keys - queries


class CausalFromFirst(MaskTerm):
    """Query i sees the keys up to key i, as `torch.nn.functional` has it."""

    functions = "causal from first"

    def keep(self, m: Index, n: Index, queries: Index, keys: Index) -> torch.Tensor:
        return n <= m


class WindowLeft(MaskTerm):
    """A query sees no further back than `reach` keys from its own place."""

    functions = "left"

    def __init__(self, reach: int) -> None:
        self.integers = (reach,)

    def keep(self, m: Index, n: Index, queries: Index, keys: Index) -> torch.Tensor:
        return n >= m + keys - queries - self.integers[0]


class WindowRight(MaskTerm):
    """A query sees no further ahead than `reach` keys from its own place."""

    functions = "right"

    def __init__(self, reach: int) -> None:
        self.integers = (reach,)

    def keep(self, m: Index, n: Index, queries: Index, keys: Index) -> torch.Tensor:
        return n <= m + keys - queries + self.integers[0]


class KeyLengths(MaskTerm):
    """Each batch element has its own number of keys; `lengths` (B,), int32 or int64."""

    functions = "key lengths"

    def __init__(self, lengths: torch.Tensor) -> None:
        self.tensors = (lengths.contiguous()[:, None],)

    def keep(self, m: Index, n: Index, queries: Index, keys: Index) -> torch.Tensor:
        return n < self.tensors[0][..., None, None]


class BooleanMask(MaskTerm):
    """An explicit mask, True where a score counts: (B or 1, H or 1, M or 1, N or 1)."""

    def __init__(self, mask: torch.Tensor) -> None:
        # Bytes, because a kernel compares what it loads.
        self.tensors = (mask.view(torch.uint8),)

    @property
    def integers(self) -> Sequence[int]:  # type: ignore[override]
        return broadcast_strides(self.tensors[0])

    def function_name(self, dtype: torch.dtype) -> str:
        return layout_name("boolean mask", self.integers)

    def keep(self, m: Index, n: Index, queries: Index, keys: Index) -> torch.Tensor:
        return self.tensors[0] != 0


class Softcap(ScoreTerm):
    """cap * tanh(score / cap)."""

    def __init__(self, cap: float) -> None:
        self.floats = (float(cap),)

    def function_name(self, dtype: torch.dtype) -> str:
        return "softcap" if dtype.itemsize == 2 else "softcap exact"

    def score(
        self, score: torch.Tensor, m: Index, n: Index, queries: Index, keys: Index
    ) -> torch.Tensor:
        return self.floats[0] * torch.tanh(score / self.floats[0])


def broadcast_strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """Strides, 0 along dimensions of size 1."""
    return tuple(
        0 if size == 1 else stride
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )


def layout_name(name: str, strides: Sequence[int]) -> str:
    """The name of the functions that read a tensor (B, H, M, N) of these strides."""
    # Offsets within a tile, of at most 128 queries and keys, may need 64 bits.
    if max(strides[2:]) >= 2**23:
        return f"far {name}"
    *others, last = strides
    aligned = last == 1 and all(stride % 16 == 0 for stride in others)
    return f"{name} of rows" if aligned else name


def description(terms: Sequence[Term], dtype: torch.dtype) -> str:
    """The terms as `kernels.attention_composition.compose` takes them."""
    described = [
        f"{term.function_name(dtype)}:{len(term.tensors)}:{len(term.floats)}:{len(term.integers)}"
        for term in terms
    ]
    return ";".join(described)


def gathered(
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


def learned_places(terms: Sequence[Term]) -> list[int]:
    """The places, among the tensors of all terms, of those that get a gradient."""
    places, first = [], 0
    for term in terms:
        if term.learned:
            places.append(first)
        first += len(term.tensors)
    return places


def rebound(terms: Sequence[Term], tensors: Sequence[torch.Tensor]) -> list[Term]:
    """The terms with these as the tensors of all of them together."""
    result: list[Term] = []
    first = 0
    for term in terms:
        count = len(term.tensors)
        result.append(term.with_tensors(tensors[first : first + count]))
        first += count
    return result
