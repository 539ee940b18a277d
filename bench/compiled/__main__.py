"""Compile every kernel that the ops launch, for GPUs that need not be there, and check the code.

Nothing runs on a GPU. The exit code is 1 if a kernel is over budget or does not compile. With
--cost the kernels' speed is predicted from their code, and held against a budget of its own.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from fastattn.machine.driver import TARGETS

from .budget import problems
from .cost import PEERS, TUTORIAL
from .cost.budget import judge
from .cost.budget import problems as cost_problems
from .cost.hardware import HARDWARE
from .cost.known import COVERED, KNOWN
from .cost.l2 import count_all
from .cost.report import print_costs, print_totals, print_traffics, write_costs
from .cost.totals import total_all
from .measure import Failure, Row, Task, load_ops
from .parallel import run_all
from .report import print_comparison, print_rows, print_table, write_json


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m bench.compiled", description=__doc__)
    parser.add_argument("--op", nargs="+", metavar="NAME", help="only these ops")
    parser.add_argument("--target", nargs="+", choices=TARGETS, help="only these GPUs")
    parser.add_argument("--quick", action="store_true", help="only the shapes that the tests use")
    parser.add_argument("--dtype", nargs="+", metavar="NAME", help="only these of an op's dtypes")
    parser.add_argument("--over", action="store_true", help="print only what is over budget")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    parser.add_argument("--compare", type=Path, metavar="OLD.json", help="print what has changed")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time")
    parser.add_argument(
        "--time-limit", type=float, default=600, help="seconds for one op, dtype and target"
    )
    parser.add_argument(
        "--cost",
        action="store_true",
        help=f"predict the kernels' speed, in each op's first dtype, on {', '.join(HARDWARE)}",
    )
    parser.add_argument(
        "--peers", action="store_true", help="with --cost: also the kernels of others, if installed"
    )
    parser.add_argument(
        "--tutorial", type=Path, metavar="FILE", help="with --peers: a copy of Triton's tutorial 06"
    )
    parser.add_argument(
        "--cases", default="bench.registry", metavar="MODULE", help="the module with OPS"
    )
    options = parser.parse_args()
    if options.target is None:
        options.target = list(HARDWARE if options.cost else TARGETS)
    if options.cost and (unknown := set(options.target) - set(HARDWARE)):
        parser.error(f"--cost: no model of {', '.join(sorted(unknown))}")
    if options.cost and options.compare:
        parser.error("--cost: --compare is for machine code alone")
    if options.peers and not options.cost:
        parser.error("--peers: their kernels are only predicted, with --cost")
    if options.tutorial:
        os.environ[TUTORIAL] = str(options.tutorial.resolve(strict=True))
    return options


def tasks_of(options: argparse.Namespace) -> list[Task]:
    tasks = _tasks(options, options.cases, options.op)
    return tasks + _tasks(options, PEERS, None) if options.peers else tasks


def _tasks(options: argparse.Namespace, cases: str, names: Sequence[str] | None) -> list[Task]:
    ops = load_ops(cases)
    unknown = set(names or ()) - set(ops)
    if unknown:
        sys.exit(f"--op: no op {', '.join(sorted(unknown))}; there are {', '.join(ops)}")
    return [
        Task(
            cases,
            op.name,
            target,
            str(dtype).removeprefix("torch."),
            tuple(shapes),
            options.cost,
        )
        for op in ops.values()
        if not names or op.name in names
        if (shapes := op.quick_shapes if options.quick else op.shapes)
        for target in options.target
        for dtype in (op.dtypes[:1] if options.cost else op.dtypes)
        if not options.dtype or str(dtype).removeprefix("torch.") in options.dtype
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
    if failures:
        print_table(
            "failures",
            ("op", "phase", "shape", "dtype", "target", "reason"),
            [
                (f.op, f.phase, "x".join(map(str, f.shape)), f.dtype, f.target, f.reason)
                for f in failures
            ],
        )
    if options.cost:
        return judge_costs(rows, failures, options)
    found = [problems(row) for row in rows]
    over = sum(map(bool, found))
    shown = [i for i in range(len(rows)) if found[i] or not options.over]
    print_rows([rows[i] for i in shown], [found[i] for i in shown])
    if options.compare:
        print_comparison(options.compare, rows)
    if options.json:
        write_json(options.json, rows, found, failures)
    print(f"{len(rows)} kernels, {over} over budget, {len(failures)} failures")
    return 1 if over or failures or not rows else 0


def covered_cases(cases: str) -> set[tuple[str, tuple[int, ...]]]:
    """The ops and shapes that known.py speaks of."""
    ops = load_ops(cases)
    return {
        (name, tuple(shape)) for name in COVERED if name in ops for shape in ops[name].quick_shapes
    }


def judge_costs(
    rows: Sequence[Row], failures: Sequence[Failure], options: argparse.Namespace
) -> int:
    """Print and write what is predicted, and hold it against its budget and what is known."""
    totals = total_all(rows)
    traffics = count_all(rows)
    covered = covered_cases(options.cases)
    inside = [row for row in rows if (row.op, tuple(row.shape)) in covered]
    unknown, mended = judge(inside, traffics, KNOWN)
    outside = sum(len(cost_problems(row)) for row in rows) - sum(
        map(len, map(cost_problems, inside))
    )
    shown = [row for row in rows if not options.over or cost_problems(row)]
    print_costs(shown)
    print_totals(totals)
    print_traffics(traffics)
    for what, problems_found in (("over budget", unknown), ("known and gone", mended)):
        for problem in sorted(problems_found):
            print(f"{what}: {problem}")
    if options.json:
        write_costs(options.json, rows, totals, traffics)
    print(
        f"{len(rows)} kernels predicted, {len(unknown)} problems that known.py does not have, "
        f"{len(mended)} of it gone, {outside} of kernels that it does not cover, "
        f"{len(failures)} failures"
    )
    return 1 if unknown or mended or failures or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
