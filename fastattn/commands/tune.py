"""`python -m fastattn tune`: measure block sizes on this machine and keep the fastest."""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..checking import compare_results
from ..ops.core.backends import HAS_TRITON, INTERPRETED, device_obstacle
from .tunables import TUNABLES, Case, Tunable

DRY_CANDIDATES = 2
"""Candidates of a shape that a dry run checks."""


def main(arguments: list[str]) -> int:
    """Measure block sizes on this machine's GPU, and keep the fastest for this user.

    Each candidate's numbers are checked against float64 before it is timed. What was measured is
    written after each shape, to the table that kernels of this user read from then on. Exit code 1
    if a candidate's numbers are wrong, 2 if nothing can be measured here.
    """
    parser = argparse.ArgumentParser(prog="python -m fastattn tune", description=main.__doc__)
    names = [tunable.kernel for tunable in TUNABLES]
    parser.add_argument("--kernel", action="append", choices=names, help="only this one")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the table to write")
    parser.add_argument(
        "--minutes",
        type=_positive,
        default=float("inf"),
        metavar="N",
        help="measure no longer than this (default: until every shape is measured)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check some candidates at tiny size, without a GPU in the interpreter; time nothing",
    )
    options = parser.parse_args(arguments)
    if not HAS_TRITON:
        print("tune: triton is not installed, so there is nothing to tune", file=sys.stderr)
        return 2
    has_gpu = torch.cuda.is_available() and device_obstacle("cuda", 0) is None
    if options.dry_run:
        if not has_gpu and not INTERPRETED:
            command = [sys.executable, "-m", "fastattn", "tune", *arguments]
            return subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}).returncode
        return _dry_run(options.kernel or names, "cpu" if INTERPRETED else "cuda")
    reason = None if has_gpu else "there is no GPU here that kernels run on"
    if INTERPRETED:
        reason = "the interpreter is on, and its times mean nothing"
    if reason is not None:
        print(
            f"tune: nothing can be timed: {reason}; --dry-run checks candidates without timing",
            file=sys.stderr,
        )
        return 2
    return _tune(options)


def _positive(text: str) -> float:
    number = float(text)
    if not number > 0.0:
        raise argparse.ArgumentTypeError(f"must be more than 0, got {text}")
    return number


def _dry_run(names: list[str], device: str) -> int:
    from ..kernels.config import find_target

    wrong = 0
    target = find_target(torch.empty(0, device=device))
    for tunable in _tunables(names):
        for shape in tunable.tiny_shapes:
            case = tunable.case(*shape, device)
            candidates = tunable.candidates(target, **case.features)[:DRY_CANDIDATES]
            for config in (tunable.rule(target, **case.features), *candidates):
                failure = _check(case, config)
                wrong += failure is not None
                print(f"{tunable.kernel} {_shown(shape)}: {config}: {failure or 'right'}")
    print("nothing was timed, and no table was written")
    return 1 if wrong else 0


def _tune(options: argparse.Namespace) -> int:
    from ..kernels import tuning
    from ..kernels.config import find_target

    target = find_target(torch.empty(0, device="cuda"))
    path = options.out or tuning.user_tables() / f"{tuning.table_name(target)}.json"
    deadline = time.monotonic() + 60 * options.minutes
    names = options.kernel or [tunable.kernel for tunable in TUNABLES]
    wrong = 0
    sizes: dict[str, dict[Any, int]] = {name: {} for name in names}
    for tunable, shape in take_turns(_tunables(names)):
        if time.monotonic() > deadline:
            print("the time is over")
            return 1 if wrong else 0
        entry, mistakes = measure(tunable, shape, "cuda", sizes[tunable.kernel], deadline)
        wrong += mistakes
        if entry is not None:
            write_entry(path, tunable.kernel, entry)
    tuning.forget_tables()
    print(f"written to {path}")
    return 1 if wrong else 0


def _tunables(names: list[str]) -> Iterator[Tunable]:
    return (tunable for tunable in TUNABLES if tunable.kernel in names)


def take_turns(tunables: Iterable[Tunable]) -> Iterator[tuple[Tunable, tuple]]:
    """Every kernel's most telling shape, then every kernel's next."""
    rows = ([(tunable, shape) for shape in tunable.shapes] for tunable in tunables)
    for turn in itertools.zip_longest(*rows):
        yield from (pair for pair in turn if pair is not None)


