"""The memory that an op needs on a CPU, and the time it takes, beside the plain way of PyTorch.

Memory: the peak of the process's resident memory during a forward and a backward, beyond what was
resident before and beyond the gradients, each contender in a process of its own. Linux only.
Time: medians of forward and backward in turns within one process. Another process that keeps the
processor busy disturbs them: the seconds of processor time stand beside those of the clock.
"""

from __future__ import annotations

import argparse
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

from ..contenders import COMPILED, EAGER, OURS, TORCH, contender_names, load_contender
from ..environment import ROOT, describe
from ..inputs import incoming_like, outputs_of, random_arguments, seeded, tensors_of
from ..op import Op, Shape, shape_name
from ..output import print_table, write
from ..registry import OPS

CPU = torch.device("cpu")
STATUS = Path("/proc/self/status")
RESET_PEAK = "5"

MEASURED = {op.name: op for op in OPS if op.torch and op.benchmark}


def call_of(name: str, op: Op, shape: Shape) -> tuple[Callable[[], Any], int]:
    """Forward and backward of a contender, and the bytes of the gradients."""
    contender = load_contender(op, name)
    arguments = random_arguments(op, shape, torch.float32, CPU)
    if contender.same_random_numbers:
        arguments = seeded(op, arguments)
    tensors = tensors_of(arguments)

    def call() -> Any:
        outputs = outputs_of(contender.call, arguments)
        return torch.autograd.grad(outputs, tensors, incoming_like(outputs))

    return call, sum(tensor.nbytes for tensor in tensors)


def resident(field: str) -> int:
    """VmRSS, the resident bytes of this process, or VmHWM, their peak."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def peak_bytes(name: str, op: Op, shape: Shape) -> int:
    """The peak of one call above inputs and gradients, after a small one has loaded everything."""
    call_of(name, op, op.small)[0]()
    call, gradient_bytes = call_of(name, op, shape)
    gc.collect()
    Path("/proc/self/clear_refs").write_text(RESET_PEAK)
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before - gradient_bytes


def seconds_in_turns(
    names: Sequence[str], op: Op, shape: Shape, rounds: int
) -> dict[str, list[tuple[float, float]]]:
    """(clock, processor) seconds of each call, another contender first in every round."""
    calls = {name: call_of(name, op, shape)[0] for name in names}
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
    command = [sys.executable, "-m", "bench.memory", "--only", what, "--op", options.op]
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
        "op": options.op,
        "shape": list(options.shape),
        "dtype": "float32",
        "direction": "both",
        "threads": options.threads,
        "results": rows,
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m bench.memory", description=__doc__)
    parser.add_argument("--op", choices=MEASURED, default="linear_cross_entropy", metavar="NAME")
    parser.add_argument(
        "--shape", nargs="+", type=int, metavar="N", help="else the first of the op's on a CPU"
    )
    parser.add_argument("--contender", nargs="+", metavar="NAME", help="else all that are here")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="the result file")
    parser.add_argument("--only", choices=("memory", "time"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    op = MEASURED[options.op]
    options.shape = tuple(options.shape or op.timing.small_sizes[0])
    # The reference defines the op, however much memory that takes.
    everyone = [name for name in contender_names(op) if name not in (EAGER, COMPILED)]
    options.contender = options.contender or [
        name for name in everyone if name in (OURS, TORCH) or _is_here(op, name)
    ]
    if not {TORCH} <= set(options.contender) <= set(everyone) and not options.only:
        parser.error(f"--contender: {TORCH}, beside which all are measured, and of {everyone}")
    return options


def _is_here(op: Op, name: str) -> bool:
    """Whether a contender is installed and takes a CPU's tensors; says why if not."""
    try:
        call_of(name, op, op.small)[0]()
    except Exception as error:
        print(f"{name} is left out: {error!r}", file=sys.stderr)
        return False
    return True


def main() -> int:
    options = arguments()
    op = MEASURED[options.op]
    torch.set_num_threads(options.threads)
    if options.only == "memory":
        print(json.dumps(peak_bytes(options.contender[0], op, options.shape)))
        return 0
    if options.only == "time":
        print(json.dumps(seconds_in_turns(options.contender, op, options.shape, options.rounds)))
        return 0

    document = measure(options)
    print_table(
        f"{op.name} {shape_name(options.shape)} float32, {options.threads} threads",
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
        write(options.out, document)
        print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
