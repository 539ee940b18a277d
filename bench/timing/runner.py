"""Time the contenders of one op at one shape and dtype, in turns within one process.

Every round lets each contender run on every set of inputs, beginning with another one each time, so
that a drift of the machine meets all of them alike.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fastattn.checking import (
    Change,
    Comparison,
    Measured,
    Results,
    compare_results,
    enough_neighbours,
    measure_reference,
)

from ..contenders import Contender, load_contender
from ..inputs import InputSets, count_saved, results_of, seeded, tensors_of
from ..op import BACKWARD, DIRECTIONS, FORWARD, Op, Shape
from .clock import time_calls

# Rows of larger tensors are compared up to this many elements; sums over all rows, all of them.
COMPARED_ELEMENTS = 2**22

LEAST_ROUNDS = 3
WARM_UP_CALLS = 3


@dataclass(frozen=True)
class Effort:
    """How long is measured: until either limit, but never fewer than LEAST_ROUNDS rounds."""

    rounds: int
    seconds: float
    """For one direction of one case, all contenders together."""


@dataclass
class Measurement:
    """What was found out about one contender.

    Attributes:
        seconds: Of every timed call, by direction.
        peak_bytes: Allocated beyond what was there before the call, by direction; on a GPU only.
        saved_bytes: Kept for the backward beyond the arguments; None without a backward.
        errors: The comparison of outputs (forward) and gradients (backward) with float64 that used
            most of its allowance.
    """

    seconds: dict[str, list[float]] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    saved_bytes: int | None = None
    errors: dict[str, Comparison] = field(default_factory=dict)


@dataclass
class Outcome:
    """The measurements of a case by contender, and why others have none."""

    measured: dict[str, Measurement] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


def measure_case(
    op: Op,
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    names: Sequence[str],
    effort: Effort,
) -> Outcome:
    """Measure the named contenders in all directions.

    A contender that cannot be loaded, or fails when first called, has its reason in the outcome and
    takes no part: the others are still worth knowing.
    """
    outcome = Outcome()
    with _quiet_memory(device):
        sets = InputSets(op, shape, dtype, device)
        arguments, incoming = seeded(op, sets.arguments[0]), sets.incoming[0]
        measured: list[Measured] = []
        if op.timing.in_float64(shape):
            measured = _measured(op, arguments, incoming)
        contenders: list[Contender] = []
        for name in names:
            try:
                contender = load_contender(op, name)
                errors = _errors(contender, op, sets, measured)
                peaks, saved = _warm_up(contender, sets), None
                if BACKWARD in contender.directions:
                    saved = count_saved(contender.call, sets.arguments[0])
                measurement = Measurement(peak_bytes=peaks, saved_bytes=saved, errors=errors)
            except ImportError as error:
                outcome.failures[name] = f"not installed: {error}"
            except Exception as error:
                message = " ".join(str(error).split())[:300]
                outcome.failures[name] = f"{type(error).__name__}: {message}"
            else:
                outcome.measured[name] = measurement
                contenders.append(contender)
        del measured
        for direction in DIRECTIONS:
            own = [contender for contender in contenders if direction in contender.directions]
            for name, seconds in _in_turns(own, sets, direction, effort).items():
                outcome.measured[name].seconds[direction] = seconds
    return outcome


def _in_turns(
    contenders: Sequence[Contender], sets: InputSets, direction: str, effort: Effort
) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    started = time.monotonic()
    for turn in range(effort.rounds):
        if turn >= LEAST_ROUNDS and time.monotonic() - started > effort.seconds:
            break
        first = turn % max(1, len(contenders))
        for contender in [*contenders[first:], *contenders[:first]]:
            calls = sets.calls(contender.call, direction)
            seconds[contender.name] += time_calls(calls, sets.device)
    return seconds


def _warm_up(contender: Contender, sets: InputSets) -> dict[str, int]:
    """Compile whatever compiles; the peak of memory of each direction, on a GPU."""
    peaks = {}
    for direction in contender.directions:
        for _ in range(WARM_UP_CALLS):
            call = sets.calls(contender.call, direction)[0]
            if sets.device.type == "cpu":
                call()
                continue
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call()
            peaks[direction] = torch.cuda.max_memory_allocated() - before
    return peaks


def _measured(
    op: Op, arguments: Mapping[str, Any], incoming: Sequence[torch.Tensor]
) -> list[Measured]:
    """The reference's results, as far as they are compared."""

    def run(change: Change) -> Results:
        own = {name: change(value) for name, value in arguments.items()}
        gradients = [gradient.double() if change.wide else gradient for gradient in incoming]
        found = results_of(op.reference, own, gradients)
        return {name: _part(value) for name, value in found.items()}

    elements = max(tensor.numel() for tensor in tensors_of(dict(arguments)))
    return measure_reference(run, enough_neighbours(elements))


def _errors(
    contender: Contender, op: Op, sets: InputSets, measured: Sequence[Measured]
) -> dict[str, Comparison]:
    """The worst comparison of outputs and of gradients, where the numbers can be the same."""
    arguments = sets.arguments[0]
    if not measured:
        return {}
    if contender.same_random_numbers:
        arguments = seeded(op, arguments)
    elif arguments.keys() != seeded(op, arguments).keys():
        return {}
    incoming = sets.incoming[0] if BACKWARD in contender.directions else []
    results = results_of(contender.call, arguments, incoming)
    worst: dict[str, Comparison] = {}
    for found in compare_results({name: _part(x) for name, x in results.items()}, measured):
        direction = BACKWARD if found.name.startswith("d") else FORWARD
        if direction not in worst or _strain(found) > _strain(worst[direction]):
            worst[direction] = found
    return worst


def _strain(comparison: Comparison) -> float:
    return comparison.error / comparison.allowed if comparison.allowed else comparison.error


def _part(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dim() < 2:
        return tensor
    return tensor[: max(1, COMPARED_ELEMENTS // tensor[0].numel())]


@contextlib.contextmanager
def _quiet_memory(device: torch.device) -> Iterator[None]:
    """Keep the collector out of the timed rounds, and start with free memory."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def median_and_spread(seconds: Sequence[float]) -> tuple[float, float]:
    """The median, and half the distance between the quartiles."""
    low, middle, high = statistics.quantiles(seconds, n=4)
    return middle, (high - low) / 2
