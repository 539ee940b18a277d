"""Calls with integers that are too large or too small, found in the samples of all ops.

Every argument of a sample that is an integer, a list of them or a tensor of them is replaced by
extremes, one place after another. `EQUIVALENT` says what an argument then means: the ordinary value
of the same meaning, or that it has none. Of an argument that is not named there both backends must
say the same.

As a program it runs the cases from the number given on, and prints one line before and one after
each: integers may crash it, or keep it forever, and tests/ops/test_integers.py then knows by which.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from quick_interpreter import quicken_interpreter

import fastattn
import fastattn.nn as nn
from fastattn import BlockMask, RelativeBias
from support import OPERATIONS, WIDEST, Sample, gradients_of, outputs_of, size_of

EXTREMES = (
    *(-(2**63), -(2**40), -(2**31), -1, 0),
    *(2**31 - 7, 2**31 - 1, 2**31, 2**40, sys.maxsize - 7, sys.maxsize),
)

INTEGERS = (torch.int32, torch.int64)

MEANINGLESS = object()
"""The meaning of a value that has none: an error that names the argument must come, or NaN."""


def clamped_window(value: Any, arguments: dict[str, Any]) -> Any:
    """Farther than all keys is as far as all keys."""
    sides = value if isinstance(value, list) else [value]
    if min(side for side in sides if side is not None) < 0:
        return MEANINGLESS
    tame = [None if side is None else min(side, 10**4) for side in sides]
    return tame if isinstance(value, list) else tame[0]


def clamped_lengths(value: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
    """Less than no keys is none, more than all is all."""
    return value.clamp(0, arguments["k"].shape[2])


def numbered(value: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
    """Documents by small numbers."""
    return torch.unique(value, return_inverse=True)[1]


def as_long_as_it_is(name: str) -> Callable[[int, dict[str, Any]], Any]:
    """As long as the longest sequence, or longer, which means the same."""

    def longest(value: int, arguments: dict[str, Any]) -> Any:
        length = int(arguments[f"cu_seqlens_{name}"].diff().max())
        return length if value >= length else MEANINGLESS

    return longest


def rising(value: torch.Tensor, arguments: dict[str, Any]) -> Any:
    """Boundaries rise from 0. Behind the last row there is nothing to turn."""
    steps = value.tolist()
    return value if steps[0] == 0 and sorted(steps) == steps else MEANINGLESS


def rising_to(name: str) -> Callable[[torch.Tensor, dict[str, Any]], Any]:
    """The same where there must be a row for all."""

    def boundaries(value: torch.Tensor, arguments: dict[str, Any]) -> Any:
        inside = value[-1].item() <= arguments[name].shape[0]
        return rising(value, arguments) if inside else MEANINGLESS

    return boundaries


def in_a_table(value: Any, arguments: dict[str, Any]) -> Any:
    """A position without a row gives NaN; -1 has none."""
    rows = arguments["cos"].shape[-2]
    if isinstance(value, torch.Tensor):
        return value.where((value >= 0) & (value < rows), -1)
    packed = arguments.get("cu_seqlens") is not None
    return value if 0 <= value < rows else rows if packed and value >= 0 else MEANINGLESS


def no_class(value: torch.Tensor, arguments: dict[str, Any]) -> Any:
    """A target that is neither a class nor ignored is an error, or a loss of NaN."""
    x = arguments.get("logits")
    classes = x.shape[-1] if x is not None else arguments["weight"].shape[0]
    ignored = value == arguments.get("ignore_index", -100)
    return value if (ignored | (value >= 0) & (value < classes)).all() else MEANINGLESS


def nobody_ignored(value: int, arguments: dict[str, Any]) -> Any:
    """An index that no target has ignores none, if all targets are classes then."""
    target = no_class(arguments["target"], {**arguments, "ignore_index": value})
    found = (arguments["target"] == value).any()
    return MEANINGLESS if target is MEANINGLESS else value if found else -100


def positive(value: int, arguments: dict[str, Any]) -> Any:
    """Whatever is positive."""
    return 10**4 if value > 0 else MEANINGLESS


def no_expert(value: torch.Tensor, arguments: dict[str, Any]) -> Any:
    """The number of experts itself is nobody's, and all beyond is an error."""
    experts = arguments["w_down"].shape[0]
    return value if ((value >= 0) & (value <= experts)).all() else MEANINGLESS


