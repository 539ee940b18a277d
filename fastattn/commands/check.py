"""`python -m fastattn check`: hold every op against float64 on this machine."""

import argparse
import contextlib
import importlib.util
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..checking import Comparison, check_sample
from ..interpreter import round_to_bfloat16
from ..ops.core.backends import HAS_TRITON, INTERPRETED, assume_gpu, device_obstacle
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
    """The worst comparison of one op in one dtype on one device.

    Attributes:
        faults: What was wrong with the way there, when compiled kernels are executed here.
    """

    op: str
    dtype: torch.dtype
    device: str
    sample: str
    worst: Comparison
    comparisons: int
    faults: tuple[str, ...] = ()


def main(arguments: list[str]) -> int:
    """Compare every op's outputs and gradients with float64; exit code 1 if any fails.

    On a GPU the compiled kernels are checked. On a CPU it is the same kernels in Triton's
    interpreter, in a process of their own, or, with --compiled, the machine code that a GPU would
    get (its PTX), executed here, every access to memory checked.
    """
    parser = argparse.ArgumentParser(prog="python -m fastattn check", description=main.__doc__)
    parser.add_argument("--quick", action="store_true", help="two dtypes, small samples")
    parser.add_argument("--op", action="append", metavar="NAME", help="only this op (repeatable)")
    parser.add_argument(
        "--dtype",
        action="append",
        choices=DTYPE_NAMES.values(),
        help="only this dtype (repeatable)",
    )
    parser.add_argument(
        "--samples", type=int, metavar="N", help="only the first N samples of each op"
    )
    parser.add_argument(
        "--compiled", metavar="TARGET", help="execute what is compiled for sm_80, sm_90, ..."
    )
    parser.add_argument(
        "--variation",
        type=int,
        metavar="SEED",
        help="with --compiled: round as another GPU might",
    )
    parser.add_argument(
        "--schedule",
        metavar="POLICY[:SEED]",
        help="with --compiled: in which order warps run that go their own ways",
    )
    options = parser.parse_args(arguments)
    unknown = set(options.op or ()) - set(OPERATIONS)
    if unknown:
        parser.error(f"unknown op {', '.join(sorted(unknown))}; there are {', '.join(OPERATIONS)}")
    if not HAS_TRITON:
        print("check: triton is not installed, so there are no kernels to check", file=sys.stderr)
        return 2

    if options.compiled:
        return _check_compiled(options)
    device = _device()
    if device is None:
        command = [sys.executable, "-m", "fastattn", "check", *arguments]
        return subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}).returncode
    round_to_bfloat16()
    print(f"kernels {'in the interpreter' if INTERPRETED else 'compiled'}, on {_describe(device)}")
    return _print_rows(rows(device, options))


def _check_compiled(options: argparse.Namespace) -> int:
    """Check kernels as compiled for a target, executed on this machine."""
    if INTERPRETED or importlib.util.find_spec("numpy") is None:
        obstacle = "TRITON_INTERPRET is set" if INTERPRETED else "numpy is not installed"
        print(f"check: no compiled kernels can be executed here: {obstacle}", file=sys.stderr)
        return 2
    from ..machine.execution import MACHINE_TARGETS, execute
    from ..machine.schedule import Schedule
    from ..machine.variation import Variation

    if options.compiled not in MACHINE_TARGETS:
        targets = ", ".join(MACHINE_TARGETS)
        print(f"check: --compiled takes one of {targets}", file=sys.stderr)
        return 2
    variation = None if options.variation is None else Variation(options.variation)
    try:
        schedule = Schedule.parse(options.schedule or "random")
    except ValueError as error:
        print(f"check: --schedule: {error}", file=sys.stderr)
        return 2
    with contextlib.ExitStack() as stack:
        execution = stack.enter_context(execute(options.compiled, variation, schedule))
        stack.enter_context(assume_gpu())
        print(f"kernels compiled for {options.compiled}, executed on this machine")
        failed = _print_rows(rows("cpu", options, execution))
        launches, seconds = execution.launches.total(), sum(execution.seconds.values())
        print(f"{launches} launches of {len(execution.launches)} kernels took {seconds:.0f} s")
    return failed


def _print_rows(found: Iterator[Row]) -> int:
    """Print the table, and return 1 if anything in it fails."""
    print("error: largest distance from float64, relative, beside what the accuracy rule allows\n")
    print(f"{'op':<22}{'dtype':<10}{'tensors':>8}{'error':>10}{'allowed':>10}  worst at")
    failed = 0
    for row in found:
        worst = row.worst
        failed += bool(not worst.passed or row.faults)
        print(
            f"{row.op:<22}{DTYPE_NAMES[row.dtype]:<10}{row.comparisons:>8}"
            f"{worst.error:>10.1e}{worst.allowed:>10.1e}  "
            f"{'' if worst.passed else 'FAILED '}{worst.name} of {row.sample}"
            f"{worst.note and f' ({worst.note})'}",
            flush=True,
        )
        for fault in row.faults:
            print(f"    FAULT {fault}", flush=True)
    print(f"\n{failed} failed" if failed else "\nall passed")
    return 1 if failed else 0


def rows(device: str, options: argparse.Namespace, execution: Any = None) -> Iterator[Row]:
    """Check each op in each of its dtypes on all its samples."""
    for name in options.op or OPERATIONS:
        operation = OPERATIONS[name]
        for dtype in _dtypes(operation, options):
            found, faults = [], []
            for sample in operation.samples[: options.samples]:
                if options.quick and _elements(sample) > QUICK_ELEMENTS:
                    continue
                comparisons, new_faults = _check_one(operation, sample, dtype, device, execution)
                found += [(sample.name, comparison) for comparison in comparisons]
                faults += [f"{sample.name}: {fault}" for fault in new_faults]
            sample_name, worst = max(found, key=lambda item: _strain(item[1]))
            yield Row(name, dtype, device, sample_name, worst, len(found), tuple(faults))


def _check_one(
    operation: Operation, sample: Sample, dtype: torch.dtype, device: str, execution: Any
) -> tuple[list[Comparison], list[str]]:
    """The comparisons of one sample, and the faults that executing compiled kernels showed."""
    if execution is None:
        return check_sample(operation, sample, dtype, device), []
    from ..machine.parser import PtxError

    execution.reports.clear()
    try:
        comparisons = check_sample(operation, sample, dtype, device)
    except PtxError as error:
        return [Comparison("everything", math.inf, 0.0)], [str(error)]
    return comparisons, list(execution.reports)


def _elements(sample: Sample) -> int:
    return sum(
        math.prod(value.shape) for value in sample.arguments.values() if isinstance(value, Normal)
    )


def _dtypes(operation: Operation, options: argparse.Namespace) -> list[torch.dtype]:
    if options.quick:
        return [torch.float32, torch.bfloat16]
    asked = options.dtype or DTYPE_NAMES.values()
    # Compiled kernels have float32 scalars and no float64.
    return [
        dtype
        for dtype in operation.dtypes
        if DTYPE_NAMES[dtype] in asked and (INTERPRETED or dtype is not torch.float64)
    ]


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
