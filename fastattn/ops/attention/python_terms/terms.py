"""Terms of plain Python functions, with the signatures that FlexAttention has."""

import functools
import importlib
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch

from ....kernels.private import run_while_tracing
from ...core.arguments import check_device
from ...core.backends import HAS_TRITON
from ...core.lazy_imports import own_name
from ..terms import Index, MaskTerm, ScoreTerm, Sizes, Term
from .indexing import IndexByTensors
from .printed import Printed, print_mask, print_score
from .trace import INDICES, captured_values, trace_mask, trace_score

MaskFunction = Callable[[Any, Any, Any, Any], Any]
"""f(b, h, q_idx, kv_idx): whether a query sees a key."""

ScoreFunction = Callable[[Any, Any, Any, Any, Any], Any]
"""f(score, b, h, q_idx, kv_idx): the new score."""


class _PythonTerm(Term):
    """What both have in common: a function, and the name and arguments of what was printed."""

    by_strides = True

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.sizes: Sizes | None = None
        printed = _print(type(self), function)
        arguments = printed.arguments
        self.name = _define(printed) if HAS_TRITON else ""
        self.numbers_used = printed.numbers_used
        self.layouts = printed.layouts
        # Of what learns, a shard would have a part of the gradient.
        self.by_numbers = bool(printed.numbers_used or printed.layouts)
        self.floats = tuple(arguments.floats)
        self.numbers = tuple(arguments.integers)
        # Bytes, because a kernel compares what it loads; and before all, the batch and the heads.
        self.tensors = tuple(
            (x.view(torch.uint8) if x.dtype is torch.bool else x.detach())[None, None]
            for x in arguments.tensors
        )
        self.reads = len(self.tensors)

    @property
    def integers(self) -> tuple[int, ...]:  # type: ignore[override]
        read = self.tensors[: self.reads]
        sizes = [number for x in read for number in (*x.shape[2:], *x.stride()[2:])]
        return (*sizes, *self.numbers)

    @property
    def learned_tensors(self) -> range:  # type: ignore[override]
        """The places of the tensors that get a gradient; they come with a call."""
        return range(self.reads, len(self.tensors))

    def check(self, op: str, name: str, q: torch.Tensor, sizes: Sizes) -> None:
        super().check(op, name, q, sizes)
        for layout in self.layouts:
            check_device(op, f"{name}: a tensor that learns", layout.tensor, q)
            full: dict[str, int] = dict(zip(INDICES, sizes, strict=True))
            for role, size in zip(layout.roles, layout.tensor.shape, strict=True):
                if role is not None and (role in "bh" or layout.per_score) and size < full[role]:
                    raise ValueError(
                        f"{op}: {name}: a tensor that learns, {tuple(layout.tensor.shape)}, has "
                        f"{size} numbers along {role}, of which there are {full[role]}"
                    )

    def function_name(self, dtype: torch.dtype) -> str:
        return self.name

    def prepared(self, sizes: Sizes) -> "_PythonTerm":
        arranged = [layout.arrange(sizes) for layout in self.layouts]
        term = self.with_tensors((*self.tensors[: self.reads], *arranged))
        term.sizes = sizes
        return term

    def call(self, m: Index, n: Index, *score: torch.Tensor) -> torch.Tensor:
        """What the function gives for each score, (B, H, M, N), of which it sees one at a time."""
        assert self.sizes is not None
        leading = [torch.arange(size, device=m.device) for size in self.sizes[:2]]
        function = self.function
        for place in (3, 2, 1, 0):
            dims = tuple(0 if i == place else None for i in range(4))
            function = torch.vmap(function, (*(0 for _ in score), *dims))
        arranged = self.tensors[self.reads :]
        replaced = [
            (layout.tensor, layout.restore(x))
            for layout, x in zip(self.layouts, arranged, strict=True)
        ]
        with IndexByTensors(replaced=replaced):
            return function(*score, *leading, m.flatten(), n.flatten())


