"""What linear_cross_entropy needs on a CPU, beside the plain way that holds the logits of all rows.

Memory: the peak of the process's resident memory during a forward and a backward, beyond what was
resident before and beyond the gradients, each contender in a process of its own. Linux only.
Time: medians of forward and backward in turns within one process. Another process that keeps the
processor busy disturbs them: the seconds of processor time stand beside those of the clock.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from . import results
from .compiled.report import print_table
from .contenders import OURS, TORCH, contender_names, load_contender
from .environment import ROOT, describe
from .inputs import outputs_of, random_arguments, tensors_of
from .op import Op, Shape, shape_name
from .registry import OPS

CPU = torch.device("cpu")
STATUS = Path("/proc/self/status")
RESET_PEAK = "5"


def entry() -> Op:
    """The registry's entry, whose arguments and contenders these are."""
    return next(op for op in OPS if op.name == "linear_cross_entropy")


def call_of(name: str, shape: Shape) -> tuple[Callable[[], Any], int]:
    """Forward and backward of a contender, and the bytes of the gradients."""
    op = entry()
    arguments = random_arguments(op, shape, torch.float32, CPU)
    contender = load_contender(op, name)
    tensors = tensors_of(arguments)

    def call() -> Any:
        return torch.autograd.grad(outputs_of(contender.call, arguments), tensors)

    return call, sum(tensor.nbytes for tensor in tensors)


def resident(field: str) -> int:
    """VmRSS, the resident bytes of this process, or VmHWM, their peak."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def peak_bytes(name: str, shape: Shape) -> int:
    """The peak of one call above inputs and gradients, after a small one has loaded everything."""
    call_of(name, (8, 32, 256))[0]()
    call, gradient_bytes = call_of(name, shape)
    gc.collect()
    Path("/proc/self/clear_refs").write_text(RESET_PEAK)
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before - gradient_bytes


def seconds_in_turns(
    names: Sequence[str], shape: Shape, rounds: int
) -> dict[str, list[tuple[float, float]]]:
    """(clock, processor) seconds of each call, another contender first in every round."""
    calls = {name: call_of(name, shape)[0] for name in names}
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for turn in range(-1, rounds):
        for place in range(len(names)):
            name = names[(turn + place) % len(names)]
            clock, processor = time.perf_counter(), time.process_time()
            calls[name]()
            seconds = time.perf_counter() - clock, time.process_time() - processor
            # The first round warms up.
            if turn >= 0:
                measured[name].append(seconds)
    return measured


def in_a_process(what: str, options: argparse.Namespace, names: Sequence[str]) -> Any:
    """The answer of this module in a new process: its last line of output, as JSON."""
    shape = [str(size) for size in options.shape]
    command = [sys.executable, "-m", "bench.linear_cross_entropy_memory", "--only", what]
    command += ["--shape", *shape, "--threads", str(options.threads), "--contender", *names]
    command += ["--rounds", str(options.rounds)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The document of a result file."""
    names = list(options.contender)
    peaks = {name: in_a_process("memory", options, [name]) for name in names}
    seconds = in_a_process("time", options, names)
    plain_clock, plain_processor = (
        statistics.median(pair[place] for pair in seconds[TORCH]) for place in (0, 1)
    )
    rows = []
    for name in names:
        clock, processor = (
            statistics.median(pair[place] for pair in seconds[name]) for place in (0, 1)
        )
        rows.append(
            {
                "contender": name,
                "peak_bytes": peaks[name],
                "peak_share": peaks[name] / peaks[TORCH],
                "seconds": clock,
                "seconds_share": clock / plain_clock,
                "processor_seconds": processor,
                "processor_seconds_share": processor / plain_processor,
                "every_call": seconds[name],
            }
        )
    return describe(CPU) | {
        "when": datetime.datetime.now(datetime.timezone.utc).isoformat("T", "seconds"),
        "op": entry().name,
        "shape": list(options.shape),
        "dtype": "float32",
        "direction": "both",
        "threads": options.threads,
        "results": rows,
    }


def main() -> int:
    op = entry()
    everyone = [name for name in contender_names(op) if name in (OURS, TORCH, "torch chunks")]
    parser = argparse.ArgumentParser(
        "python -m bench.linear_cross_entropy_memory", description=__doc__
    )
    parser.add_argument(
        "--shape", nargs=3, type=int, default=(4096, 512, 32000), metavar="N", help="rows, D, V"
    )
    parser.add_argument("--contender", nargs="+", choices=everyone, default=everyone)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="the result file")
    parser.add_argument("--only", choices=("memory", "time"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shape = tuple(options.shape)
    if options.only == "memory":
        print(json.dumps(peak_bytes(options.contender[0], shape)))
        return 0
    if options.only == "time":
        print(json.dumps(seconds_in_turns(options.contender, shape, options.rounds)))
        return 0
    if TORCH not in options.contender:
        parser.error(f"everything is measured beside {TORCH!r}")

    document = measure(options)
    print_table(
        f"{op.name} {shape_name(shape)} float32, {options.threads} threads",
        ("", "peak MB", "of plain", "seconds", "of plain", "processor s", "of plain"),
        [
            (
                row["contender"],
                f"{row['peak_bytes'] / 1e6:.0f}",
                f"{row['peak_share']:.0%}",
                f"{row['seconds']:.2f}",
                f"{row['seconds_share']:.2f}",
                f"{row['processor_seconds']:.2f}",
                f"{row['processor_seconds_share']:.2f}",
            )
            for row in document["results"]
        ],
    )
    if options.out is not None:
        results.write(options.out, document)
        print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
