"""Time the contenders of one op at one shape and dtype, in turns within one process.

Every round lets each contender run on every set of inputs, beginning with another one each time, so
that a drift of the machine meets all of them alike. The sets together are larger than the L2 cache.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fastattn.checking import GRADIENT_FACTOR, OUTPUT_FACTOR, Comparison, compare_tensors
from fastattn.ops.catalog import Normal

from .clock import time_calls
from .contenders import Contender, load_contender
from .op import BACKWARD, BOTH, DIRECTIONS, FORWARD, Op, Shape

Arguments = dict[str, Any]

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
        errors: The comparison of outputs (forward) and gradients (backward) with float64 that used
            most of its allowance.
    """

    seconds: dict[str, list[float]] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    errors: dict[str, Comparison] = field(default_factory=dict)


@dataclass
class Outcome:
    """The measurements of a case by contender, and why others have none."""

    measured: dict[str, Measurement] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


class InputSets:
    """Several sets of random inputs of an op, with incoming gradients for its outputs."""

    def __init__(self, op: Op, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        self.device = device
        # Enough sets to displace each other from the cache: four times its size.
        cache = 0
        if device.type == "cuda":
            cache = torch.cuda.get_device_properties(device).L2_cache_size
        first = _random_arguments(op, shape, dtype, device)
        size = sum(tensor.nbytes for tensor in _tensors(first))
        count = min(8, max(2, -(-4 * cache // size)))
        self.arguments = [
            first,
            *(_random_arguments(op, shape, dtype, device) for _ in range(count - 1)),
        ]
        with torch.no_grad():
            outputs = _outputs(op.reference, first)
        self.incoming = [[torch.randn_like(output) for output in outputs] for _ in self.arguments]

    def calls(self, contender: Contender, direction: str) -> list[Callable[[], Any]]:
        """A call for each set; for the backward, what it needs of the forward is done here."""
        sets = zip(self.arguments, self.incoming, strict=True)
        return [
            _call(contender.call, arguments, incoming, direction) for arguments, incoming in sets
        ]


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
        truth, yardstick = _truth(op, sets)
        contenders: list[Contender] = []
        for name in names:
            try:
                contender = load_contender(op, name)
                measurement = _warm_up(contender, op, sets, truth, yardstick)
            except ImportError as error:
                outcome.failures[name] = f"not installed: {error}"
            except Exception as error:
                outcome.failures[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            else:
                outcome.measured[name] = measurement
                contenders.append(contender)
        del truth, yardstick
        for direction in DIRECTIONS:
            for name, seconds in _in_turns(contenders, sets, direction, effort).items():
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
            calls = sets.calls(contender, direction)
            seconds[contender.name] += time_calls(calls, sets.device)
    return seconds


def _warm_up(
    contender: Contender,
    op: Op,
    sets: InputSets,
    truth: dict[str, torch.Tensor],
    yardstick: dict[str, torch.Tensor],
) -> Measurement:
    """Compile whatever compiles, and find out errors and memory."""
    measurement = Measurement(errors=_errors(contender, op, sets, truth, yardstick))
    for direction in DIRECTIONS:
        for _ in range(WARM_UP_CALLS):
            call = sets.calls(contender, direction)[0]
            if sets.device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                call()
                measurement.peak_bytes[direction] = torch.cuda.max_memory_allocated() - before
            else:
                call()
    return measurement


def _errors(
    contender: Contender,
    op: Op,
    sets: InputSets,
    truth: dict[str, torch.Tensor],
    yardstick: dict[str, torch.Tensor],
) -> dict[str, Comparison]:
    random = op.benchmark is not None and op.benchmark.random
    if random and not contender.same_random_numbers:
        return {}
    values = _results(contender.call, _seeded(sets.arguments[0], random), sets.incoming[0])
    worst: dict[str, Comparison] = {}
    for name, value in values.items():
        direction, factor = FORWARD, OUTPUT_FACTOR
        if name.startswith("d"):
            direction, factor = BACKWARD, GRADIENT_FACTOR
        found = compare_tensors(
            name, _part(value), _part(yardstick[name]), _part(truth[name]), factor
        )
        if direction not in worst or _strain(found) > _strain(worst[direction]):
            worst[direction] = found
    return worst


def _strain(comparison: Comparison) -> float:
    return comparison.error / comparison.allowed if comparison.allowed else comparison.error


def _truth(op: Op, sets: InputSets) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Results of the reference in float64, and in the tested dtype."""
    random = op.benchmark is not None and op.benchmark.random
    arguments = _seeded(sets.arguments[0], random)
    wide = {name: _widened(value) for name, value in arguments.items()}
    incoming = sets.incoming[0]
    return (
        _results(op.reference, wide, [gradient.double() for gradient in incoming]),
        _results(op.reference, arguments, incoming),
    )


def _results(
    call: Callable[..., Any], arguments: Arguments, incoming: Sequence[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Outputs ("output 0", ...) and gradients ("dx", ...) of a call."""
    outputs = _outputs(call, arguments)
    names = [name for name, value in arguments.items() if _has_gradient(value)]
    gradients = torch.autograd.grad(outputs, _tensors(arguments), incoming)
    results = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    return results | {f"d{name}": g for name, g in zip(names, gradients, strict=True)}


def _call(
    call: Callable[..., Any],
    arguments: Arguments,
    incoming: Sequence[torch.Tensor],
    direction: str,
) -> Callable[[], Any]:
    tensors = _tensors(arguments)
    if direction == FORWARD:
        return lambda: call(**arguments)
    if direction == BOTH:
        return lambda: torch.autograd.grad(_outputs(call, arguments), tensors, incoming)
    outputs = _outputs(call, arguments)
    return lambda: torch.autograd.grad(outputs, tensors, incoming)


def _outputs(call: Callable[..., Any], arguments: Arguments) -> list[torch.Tensor]:
    outputs = call(**arguments)
    return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)


def _random_arguments(op: Op, shape: Shape, dtype: torch.dtype, device: torch.device) -> Arguments:
    """The arguments of a sample, drawn on the device: drawing on the host would take minutes."""
    made: Arguments = {}
    for name, value in op.sample(shape).arguments.items():
        if isinstance(value, Normal):
            numbers = torch.randn(value.shape, dtype=value.dtype or dtype, device=device)
            made[name] = numbers.mul_(value.scale).add_(value.mean).requires_grad_()
        else:
            made[name] = value(device) if callable(value) else value
    return made


def _seeded(arguments: Arguments, random: bool) -> Arguments:
    if not random:
        return arguments
    device = _tensors(arguments)[0].device
    return arguments | {"seed": torch.tensor([2**40 + 3], device=device)}


def _widened(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.detach().double().requires_grad_(value.requires_grad)
    return value


def _tensors(arguments: Arguments) -> list[torch.Tensor]:
    return [value for value in arguments.values() if _has_gradient(value)]


def _has_gradient(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


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
    if len(seconds) < 2:
        return seconds[0], 0.0
    low, middle, high = statistics.quantiles(seconds, n=4)
    return middle, (high - low) / 2