EQUIVALENT: dict[str, Callable[[Any, dict[str, Any]], Any]] = {
    "window": clamped_window,
    "kv_lengths": clamped_lengths,
    "document_ids": numbered,
    "max_seqlen_q": as_long_as_it_is("q"),
    "max_seqlen_k": as_long_as_it_is("k"),
    "cu_seqlens_q": rising_to("q"),
    "cu_seqlens_k": rising_to("k"),
    "cu_seqlens": rising,
    "offsets": rising_to("x"),
    "ids": no_expert,
    "positions": in_a_table,
    "target": no_class,
    "ignore_index": nobody_ignored,
    "chunk_rows": positive,
}


@dataclass(frozen=True)
class Case:
    """A call with an extreme, and the same with an ordinary value: None where there is none."""

    group: str
    what: str
    argument: str
    call: Callable[[], list[torch.Tensor]]
    ordinary: Callable[[], list[torch.Tensor]] | None
    backend: str

    def __str__(self) -> str:
        return f"{self.group}: {self.what}, {self.backend}"


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def replaced(value: Any) -> Iterator[tuple[str, Any]]:
    """What an argument may be instead, and how to say it."""
    if is_integer(value):
        yield from ((str(extreme), extreme) for extreme in EXTREMES)
    elif isinstance(value, list):
        for place, item in enumerate(value):
            for extreme in EXTREMES if is_integer(item) else ():
                changed = [*value[:place], extreme, *value[place + 1 :]]
                yield str(changed), changed
    elif isinstance(value, torch.Tensor) and value.dtype in INTEGERS and value.numel() > 0:
        limits = torch.iinfo(value.dtype)
        for extreme in (x for x in EXTREMES if limits.min <= x <= limits.max):
            for place in sorted({0, value.numel() // 2, value.numel() - 1}):
                changed = value.clone(memory_format=torch.contiguous_format)
                changed.view(-1)[place] = extreme
                yield f"{extreme} at {place}", changed


def results(function: Callable, arguments: dict[str, Any]) -> list[torch.Tensor]:
    """Outputs and gradients."""
    gradients = gradients_of(function, arguments)
    return [*outputs_of(function, arguments), *gradients.values()]


def cases_of(sample: Sample, operation: Any, argument: str) -> Iterator[Case]:
    """The calls of a sample with its one argument replaced."""

    def bind(value: Any, backend: str, function: Callable) -> Callable[[], list[torch.Tensor]]:
        def call() -> list[torch.Tensor]:
            arguments = {**sample.make(WIDEST, "cpu"), argument: value}
            with fastattn.backend(backend):
                return results(function, arguments)

        return call

    arguments = sample.make(WIDEST, "cpu")
    equivalent = EQUIVALENT.get(argument, lambda value, _: value)
    for what, value in replaced(arguments[argument]):
        tame = equivalent(value, arguments)
        ordinary = functools.cache(bind(tame, "reference", operation.reference))
        for backend in ("triton", "reference"):
            yield Case(
                f"{operation.name} {argument}",
                what,
                argument.removeprefix("dropout_"),
                bind(value, backend, operation.function),
                None if tame is MEANINGLESS else ordinary,
                backend,
            )


def of_ops() -> Iterator[Case]:
    """The smallest sample of an op that has an argument, and of each of its types."""
    for operation in OPERATIONS.values():
        seen: set[tuple[str, type]] = set()
        for sample in sorted(filter(size_of, operation.samples), key=size_of):
            for argument, value in sample.make(WIDEST, "cpu").items():
                if next(replaced(value), None) and (argument, type(value)) not in seen:
                    seen.add((argument, type(value)))
                    yield from cases_of(sample, operation, argument)


def attended(**options: Any) -> list[torch.Tensor]:
    x = torch.linspace(-1.0, 1.0, 2 * 20 * 8, dtype=WIDEST).view(1, 2, 20, 8)
    return [fastattn.attention(x, x, x, **options)]


def positioned(module: Callable[[], Any], value: Any) -> list[torch.Tensor]:
    x = torch.ones(2, 3, 8)
    return [module()(x, positions=value)]


def turned(value: Any, **options: Any) -> list[torch.Tensor]:
    x = torch.ones(1, 2, 3, 8)
    return list(nn.RotaryEmbedding(8, 16)(x, x, value, **options))


def tensor(value: int) -> torch.Tensor:
    return torch.tensor([1, value, 2])


TABLE = torch.ones(8, 2)
EVERY = torch.ones(2, 2, dtype=torch.bool)

MADE: dict[str, tuple[str, Callable[[int], list[torch.Tensor]], Callable[[int], Any]]] = {
    "RelativeBias": (
        "max_distance",
        lambda value: attended(relative_bias=RelativeBias(TABLE, max_distance=value)),
        lambda value: MEANINGLESS,
    ),
    "BlockMask": (
        "block_size",
        lambda value: attended(block_mask=BlockMask(EVERY, value)),
        lambda value: MEANINGLESS,
    ),
    "BlockMask of queries": (
        "block_size",
        lambda value: attended(block_mask=BlockMask(EVERY, (value, 16))),
        lambda value: MEANINGLESS,
    ),
    "SinusoidalPositions from one on": (
        "positions",
        lambda value: positioned(lambda: nn.SinusoidalPositions(8, 16), value),
        lambda value: value if value == 0 else MEANINGLESS,
    ),
    "SinusoidalPositions": (
        "positions",
        lambda value: positioned(lambda: nn.SinusoidalPositions(8, 16), tensor(value)),
        lambda value: value if value == 0 else MEANINGLESS,
    ),
    "LearnedPositions from one on": (
        "positions",
        lambda value: positioned(lambda: nn.LearnedPositions(16, 8), value),
        lambda value: value if value == 0 else MEANINGLESS,
    ),
    "LearnedPositions": (
        "positions",
        lambda value: positioned(lambda: nn.LearnedPositions(16, 8), tensor(value)),
        lambda value: value if value == 0 else MEANINGLESS,
    ),
    "RotaryEmbedding from one on": (
        "positions",
        turned,
        lambda value: value if value == 0 else MEANINGLESS,
    ),
    "RotaryEmbedding": (
        "positions",
        lambda value: turned(tensor(value)),
        lambda value: value if value == 0 else -1,
    ),
    "RotaryEmbedding of a length": (
        "length",
        lambda value: turned(tensor(0), length=value),
        lambda value: 16 if value <= 16 else MEANINGLESS,
    ),
}
"""What else takes integers: the name of the argument, the call, and the ordinary value."""


def of_what_is_made() -> Iterator[Case]:
    """The terms and modules of `MADE`."""

    def bind(call: Callable, value: Any, backend: str) -> Callable[[], list[torch.Tensor]]:
        def bound() -> list[torch.Tensor]:
            torch.manual_seed(0)
            with fastattn.backend(backend):
                return call(value)

        return bound

    for group, (argument, call, equivalent) in MADE.items():
        for value in EXTREMES:
            tame = equivalent(value)
            for backend in ("triton", "reference"):
                ordinary = None if tame is MEANINGLESS else bind(call, tame, "reference")
                extreme = bind(call, value, backend)
                yield Case(group, str(value), argument, extreme, ordinary, backend)


def all_cases() -> list[Case]:
    """In the same order each time."""
    return [*of_ops(), *of_what_is_made()]


def outcome(case: Case) -> str:
    """What is wrong with a case; nothing where all is right."""
    try:
        found = case.call()
    except (ValueError, TypeError, IndexError) as error:
        return "" if case.argument in str(error) else f"{type(error).__name__}: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if case.ordinary is None:
        return "" if any(x.isnan().any() for x in found) else "no error, and no NaN"
    for own, expected in zip(found, case.ordinary(), strict=True):
        if not torch.allclose(own, expected, rtol=1e-9, atol=1e-9, equal_nan=True):
            return f"off by {(own - expected).abs().max().item():.1e}"
    return ""


if __name__ == "__main__":
    quicken_interpreter()
    for number, one in enumerate(all_cases()):
        if number < int(sys.argv[1]):
            continue
        print(json.dumps([number, None]), flush=True)
        print(json.dumps([number, outcome(one)]), flush=True)
