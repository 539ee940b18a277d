"""Compile every kernel that the ops launch, for GPUs that need not be there, and check the code.

Nothing runs on a GPU. The exit code is 1 if a kernel is over budget or does not compile.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from fastattn.machine.driver import TARGETS

from .budget import problems
from .measure import Failure, Row, Task, load_ops
from .parallel import run_all
from .report import print_comparison, print_rows, print_table, write_json


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m bench.compiled", description=__doc__)
    parser.add_argument("--op", nargs="+", metavar="NAME", help="only these ops")
    parser.add_argument(
        "--target", nargs="+", choices=TARGETS, default=list(TARGETS), help="only these GPUs"
    )
    parser.add_argument("--quick", action="store_true", help="only the shapes that the tests use")
    parser.add_argument("--over", action="store_true", help="print only what is over budget")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    parser.add_argument("--compare", type=Path, metavar="OLD.json", help="print what has changed")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time")
    parser.add_argument(
        "--time-limit", type=float, default=600, help="seconds for one op, dtype and target"
    )
    parser.add_argument(
        "--cases", default="bench.registry", metavar="MODULE", help="the module with OPS"
    )
    return parser.parse_args()


def tasks_of(options: argparse.Namespace) -> list[Task]:
    ops = load_ops(options.cases)
    unknown = set(options.op or ()) - set(ops)
    if unknown:
        sys.exit(f"--op: no op {', '.join(sorted(unknown))}; there are {', '.join(ops)}")
    return [
        Task(options.cases, op.name, target, str(dtype).removeprefix("torch."), tuple(shapes))
        for op in ops.values()
        if not options.op or op.name in options.op
        if (shapes := op.quick_shapes if options.quick else op.shapes)
        for target in options.target
        for dtype in op.dtypes
    ]


def main() -> int:
    options = arguments()
    # The compiling processes inherit it, and an interpreted kernel cannot be compiled.
    os.environ.pop("TRITON_INTERPRET", None)
    rows: list[Row] = []
    failures: list[Failure] = []
    tasks = tasks_of(options)
    started = time.monotonic()
    for done, (task, outcome) in enumerate(
        run_all(tasks, options.jobs, options.time_limit), start=1
    ):
        rows += outcome.rows
        failures += outcome.failures
        seconds = time.monotonic() - started
        print(
            f"[{done}/{len(tasks)}] {seconds:.0f} s: {task.op} {task.dtype} {task.target}",
            file=sys.stderr,
        )
    rows.sort(key=lambda row: (row.op, row.dtype, row.shape, row.phase != "forward"))
    found = [problems(row) for row in rows]
    over = sum(map(bool, found))

    shown = [i for i in range(len(rows)) if found[i] or not options.over]
    print_rows([rows[i] for i in shown], [found[i] for i in shown])
    if failures:
        print_table(
            "failures",
            ("op", "phase", "shape", "dtype", "target", "reason"),
            [
                (f.op, f.phase, "x".join(map(str, f.shape)), f.dtype, f.target, f.reason)
                for f in failures
            ],
        )
    if options.compare:
        print_comparison(options.compare, rows)
    if options.json:
        write_json(options.json, rows, found, failures)
    print(f"{len(rows)} kernels, {over} over budget, {len(failures)} failures")
    return 1 if over or failures or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
