"""What is composed into attention's scores: terms that change them, and masks that drop some.

Each term is a small class that says the same thing twice: in PyTorch, for the reference, and as
Triton functions, for the kernels (see `fastattn/kernels/attention/scores.py`). Attention knows none
of them by name; a user's own goes where the library's go.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

import torch

from ...kernels.private import run_while_tracing
from ...reference.softcap import softcapped
from ..core.arguments import check_constant, check_device, check_integers, read_softcap
from ..core.lazy_imports import own_name
from .shapes import (
    Sizes,
    broadcast_strides,
    check_broadcast,
    expand_dimensions,
    insert_dimension,
    is_dense,
    layout_name,
)

Index = Any
"""Indices of queries or keys, or their numbers: integers or tensors that broadcast."""

FARTHEST = 2**30 - 2
"""What no distance of a query from a key reaches. Kernels add distances in 32 bits, of which an odd
number (`make_odd`) leaves it 30; what needs more compiles another kernel."""

OwnTerm = TypeVar("OwnTerm", bound="Term")


class Term:
    """What score terms and masks have in common. Derive from `ScoreTerm` or `MaskTerm`.

    Attributes:
        functions: The name of its Triton functions in kernels/attention; None where the class
            gives them by `triton_functions`.
        learned: Whether the first tensor gets a gradient. Its Triton functions then have a
            `parameter_backward`.
        by_strides: Whether its Triton functions go by the strides of the tensors, which it then
            gives them as integers. Otherwise they get contiguous tensors, whatever strides those
            in `tensors` have: a copy is made where one is not contiguous.
        by_numbers: Whether it depends on which number a batch element or a head has, which a shard
            of either does not know.
        tensors: The tensors that its Triton functions get, as the first of their `args`; the first
            two dimensions of each are batch and heads, or 1 where it is the same for all.
        floats: The floats, which come after the tensors.
        integers: The integers, of 64 bits at most, which come last. No value of theirs makes a
            kernel compile again.

    A term may be made once and serve many calls: what is done in place to its tensors, or to what
    they are views of, counts from the next call on.
    """

    functions: ClassVar[str | None] = None
    learned: ClassVar[bool] = False
    by_strides: ClassVar[bool] = False
    by_numbers: bool = False
    tensors: Sequence[torch.Tensor] = ()
    floats: Sequence[float] = ()
    integers: Sequence[int] = ()

    @property
    def learned_tensors(self) -> Sequence[int]:
        """The places of the tensors that get a gradient."""
        return (0,) if self.learned else ()

    @classmethod
    def triton_functions(cls) -> Any:
        """The `ScoreFunctions` or `MaskFunctions` of a class that names none."""
        raise TypeError(f"{cls.__name__} must define triton_functions() or name its functions")

    def function_name(self, dtype: torch.dtype) -> str:
        """The name of its functions, for q, k and v of a dtype."""
        if self.functions is not None:
            return self.functions
        return _own_functions(type(self))

    def check(self, op: str, name: str, q: torch.Tensor, sizes: Sizes) -> None:
        """Raise an error that names the argument unless the term fits a call.

        Args:
            op: the function that was called.
            name: the argument that the term came by.
            q: the queries.
            sizes: batch elements, query heads, queries and keys.
        """
        if self.learned and (isinstance(self, MaskTerm) or not self.tensors):
            raise TypeError(f"{op}: {name} is learned, so it must be a ScoreTerm with a tensor")
        for place, tensor in enumerate(self.tensors):
            what = f"{name.split(':')[0]}: a tensor of {type(self).__name__}"
            if self.learned and place == 0:
                check_device(op, what, tensor, q)
            else:
                check_constant(op, what, tensor, q)
            if tensor.dim() < 2 or any(
                size not in (1, full) for size, full in zip(tensor.shape, sizes[:2], strict=False)
            ):
                raise ValueError(
                    f"{op}: {what} must begin with the dimensions batch and heads, {sizes[:2]} or "
                    f"1 for each, got {tuple(tensor.shape)}"
                )
        for integer in self.integers:
            if isinstance(integer, int) and not -(2**63) <= integer < 2**63:
                raise ValueError(f"{op}: {name}: integers must have 64 bits, got {integer}")

    def prepared(self: OwnTerm, sizes: Sizes) -> OwnTerm:
        """The term for one call of these sizes, its tensors made of what they are now."""
        if self.by_strides or all(tensor.is_contiguous() for tensor in self.tensors):
            return self
        return self.with_tensors([tensor.contiguous() for tensor in self.tensors])

    def with_tensors(self: OwnTerm, tensors: Sequence[torch.Tensor]) -> OwnTerm:
        """The same term of other tensors."""
        other = copy.copy(self)
        other.tensors = tuple(tensors)
        return other


class ScoreTerm(Term):
    """A change of the scores, such as a cap or a bias. Gradients pass through it.

    See `Term` for its attributes. Its Triton functions get contiguous tensors unless `by_strides`.
    """

    def score(
        self, score: torch.Tensor, m: Index, n: Index, queries: Index, keys: Index
    ) -> torch.Tensor:
        """The new scores, from scores (B, H, M, N)."""
        raise TypeError(f"{type(self).__name__} must define score()")


class MaskTerm(Term):
    """A mask: a score counts where all masks keep it.

    See `Term` for its attributes. Its Triton functions get contiguous tensors unless `by_strides`.
    """

    def keep(self, m: Index, n: Index, queries: Index, keys: Index) -> torch.Tensor:
        """Which scores count: booleans that broadcast to (B, H, M, N)."""
        raise TypeError(f"{type(self).__name__} must define keep()")


# The names of the functions that classes brought along.
_own_names: dict[type[Term], str] = {}


@run_while_tracing
def _own_functions(cls: type[Term]) -> str:
    """Enter the functions that a class brings along; they must be known before a kernel asks."""
    if cls not in _own_names:
        name = f"{cls.__module__}.{cls.__qualname__}".replace(":", ".").replace(";", ".")
        composition = importlib.import_module(own_name("fastattn.kernels.attention.composition"))
        functions = cls.triton_functions()
        if cls.learned and getattr(functions, "parameter_backward", None) is None:
            raise TypeError(
                f"{cls.__name__} is learned, so that its triton_functions() must be ScoreFunctions "
                "with a parameter_backward"
            )
        _own_names[cls] = composition.define_own(name, functions)
    return _own_names[cls]


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


class Window(MaskTerm):
    """How far from its own place a query sees to one side."""

    def __init__(self, reach: int) -> None:
        self.integers = (min(reach, FARTHEST),)

    def check(self, op: str, name: str, q: torch.Tensor, sizes: Sizes) -> None:
        if self.integers[0] < 0:
            raise ValueError(
                f"{op}: {name} must not be negative, got {self.integers[0]}: a side without a "
                "limit is None"
            )


class WindowLeft(Window):
    """A query sees no further back than `reach` keys from its own place."""

    functions = "left"

    def keep(self, m: Index, n: Index, queries: Index, keys: Index) -> torch.Tensor:
        return n >= m + keys - queries - self.integers[0]


class WindowRight(Window):
    """A query sees no further ahead than `reach` keys from its own place."""

    functions = "right"

    def keep(self, m: Index, n: Index, queries: Index, keys: Index) -> torch.Tensor:
        return n <= m + keys - queries + self.integers[0]


class KeyLengths(MaskTerm):
    """Each batch element has its own number of keys; `lengths` (B,), int32 or int64."""

    functions = "key lengths"

    def __init__(self, lengths: torch.Tensor) -> None:
        self.tensors = (insert_dimension(lengths, 1, at=1),)

    def check(self, op: str, name: str, q: torch.Tensor, sizes: Sizes) -> None:
        (lengths,) = self.tensors
        check_constant(op, name, lengths, q)
        check_integers(op, name, lengths)
        if tuple(lengths.shape) != (sizes[0], 1):
            shape = tuple(lengths.shape[:1] if lengths.dim() == 2 else lengths.shape)
            raise ValueError(f"{op}: {name} must have shape ({sizes[0]},), got {shape}")

    def keep(self, m: Index, n: Index, queries: Index, keys: Index) -> torch.Tensor:
        return n < self.tensors[0][..., None, None]


class BooleanMask(MaskTerm):
    """An explicit mask, True where a score counts; it broadcasts to (B, H, M, N)."""

    by_strides = True

    def __init__(self, mask: torch.Tensor) -> None:
        self.boolean = is_dense(mask) and mask.dtype is torch.bool
        # Bytes, because a kernel compares what it loads.
        self.tensors = (expand_dimensions(mask.view(torch.uint8) if self.boolean else mask),)

    def check(self, op: str, name: str, q: torch.Tensor, sizes: Sizes) -> None:
        (mask,) = self.tensors
        check_constant(op, name, mask, q)
        self.check_dtype(op, name)
        check_broadcast(op, name, mask, sizes)

    def check_dtype(self, op: str, name: str) -> None:
        """Raise an error unless it is boolean."""
        if not self.boolean:
            dtype = self.tensors[0].dtype
            raise TypeError(f"{op}: {name} must be boolean, True where attended, got {dtype}")

    @property
    def integers(self) -> Sequence[int]:  # type: ignore[override]
        return broadcast_strides(self.tensors[0])

    def function_name(self, dtype: torch.dtype) -> str:
        return layout_name("boolean mask", self.tensors[0])

    def keep(self, m: Index, n: Index, queries: Index, keys: Index) -> torch.Tensor:
        return self.tensors[0] != 0


class SharedMask(BooleanMask):
    """A mask (matrices, H or 1, M or 1, N or 1), shared as `SharedBias` is."""

    by_numbers = True

    def __init__(self, mask: torch.Tensor, repeat: int) -> None:
        super().__init__(mask)
        self.repeat = repeat
        # Known with a call.
        self.batch = 0

    def check(self, op: str, name: str, q: torch.Tensor, sizes: Sizes) -> None:
        (mask,) = self.tensors
        check_constant(op, name, mask, q)
        self.check_dtype(op, name)

    @property
    def integers(self) -> Sequence[int]:  # type: ignore[override]
        (mask,) = self.tensors
        return (*broadcast_strides(mask), self.repeat, mask.shape[0])

    def prepared(self, sizes: Sizes) -> SharedMask:
        term = self.with_tensors(self.tensors)
        term.batch = sizes[0]
        return term

    def function_name(self, dtype: torch.dtype) -> str:
        return layout_name("shared boolean mask", self.tensors[0])

    def keep(self, m: Index, n: Index, queries: Index, keys: Index) -> torch.Tensor:
        (mask,) = self.tensors
        places = torch.arange(self.batch, device=mask.device) // self.repeat % mask.shape[0]
        return mask[places] != 0


class Softcap(ScoreTerm):
    """cap * tanh(score / cap)."""

    def __init__(self, cap: float) -> None:
        self.floats = (float(cap),)

    def check(self, op: str, name: str, q: torch.Tensor, sizes: Sizes) -> None:
        read_softcap(op, self.floats[0], q.dtype)

    def function_name(self, dtype: torch.dtype) -> str:
        return "softcap" if dtype.itemsize == 2 else "softcap exact"

    def score(
        self, score: torch.Tensor, m: Index, n: Index, queries: Index, keys: Index
    ) -> torch.Tensor:
        return softcapped(score, self.floats[0])
