"""Microseconds that a call costs on the host before its kernels are launched.

Every op runs as on an H100, on small CPU tensors, with a launch that does nothing: validation,
dispatch, autograd, allocation and Triton's own binding of the arguments are all in the number. What
is not in it is the launch itself and what PyTorch's allocator and streams cost on a GPU. Beside
each op stands the same by PyTorch on those CPU tensors, which includes the little arithmetic.

A backward pass goes through several calls, as in a model: entering and leaving PyTorch's engine,
which happens once a step, takes longer than most ops. Each call has tensors of its own and, where
their shapes allow it, takes what the call before it gave: calls beside each other, whose outputs
are all roots of the backward pass, cost the engine half as much again.

Compare numbers of one Python: built without its optimisations, as some tools build it from source,
it takes a quarter longer for ours, but not for F.rms_norm, which hardly is Python.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import datetime
import functools
import gc
import json
import os
import pstats
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Read when kernels are decorated; the interpreter would launch them for real.
os.environ.pop("TRITON_INTERPRET", None)

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from bench.compiled.report import print_table
from bench.compiled.stub_driver import TARGETS, stub_driver
from bench.environment import describe
from bench.op import Op
from bench.registry import OPS
from fastattn.ops.core.backends import assume_gpu, backend

CALLS = 8
"""How many calls one backward pass goes over."""


@dataclass(frozen=True)
class Timed:
    """What is timed, and how many calls of the op are in it."""

    run: Callable[[], Any]
    calls: int = 1


@dataclass(frozen=True)
class Cost:
    """What one call costs.

    Attributes:
        microseconds: The median of the repeats.
        spread: Their interquartile range.
        scaled: The median of their ratios to F.rms_norm's in the same turn, in microseconds of a
            machine on which that takes SCALE of them.
    """

    op: str
    who: str
    mode: str
    microseconds: float
    spread: float
    scaled: float


SCALE = 14.0
"""Microseconds of F.rms_norm on a machine that the costs are scaled to."""


@triton.jit
def nothing_kernel(x_ptr, y_ptr, rows, BLOCK: tl.constexpr):
    pass


class Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *dy: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(dy[0])


@contextlib.contextmanager
def launching_nothing() -> Iterator[None]:
    """Run Triton's kernels on CPU tensors, without their launch."""
    with stub_driver(TARGETS["sm_90"]), assume_gpu(), backend("triton"):
        yield


def modes(call: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Timed]:
    """The ways in which a call is timed."""

    def forward() -> Any:
        return call(**arguments)

    def no_grad() -> Any:
        with torch.no_grad():
            return call(**arguments)

    return {
        "no_grad": Timed(no_grad),
        "forward": Timed(forward),
        "forward+backward": Timed(with_backward(call, arguments), CALLS),
    }


def with_backward(call: Callable[..., Any], arguments: dict[str, Any]) -> Callable[[], Any]:
    """Several calls, one after another, and one backward pass through all of them."""
    own = [{name: _own(value) for name, value in arguments.items()} for _ in range(CALLS)]
    calls = [functools.partial(call, **given) for given in own]
    outputs = _outputs(calls[0]())
    fed = _fed(outputs, arguments)
    gradients = [torch.empty_like(output) for output in outputs] * (1 if fed else CALLS)
    leaves = [
        value
        for place, given in enumerate(own)
        for name, value in given.items()
        if _wants_gradient(value) and not (place and name in fed)
    ]

    def chained() -> Any:
        outputs = _outputs(calls[0]())
        for following in calls[1:]:
            outputs = _outputs(following(**dict(zip(fed, outputs, strict=False))))
        return torch.autograd.grad(outputs, leaves, gradients)

    def side_by_side() -> Any:
        outputs = [output for call in calls for output in _outputs(call())]
        return torch.autograd.grad(outputs, leaves, gradients)

    return chained if fed else side_by_side


def _own(value: Any) -> Any:
    return value.detach().clone().requires_grad_() if _wants_gradient(value) else value


