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
import cProfile
import gc
import pstats
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..environment import describe
from ..output import print_table, write
from ..registry import OPS
from .calls import RMS_NORM, Timed, contenders, launching_nothing, references


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
            **{name: machine[name] for name in ("device", "versions", "commit", "when")},
            "costs": [asdict(cost) for cost in costs],
        }
        write(options.json, document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