# In both `integers` is a property, for sizes are those of the tensors a term has by now.


class PythonMask(_PythonTerm, MaskTerm):  # type: ignore[misc]
    """The mask of a plain function; see `mask_mod`."""

    def keep(self, m: Index, n: Index, queries: Index, keys: Index) -> torch.Tensor:
        return self.call(m, n).bool()

    def keep_of(
        self, b: torch.Tensor, h: torch.Tensor, m: torch.Tensor, n: torch.Tensor
    ) -> torch.Tensor:
        """Which scores count of some pairs of a batch element and a head, (pairs, M, N)."""
        function = torch.vmap(self.function, (None, None, None, 0))
        function = torch.vmap(function, (None, None, 0, None))
        with IndexByTensors():
            kept = torch.vmap(function, (0, 0, None, None))(b, h, m, n)
        return kept.bool()


class PythonScore(_PythonTerm, ScoreTerm):  # type: ignore[misc]
    """The change of scores by a plain function; see `score_mod`."""

    def score(
        self, score: torch.Tensor, m: Index, n: Index, queries: Index, keys: Index
    ) -> torch.Tensor:
        return self.call(m, n, score).to(score.dtype)


def mask_mod(function: MaskFunction) -> PythonMask:
    """Make a mask of a plain Python function f(b, h, q_idx, kv_idx), as FlexAttention has them.

    See `fastattn.score_mod` for what a function may do.

    Args:
        function: says by the numbers of a batch element, a query head, a query and a key whether
            that query sees that key.

    Returns:
        A term for `score_mods` of `fastattn.attention`, `attention_varlen` and `attention_weights`.

    Raises:
        TypeError: the function cannot be compiled into the kernels.

    Example:
        >>> import fastattn, torch
        >>> q = k = v = torch.randn(1, 2, 8, 16)
        >>> near = fastattn.mask_mod(lambda b, h, q_idx, kv_idx: (q_idx - kv_idx).abs() <= 2)
        >>> fastattn.attention(q, k, v, causal=True, score_mods=[near]).shape
        torch.Size([1, 2, 8, 16])
    """
    return _term(PythonMask, function)


def score_mod(function: ScoreFunction) -> PythonScore:
    """Make a term of a plain Python function f(score, b, h, q_idx, kv_idx) that gives a new score.

    The function is called once, with tensors of no dimension, and what it computes is compiled into
    the kernels, forward and backward. It may capture tensors, which it indexes by all their
    dimensions, and numbers. Other values, and tensors of other sizes, compile nothing anew; but a
    number of which Python must know the value, as in `range(n)`, is compiled in. What is done in
    place to a captured tensor counts from the next call on.

    Captured tensors that require a gradient get it, the same bits every time: numbers of a batch
    element or head, tables of up to 1024 entries for each of these, and what is indexed by q_idx
    and kv_idx themselves. Another size of table is another kernel.

    The indices are those of one sequence: the first query is 0 and so is the first key. On the
    reference backend the function is called under `torch.vmap`.

    Args:
        function: says what becomes of a score by it and the numbers of its batch element, query
            head, query and key.

    Returns:
        A term for `score_mods` of `fastattn.attention`, `attention_varlen` and `attention_weights`.

    Raises:
        TypeError: the function cannot be compiled into the kernels.

    Example:
        >>> import fastattn, torch
        >>> q = k = v = torch.randn(1, 2, 8, 16)
        >>> slopes = torch.tensor([0.5, 0.25])
        >>> def alibi(score, b, h, q_idx, kv_idx):
        ...     return score - slopes[h] * (q_idx - kv_idx).abs()
        >>> fastattn.attention(q, k, v, score_mods=[fastattn.score_mod(alibi)]).shape
        torch.Size([1, 2, 8, 16])
    """
    return _term(PythonScore, function)


