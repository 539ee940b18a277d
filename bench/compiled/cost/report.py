"""Tables of what is predicted, and the file that keeps it."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import triton

from ...environment import commit
from ...output import print_table, write
from ..measure import Row
from .budget import problems
from .hardware import HARDWARE
from .l2 import Traffic
from .pipes import COUNTED
from .predict import Cost, LoopCost
from .totals import Total

HEADER = (
    "op",
    "kernel",
    "shapes",
    "tile",
    "warps",
    "stages",
    "regs",
    "spill",
    "CTAs by",
    "n",
    "instructions of a pass",
    "tensor",
    "shared",
    "MUFU",
    "ALU",
    "FP32",
    "issue",
    "predicted cycles",
    "predicted",
    "ahead",
    "over budget",
)


def print_costs(rows: Iterable[Row]) -> None:
    """Print a table a target; the shapes that share a kernel's loop share a line."""
    tables: dict[str, dict[tuple[str, ...], list[str]]] = {}
    for row in rows:
        if row.cost is None:
            continue
        over = "; ".join(problem.check for problem in problems(row))
        for number, loop in enumerate(row.cost.loops):
            cells = _cells(row, row.cost, number, loop, over)
            shapes = tables.setdefault(row.target, {}).setdefault(cells, [])
            shapes.append("x".join(map(str, row.shape)))
    for target, lines in tables.items():
        hardware = HARDWARE[target]
        print_table(
            f"{target}: predicted for {hardware.card} at {hardware.gigahertz} GHz, "
            f"{hardware.teraflops:.0f} TFLOP/s, {hardware.memory_terabytes} TB/s; nothing of it is "
            "measured. * is the loop that long lengths spend their time in",
            HEADER,
            [(*cells[:2], " ".join(shapes), *cells[2:]) for cells, shapes in lines.items()],
        )


def _cells(row: Row, cost: Cost, number: int, loop: LoopCost, over: str) -> tuple[str, ...]:
    """All cells but that of the shapes."""
    ordered = sorted(loop.instructions.items(), key=lambda item: -item[1])
    return (
        row.op,
        row.kernel.removesuffix("_kernel") + ("*" if number == cost.main else ""),
        "x".join(map(str, cost.tile)),
        str(row.num_warps),
        str(cost.stages),
        str(row.code.registers),
        str(row.code.spill_bytes),
        f"{cost.occupancy.blocks} {cost.occupancy.limit}",
        str(sum(loop.instructions.values())),
        " ".join(f"{kind} {count}" for kind, count in ordered),
        *(f"{loop.cycles[pipe]:.0f}" for pipe in COUNTED),
        "-".join(f"{cycles:.0f}" for cycles in loop.predicted_cycles),
        format_speed(loop, row.target),
        "" if loop.steps_ahead is None else f"{loop.steps_ahead:.1f}",
        over if number == cost.main else "",
    )


def format_speed(loop: LoopCost, target: str) -> str:
    """The predicted share of the tensor cores' peak, or terabytes a second.

    These are what memory gives or the instructions allow, which stands in brackets.
    """
    if loop.tensor_share is not None:
        low, high = loop.tensor_share
        return f"{100 * low:.0f}-{100 * high:.0f} %"
    if loop.terabytes is None:
        return ""
    allowed = "-".join(f"{speed:.1f}" for speed in loop.terabytes)
    most = HARDWARE[target].memory_terabytes
    low = min(most, loop.terabytes[0])
    return f"{low:.2f} TB/s (of {allowed})"


def print_totals(totals: Sequence[Total]) -> None:
    """Print what ops as a whole are predicted to reach."""
    print_table(
        "predicted TFLOP/s of the op by its own count; nothing of it is measured",
        ("target", "op", "shape", "direction", "low", "high", "of peak"),
        [
            (
                total.target,
                total.op,
                "x".join(map(str, total.shape)),
                total.phase,
                f"{total.teraflops[0]:.0f}",
                f"{total.teraflops[1]:.0f}",
                f"{100 * total.share[0]:.0f}-{100 * total.share[1]:.0f} %",
            )
            for total in totals
        ],
    )


def print_traffics(traffics: Sequence[Traffic]) -> None:
    """Print what the grids' order is predicted to bring from HBM."""
    print_table(
        "predicted GB from and to HBM, by the order of the grid in a simulated L2",
        ("target", "kernel", "op", "shape", "predicted", "least", "times"),
        [
            (
                traffic.target,
                traffic.kernel.removesuffix("_kernel"),
                traffic.op,
                "x".join(map(str, traffic.shape)),
                f"{traffic.moved / 1e9:.2f}",
                f"{traffic.least / 1e9:.2f}",
                f"{traffic.moved / traffic.least:.1f}",
            )
            for traffic in traffics
        ],
    )


def write_costs(
    path: Path, rows: Sequence[Row], totals: Sequence[Total], traffics: Sequence[Traffic]
) -> None:
    """Write everything that was predicted, a row a kernel."""
    targets = sorted({row.target for row in rows})
    document = {
        "what": "predicted from machine code by python -m bench.compiled --cost; nothing measured",
        "commit": commit(),
        "triton": triton.__version__,
        "python": platform.python_version(),
        "hardware": {target: dataclasses.asdict(HARDWARE[target]) for target in targets},
        "rows": [_entry(row, row.cost) for row in rows if row.cost is not None],
        "totals": [dataclasses.asdict(total) for total in totals],
        "bytes_from_hbm": [dataclasses.asdict(traffic) for traffic in traffics],
    }
    write(path, _rounded(document))


def _entry(row: Row, cost: Cost) -> dict[str, Any]:
    return {
        "target": row.target,
        "op": row.op,
        "phase": row.phase,
        "kernel": row.kernel,
        "shape": row.shape,
        "dtype": row.dtype,
        "tile": cost.tile,
        "warps": row.num_warps,
        "stages": cost.stages,
        "registers": row.code.registers,
        "spill_bytes": row.code.spill_bytes,
        "shared_memory": row.shared_memory,
        "blocks": cost.occupancy.blocks,
        "limit": cost.occupancy.limit,
        "main": cost.main,
        "loops": [dataclasses.asdict(loop) for loop in cost.loops],
        "problems": [problem.check for problem in problems(row)],
    }


def _rounded(value: Any) -> Any:
    """The value with four digits of every fraction, which is more than the model knows."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(part) for part in value]
    return value