def _wants_gradient(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def _fed(outputs: Sequence[torch.Tensor], arguments: dict[str, Any]) -> list[str]:
    """The arguments, from the first that wants a gradient on, whose place the outputs can take."""
    fed = []
    wanting = [(name, value) for name, value in arguments.items() if _wants_gradient(value)]
    for output, (name, value) in zip(outputs, wanting, strict=False):
        if output.shape != value.shape or output.dtype is not value.dtype:
            break
        fed.append(name)
    return fed


def _outputs(result: Any) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def contenders(op: Op) -> dict[tuple[str, str], Timed]:
    """Everything that is timed for an op, by (who, mode), beside what tells the machine's speed."""
    dtype = torch.float32 if torch.float32 in op.dtypes else op.dtypes[0]
    arguments = op.sample(op.small).make(dtype, "cpu")
    found = {("fastattn", mode): call for mode, call in modes(op.call, arguments).items()}
    if op.torch is not None:
        found |= {("torch", mode): call for mode, call in modes(op.torch, arguments).items()}
    return found | {RMS_NORM: references()[RMS_NORM]}


RMS_NORM = ("F.rms_norm", "forward")
"""Timed in turns with each op, for a shared machine is fast now and slow then."""


def references() -> dict[tuple[str, str], Timed]:
    """What tells how fast this machine is, and what the pieces that no op can do without cost."""
    x, weight = torch.randn(8, 256, requires_grad=True), torch.randn(256, requires_grad=True)
    block: Any = 16

    def nothing(x: torch.Tensor) -> torch.Tensor:
        return Nothing.apply(x)

    return {
        RMS_NORM: Timed(lambda: F.rms_norm(x, (256,), weight)),
        ("an autograd.Function", "forward"): Timed(lambda: nothing(x)),
        ("an autograd.Function", "forward+backward"): Timed(
            with_backward(nothing, {"x": x}), CALLS
        ),
        ("a Triton launch", "forward"): Timed(
            lambda: nothing_kernel[(1,)](x_ptr=x, y_ptr=weight, rows=8, BLOCK=block)
        ),
        ("torch.empty_like", "forward"): Timed(lambda: torch.empty_like(x)),
    }


def measure(
    name: str, calls: dict[tuple[str, str], Timed], repeats: int, seconds: float
) -> list[Cost]:
    """Time the calls in turns, so that a drift of the machine meets all of them alike."""
    number = {key: _number(call, seconds) for key, call in calls.items()}
    times: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    gc.collect()
    gc.disable()
    try:
        for _ in range(repeats):
            for key, call in calls.items():
                times[key].append(1e6 * _time(call, number[key]) / number[key] / call.calls)
    finally:
        gc.enable()
    costs = []
    for (who, mode), measured in times.items():
        low, middle, high = statistics.quantiles(measured, n=4)
        ratios = [cost / unit for cost, unit in zip(measured, times[RMS_NORM], strict=True)]
        scaled = SCALE * statistics.median(ratios)
        costs.append(Cost(name, who, mode, middle, high - low, scaled))
    return costs


def _number(call: Timed, seconds: float) -> int:
    """How many calls take about so many seconds, after the first calls have warmed everything."""
    _time(call, 20)
    return max(1, int(seconds * 20 / _time(call, 20)))


def _time(call: Timed, number: int) -> float:
    run = call.run
    start = time.perf_counter()
    for _ in range(number):
        run()
    return time.perf_counter() - start


def profile(name: str, calls: dict[tuple[str, str], Timed], lines: int) -> None:
    """Print where an op's time goes: microseconds a call of each function, without its callees."""
    number = 5000
    for (who, mode), call in calls.items():
        if who != "fastattn" or mode == "no_grad":
            continue
        profiler = cProfile.Profile()
        _time(call, 100)
        profiler.enable()
        _time(call, number)
        profiler.disable()
        stats: dict[tuple[str, int, str], Any] = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
        functions = sorted(stats.items(), key=lambda item: -item[1][2])[:lines]
        print_table(
            f"{name} {mode}, under the profiler",
            ("own us", "with callees us", "calls", "function"),
            [
                (
                    f"{1e6 * own / number / call.calls:.2f}",
                    f"{1e6 * total / number / call.calls:.2f}",
                    f"{count / number / call.calls:g}",
                    f"{Path(file).parent.name}/{Path(file).name}:{line} {function}",
                )
                for (file, line, function), (_, count, own, total, _) in functions
            ],
        )


def print_costs(costs: Sequence[Cost]) -> None:
    columns = ("no_grad", "forward", "forward+backward")
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for cost in costs:
        cell = f"{cost.microseconds:.1f} ±{cost.spread / 2:.1f} ({cost.scaled:.1f})"
        lines.setdefault((cost.op, cost.who), {})[cost.mode] = cell
    print_table(
        "microseconds a call on the host, median ± half the interquartile range "
        f"(where F.rms_norm takes {SCALE:g})",
        ("op", "who", *columns),
        [(*key, *(cells.get(column, "") for column in columns)) for key, cells in lines.items()],
    )


def main() -> int:
    names = [op.name for op in OPS]
    parser = argparse.ArgumentParser("python -m bench.host_cost", description=__doc__)
    parser.add_argument("--op", nargs="+", choices=names, default=names, help="only these ops")
    parser.add_argument("--repeats", type=int, default=25, help="how often each call is timed")
    parser.add_argument("--seconds", type=float, default=0.02, help="how long each time")
    parser.add_argument("--profile", action="store_true", help="print where the time goes")
    parser.add_argument("--lines", type=int, default=20, help="lines of each profile")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    options = parser.parse_args()

    torch.set_num_threads(1)
    costs: list[Cost] = []
    with launching_nothing():
        costs += measure("this machine", references(), options.repeats, options.seconds)
        for op in OPS:
            if op.name not in options.op:
                continue
            calls = contenders(op)
            if options.profile:
                profile(op.name, calls, options.lines)
            else:
                costs += measure(op.name, calls, options.repeats, options.seconds)
    print_costs(costs)
    if options.json:
        machine = describe(torch.device("cpu"))
        document = {
            "kernels": "compiled for sm_90, not launched",
            **{name: machine[name] for name in ("device", "versions", "commit")},
            "when": datetime.datetime.now(datetime.timezone.utc).isoformat("T", "seconds"),
            "costs": [asdict(cost) for cost in costs],
        }
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
