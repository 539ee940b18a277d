"""What is composed into attention's scores: terms that change them, and masks that drop some.

Each term is a small class that says the same thing twice: in PyTorch, for the reference, and as
Triton functions, for the kernels (see `fastattn/kernels/attention_scores.py`). Attention knows none
of them by name; a user's own goes where the library's go.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, ClassVar

import torch

Index = Any
"""Indices of queries or keys, or their numbers: integers or tensors that broadcast."""


class Term:
    """What score terms and masks have in common. Derive from `ScoreTerm` or `MaskTerm`.

    Attributes:
        functions: The name of its Triton functions in attention_scores.py; None where the class
            gives them by `triton_functions`.
        tensors: The tensors that its Triton functions get, as the first of their `args`; the first
            two dimensions of each are batch and heads, or 1 where it is the same for all.
        floats: The floats, which come after the tensors.
        integers: The integers, which come last. No value of theirs makes a kernel compile again.
    """

    functions: ClassVar[str | None] = None
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
        scores = importlib.import_module("fastattn.kernels.attention_scores")
        _own_names[cls] = scores.define_own(name, cls.triton_functions())
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

    def __init__(self, mask: torch.Tensor, queries: int, keys: int) -> None:
        # Bytes, because a kernel compares what it loads; broadcast by strides of 0.
        mask = mask.view(torch.uint8)
        self.tensors = (mask.expand(*mask.shape[:2], queries, keys),)

    @property
    def integers(self) -> Sequence[int]:  # type: ignore[override]
        return _broadcast_strides(self.tensors[0])

    def function_name(self, dtype: torch.dtype) -> str:
        *strides, last = self.integers
        if _far(self.integers):
            return "far boolean mask"
        aligned = last == 1 and all(stride % 16 == 0 for stride in strides)
        return "boolean mask of rows" if aligned else "boolean mask"

    def keep(self, m: Index, n: Index, queries: Index, keys: Index) -> torch.Tensor:
        return self.tensors[0] != 0


class AdditiveBias(ScoreTerm):
    """A bias added to the scores: (B or 1, H or 1, M or 1, N or 1), of a float dtype.

    It gets no gradient. A score of which it is -inf does not count.
    """

    def __init__(self, bias: torch.Tensor, queries: int, keys: int) -> None:
        self.tensors = (bias.expand(*bias.shape[:2], queries, keys),)

    @property
    def integers(self) -> Sequence[int]:  # type: ignore[override]
        return _broadcast_strides(self.tensors[0])

    def function_name(self, dtype: torch.dtype) -> str:
        return "far additive bias" if _far(self.integers) else "additive bias"

    def score(
        self, score: torch.Tensor, m: Index, n: Index, queries: Index, keys: Index
    ) -> torch.Tensor:
        return score + self.tensors[0]


class Alibi(ScoreTerm):
    """Minus a slope times the distance to the key; slopes (H,) or (B, H)."""

    functions = "alibi"

    def __init__(self, slopes: torch.Tensor) -> None:
        self.tensors = (slopes[None] if slopes.dim() == 1 else slopes,)

    @property
    def integers(self) -> Sequence[int]:  # type: ignore[override]
        return _broadcast_strides(self.tensors[0])

    def score(
        self, score: torch.Tensor, m: Index, n: Index, queries: Index, keys: Index
    ) -> torch.Tensor:
        distance = (m + keys - queries - n).abs()
        return score - self.tensors[0][..., None, None].to(score.dtype) * distance


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


def _broadcast_strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """Strides, 0 along the batch and the heads where there is one for all."""
    batch, heads, *rest = tensor.stride()
    return (
        0 if tensor.shape[0] == 1 else batch,
        0 if tensor.shape[1] == 1 else heads,
        *rest,
    )


def _far(strides: Sequence[int]) -> bool:
    """Whether offsets within a tile, of at most 128 queries and keys, may need 64 bits."""
    return max(strides[2:]) >= 2**23


def description(terms: Sequence[Term], dtype: torch.dtype) -> str:
    """The terms as `kernels.attention_scores.compose` takes them."""
    return ";".join(
        f"{term.function_name(dtype)}:{len(term.tensors)}:{len(term.floats)}:{len(term.integers)}"
        for term in terms
    )