def and_masks(*functions: MaskFunction) -> MaskFunction:
    """Make a function of several f(b, h, q_idx, kv_idx): a query sees a key where all say so.

    Example:
        >>> before = lambda b, h, q_idx, kv_idx: kv_idx <= q_idx
        >>> near = lambda b, h, q_idx, kv_idx: q_idx - kv_idx < 3
        >>> q = k = v = torch.randn(1, 2, 8, 16)
        >>> o = fastattn.attention(q, k, v, mask_mod=fastattn.and_masks(before, near))
        >>> same = fastattn.attention(q, k, v, causal=True, window=2)
        >>> torch.testing.assert_close(o, same)
    """

    def keep(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        kept = [function(b, h, q_idx, kv_idx) for function in functions]
        return functools.reduce(lambda one, other: one & other, kept)

    return keep


def or_masks(*functions: MaskFunction) -> MaskFunction:
    """Make a function of several f(b, h, q_idx, kv_idx): a query sees a key where one says so.

    Example:
        >>> before = lambda b, h, q_idx, kv_idx: kv_idx <= q_idx
        >>> prefix = lambda b, h, q_idx, kv_idx: kv_idx < 4
        >>> q = k = v = torch.randn(1, 2, 8, 16)
        >>> fastattn.attention(q, k, v, mask_mod=fastattn.or_masks(before, prefix)).shape
        torch.Size([1, 2, 8, 16])
    """

    def keep(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        kept = [function(b, h, q_idx, kv_idx) for function in functions]
        return functools.reduce(lambda one, other: one | other, kept)

    return keep


# By function: its captured values when a term was made of it, and the term.
_made: WeakKeyDictionary[Callable[..., Any], tuple[list[Any], Any]] = WeakKeyDictionary()


def score_term(function: ScoreFunction) -> PythonScore:
    """`score_mod`, of a function that a call is given."""
    return _term(PythonScore, function)


def mask_term(function: MaskFunction) -> PythonMask:
    """`mask_mod`, of a function that a call is given."""
    return _term(PythonMask, function)


def _define(printed: Printed) -> str:
    """The name of a term's functions, entered for the kernels."""
    generated = importlib.import_module(own_name("fastattn.kernels.attention.generated"))
    return generated.define_source(printed.source, printed.loads_tiles, printed.learned)


@run_while_tracing
def _term(kind: Any, function: Callable[..., Any]) -> Any:
    if not callable(function):
        raise TypeError(f"a function is wanted, got {function!r}")
    captured = list(captured_values(function))
    captured += [x.requires_grad for x in captured if isinstance(x, torch.Tensor)]
    try:
        known, term = _made.get(function, ([], None))
    except TypeError:  # What has no weak references is traced each time.
        return kind(function)
    if type(term) is not kind or not _are_same(captured, known):
        term = kind(function)
        _made[function] = captured, term
    return term


def _are_same(captured: list[Any], known: list[Any]) -> bool:
    return len(captured) == len(known) and all(map(_is_same, captured, known))


def _is_same(one: Any, other: Any) -> bool:
    """Whether both are one tensor, or equal. An object may have changed, so it never is."""
    if isinstance(one, torch.Tensor):
        return one is other
    plain = (bool, int, float, str, torch.dtype, torch.device, type(None))
    return type(one) is type(other) and isinstance(one, plain) and one == other


def _print(kind: type, function: Callable[..., Any]) -> Printed:
    """What a function is to the kernels."""
    try:
        if issubclass(kind, MaskTerm):
            return print_mask(trace_mask(function))
        return print_score(trace_score(function))
    except Exception as error:  # Of a user's function it may be anything.
        name = getattr(function, "__qualname__", repr(function))
        code = getattr(function, "__code__", None)
        place = f" ({code.co_filename}:{code.co_firstlineno})" if code else ""
        reason = str(error).strip().partition("\n")[0]
        raise TypeError(
            f"attention: {name}{place} cannot be compiled into the kernels: {reason}. It is called "
            "once, with tensors of no dimension: choose by torch.where, join conditions by & and "
            "|, and index captured tensors by all their dimensions"
        ) from error