def measure(
    tunable: Tunable, shape: tuple, device: str, sizes: dict[Any, int], deadline: float
) -> tuple[dict[str, Any] | None, int]:
    """The entry for one shape, and how many candidates computed wrong numbers.

    The rule's configuration comes first, and none is tried past the deadline. `sizes` remembers
    the shared memory of what was compiled for other shapes.
    """
    from triton.runtime.errors import OutOfResources

    from ..kernels.config import find_target
    from ..kernels.tuning import Bucket

    target = find_target(torch.empty(0, device=device))
    case = tunable.case(*shape, device)
    rule = tunable.rule(target, **case.features)
    # A kernel's shared memory depends on all but the sizes that are bucketed.
    kind = tuple(value for value in case.features.values() if not isinstance(value, Bucket))
    times: dict[Any, float] = {}
    wrong = 0
    for config in dict.fromkeys((rule, *tunable.candidates(target, **case.features))):
        if times and time.monotonic() > deadline:
            break
        try:
            with _shared_memory(f"{tunable.kernel}_kernel") as compiled:
                failure = _check(case, config)
        except OutOfResources:
            continue
        if failure is not None:
            wrong += 1
            print(f"{tunable.kernel} {_shown(shape)}: {config}: WRONG, {failure}", flush=True)
            continue
        if compiled:
            sizes[config, kind] = max(compiled)
        times[config] = _microseconds(functools.partial(case.launch, config))
    if not times:
        return None, wrong
    best = min(times, key=lambda config: times[config])
    torchs = _microseconds(case.reference)
    print(
        f"{tunable.kernel} {_shown(shape)}: {times[best]:.1f} us, by the rule "
        f"{times.get(rule, float('nan')):.1f}, by PyTorch {torchs:.1f}: {best}",
        flush=True,
    )
    return {
        "features": dict(case.features),
        "config": dataclasses.asdict(best),
        # 0 where the best is to leave it to another kernel.
        "shared_memory": sizes.get((best, kind), 0),
        "microseconds": round(times[best], 2),
        "rule_microseconds": round(times[rule], 2) if rule in times else None,
        "torch_microseconds": round(torchs, 2),
    }, wrong


def _microseconds(call: Callable[[], Any]) -> float:
    """The median of a call's time on the device, with the L2 cache cleared before each."""
    from triton.testing import do_bench

    milliseconds: Any = do_bench(call, return_mode="median")
    return 1e3 * milliseconds


def _check(case: Case, config: Any) -> str | None:
    """What is wrong with a candidate's numbers, if anything is."""
    (found,) = compare_results({case.result: case.launch(config)}, case.measured)
    return None if found.passed else f"error {found.error:.1e}, allowed {found.allowed:.1e}"


@contextlib.contextmanager
def _shared_memory(kernel: str) -> Iterator[list[int]]:
    """The bytes of shared memory of every kernel of this name that is compiled inside."""
    from triton import knobs

    found: list[int] = []

    def listen(*, metadata: Mapping[str, Any], **_: Any) -> None:
        if metadata["name"] == kernel:
            found.append(metadata["shared"])

    before = knobs.compilation.listener
    knobs.compilation.listener = listen
    try:
        yield found
    finally:
        knobs.compilation.listener = before


def write_entry(path: Path, kernel: str, entry: Mapping[str, Any]) -> None:
    """Put an entry into a table, in the place of one for the same features."""
    import triton

    from ..kernels.tuning import TABLE_FORMAT

    kernels: dict[str, list] = {}
    if path.exists():
        table = json.loads(path.read_text())
        if table["format"] == TABLE_FORMAT:
            kernels = table["kernels"]
    others = [e for e in kernels.get(kernel, []) if e["features"] != entry["features"]]
    kernels[kernel] = [*others, dict(entry)]
    table = {
        "format": TABLE_FORMAT,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "triton": triton.__version__,
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "kernels": kernels,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(table, indent=1) + "\n")
    unfinished.replace(path)


def _shown(shape: tuple) -> str:
    return " ".join(str(part).removeprefix("torch.") for part in shape)
