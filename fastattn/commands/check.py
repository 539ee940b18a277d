"""python -m fastattn check"""

import argparse
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..checking import Comparison, check_sample
from ..interpreter import round_to_bfloat16
from ..ops.core.backends import HAS_TRITON, INTERPRETED, device_obstacle
from ..ops.core.catalog import OPERATIONS, Normal, Operation, Sample

DTYPE_NAMES = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}


QUICK_ELEMENTS = 20_000
"""The largest sample that `--quick` takes: all regimes but the very wide rows."""


@dataclass(frozen=True)
class Row:
    """The worst comparison of one op in one dtype on one device."""

    op: str
    dtype: torch.dtype
    device: str
    sample: str
    worst: Comparison
    comparisons: int


def main(arguments: list[str]) -> int:
    """Compare every op's outputs and gradients with float64; exit code 1 if any fails.

    On a GPU the compiled kernels are checked. On a CPU it is the same kernels in Triton's
    interpreter, in a process of their own.
    """
    parser = argparse.ArgumentParser(prog="python -m fastattn check", description=main.__doc__)
    parser.add_argument("--quick", action="store_true", help="two dtypes, small samples")
    parser.add_argument("--op", action="append", metavar="NAME", help="only this op (repeatable)")
    options = parser.parse_args(arguments)
    unknown = set(options.op or ()) - set(OPERATIONS)
    if unknown:
        parser.error(f"unknown op {', '.join(sorted(unknown))}; there are {', '.join(OPERATIONS)}")
    if not HAS_TRITON:
        print("check: triton is not installed, so there are no kernels to check", file=sys.stderr)
        return 2

    device = _device()
    if device is None:
        command = [sys.executable, "-m", "fastattn", "check", *arguments]
        return subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}).returncode
    round_to_bfloat16()
    print(f"kernels {'in the interpreter' if INTERPRETED else 'compiled'}, on {_describe(device)}")
    print("error: largest distance from float64, relative, beside what the accuracy rule allows\n")
    print(f"{'op':<16}{'dtype':<10}{'tensors':>8}{'error':>10}{'allowed':>10}  worst at")
    failed = 0
    for row in rows(device, options.op or list(OPERATIONS), quick=options.quick):
        worst = row.worst
        failed += not worst.passed
        print(
            f"{row.op:<16}{DTYPE_NAMES[row.dtype]:<10}{row.comparisons:>8}"
            f"{worst.error:>10.1e}{worst.allowed:>10.1e}  "
            f"{'' if worst.passed else 'FAILED '}{worst.name} of {row.sample}"
            f"{worst.note and f' ({worst.note})'}",
            flush=True,
        )
    print(f"\n{failed} failed" if failed else "\nall passed")
    return 1 if failed else 0


def rows(device: str, names: list[str], *, quick: bool) -> Iterator[Row]:
    """Check each op in each of its dtypes on all its samples."""
    for name in names:
        operation = OPERATIONS[name]
        for dtype in _dtypes(operation, quick=quick):
            found = [
                (sample.name, comparison)
                for sample in operation.samples
                if not quick or _elements(sample) <= QUICK_ELEMENTS
                for comparison in check_sample(operation, sample, dtype, device)
            ]
            sample_name, worst = max(found, key=lambda item: _strain(item[1]))
            yield Row(name, dtype, device, sample_name, worst, len(found))


def _elements(sample: Sample) -> int:
    return sum(
        math.prod(value.shape) for value in sample.arguments.values() if isinstance(value, Normal)
    )


def _dtypes(operation: Operation, *, quick: bool) -> list[torch.dtype]:
    if quick:
        return [torch.float32, torch.bfloat16]
    # Compiled kernels have float32 scalars and no float64.
    return [d for d in operation.dtypes if INTERPRETED or d is not torch.float64]


def _strain(comparison: Comparison) -> float:
    """How much of its allowance a comparison uses; more than 1 fails, and so does NaN."""
    if not comparison.passed:
        return float("inf")
    return comparison.error / comparison.allowed if comparison.allowed else 0.0


def _device() -> str | None:
    """Where kernels run in this process."""
    if INTERPRETED:
        return "cpu"
    for index in range(torch.cuda.device_count()):
        if device_obstacle("cuda", index) is None:
            return f"cuda:{index}"
    return None


def _describe(device: str) -> str:
    return "the CPU" if device == "cpu" else torch.cuda.get_device_name(device)
