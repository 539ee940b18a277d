"""Set what is predicted beside what `python -m bench` has measured, for every case of its file.

The ratios' spread is the model's error on that GPU. Of what is measured only our kernels' rows are
taken; where an op leaves its products to cuBLAS, those of its kernels alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastattn.kernels.config import Target
from fastattn.machine.driver import TARGETS

from ...contenders import OURS
from ...op import BACKWARD, FORWARD, Op
from ...output import print_table, write
from ...registry import OPS
from ..measure import Row, Task
from ..parallel import run_all
from .hardware import HARDWARE
from .totals import total_all

KERNELS = "kernel"
"""The contender that is our kernels where an op would leave its products to cuBLAS."""

SUSPICIOUS = (0.75, 1.1)
"""Measured over predicted: outside of this a kernel is looked at first."""


@dataclass(frozen=True)
class Pair:
    """One direction of a case: what was measured, and the low and high of what is predicted."""

    op: str
    shape: tuple[int, ...]
    dtype: str
    direction: str
    unit: str
    measured: float
    predicted: tuple[float, float]

    @property
    def ratio(self) -> float:
        """Measured over the middle of what is predicted."""
        return self.measured / (sum(self.predicted) / 2)


def predict_bandwidth(
    op: Op, shape: tuple[int, ...], dtype: Any, direction: str, rows: Iterable[Row], target: str
) -> tuple[float, float]:
    """GB/s by the least bytes: memory's peak, or what the slowest kernel's instructions allow."""
    hardware, known = HARDWARE[target], TARGETS[target]
    device = Target("cuda", int(target[3:]), 32, known.multiprocessors, known.shared_memory)
    traffic = op.timing.traffic(shape, dtype, device)[direction]
    speeds = [
        row.cost.main_loop.terabytes for row in rows if row.cost and row.cost.main_loop.terabytes
    ]
    share = traffic.least / traffic.moved
    low, high = (
        1e3 * share * min([hardware.memory_terabytes, *(speed[end] for speed in speeds)])
        for end in (0, 1)
    )
    return low, high


def pair_up(measured: Sequence[Mapping[str, Any]], rows: Sequence[Row], target: str) -> list[Pair]:
    """Every measured row of our kernels with its prediction."""
    import torch

    ops = {op.name: op for op in OPS}
    totals = {(total.op, tuple(total.shape), total.phase): total for total in total_all(rows)}
    pairs = []
    for row in measured:
        op, shape, direction = ops[row["op"]], tuple(row["shape"]), row["direction"]
        own = [r for r in rows if (r.op, tuple(r.shape), r.phase) == (op.name, shape, direction)]
        case = (op.name, shape, row["dtype"], direction)
        if (total := totals.get((op.name, shape, direction))) is not None:
            pairs.append(Pair(*case, "TFLOP/s", row["teraflops_per_second"], total.teraflops))
        elif own and not any(r.dots for r in own):
            dtype = getattr(torch, row["dtype"])
            predicted = predict_bandwidth(op, shape, dtype, direction, own, target)
            pairs.append(Pair(*case, "GB/s", row["gigabytes_per_second"], predicted))
    return pairs


def ours(document: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The rows of a result file that our kernels made, in an op's first dtype."""
    ops = {op.name: op for op in OPS}

    def contender(name: str) -> str:
        return KERNELS if KERNELS in ops[name].timing.rivals else OURS

    return [
        row
        for row in document["results"]
        if row["direction"] in (FORWARD, BACKWARD)
        and row["contender"] == contender(row["op"])
        and row["dtype"] == str(ops[row["op"]].dtypes[0]).removeprefix("torch.")
    ]


def main() -> int:
    parser = argparse.ArgumentParser("python -m bench.compiled.cost", description=__doc__)
    parser.add_argument("measured", type=Path, help="the result file of python -m bench")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="the pairs")
    parser.add_argument("--target", choices=HARDWARE, help="instead of the GPU that the file is of")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time")
    options = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)
    document = json.loads(options.measured.read_text())
    capability = document["device"].get("capability", "none")
    target = options.target or "sm_" + capability.replace(".", "")
    if target not in HARDWARE:
        print(f"no model of {target}: there are {', '.join(HARDWARE)}")
        return 0
    measured = ours(document)
    shapes: dict[tuple[str, str], dict[tuple[int, ...], None]] = {}
    for row in measured:
        shapes.setdefault((row["op"], row["dtype"]), {})[tuple(row["shape"])] = None
    tasks = [
        Task("bench.registry", op, target, dtype, tuple(found), cost=True)
        for (op, dtype), found in shapes.items()
    ]
    outcomes = [outcome for _, outcome in run_all(tasks, options.jobs, 600)]
    rows = [row for outcome in outcomes for row in outcome.rows]
    failures = [failure for outcome in outcomes for failure in outcome.failures]
    pairs = pair_up(measured, rows, target)
    print_pairs(pairs, target, document["device"]["name"])
    for failure in failures:
        print(f"not predicted: {failure.op} {failure.shape}: {failure.reason}")
    if options.out:
        write(
            options.out,
            {
                "device": document["device"],
                "hardware": asdict(HARDWARE[target]),
                "pairs": [asdict(pair) | {"ratio": pair.ratio} for pair in pairs],
                "failures": [asdict(failure) for failure in failures],
            },
        )
    return 0 if pairs else 1


def print_pairs(pairs: Sequence[Pair], target: str, device: str) -> None:
    """Print measured beside predicted, and how far the ratios lie apart."""
    low, high = SUSPICIOUS
    print_table(
        f"measured on {device} beside predicted for {target} ({HARDWARE[target].card})",
        ("op", "shape", "direction", "unit", "measured", "predicted", "measured / predicted", ""),
        [
            (
                pair.op,
                "x".join(map(str, pair.shape)),
                pair.direction,
                pair.unit,
                f"{pair.measured:.4g}",
                "-".join(f"{end:.4g}" for end in pair.predicted),
                f"{pair.ratio:.2f}",
                "" if low <= pair.ratio <= high else "look here",
            )
            for pair in pairs
        ],
    )
    if pairs:
        ratios = sorted(pair.ratio for pair in pairs)
        print(
            f"{len(ratios)} ratios from {ratios[0]:.2f} to {ratios[-1]:.2f}, "
            f"median {statistics.median(ratios):.2f}"
        )


if __name__ == "__main__":
    sys.exit(main())
