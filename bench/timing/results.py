"""The rows of result files, the tables that are made of them, and the comparison of two."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from ..op import BACKWARD, BOTH, DIRECTIONS, FORWARD, Op, Shape, Traffic, shape_name
from ..output import print_table
from .clock import Ceilings
from .runner import Outcome, median_and_spread

Row = dict[str, Any]
"""One contender in one direction of a case, as it stands in a result file."""

CPU_NOTE = "On a CPU fastattn runs its reference backend: this measures PyTorch, not the kernels."


def make_rows(
    op: Op,
    shape: Shape,
    dtype: torch.dtype,
    outcome: Outcome,
    ceilings: Ceilings,
    target: Any,
    *,
    on_gpu: bool,
) -> list[Row]:
    """The rows of a result file that a case makes."""
    traffic = dict(op.timing.traffic(shape, dtype, target))
    traffic[BOTH] = traffic[FORWARD] + traffic[BACKWARD]
    flops = dict(op.timing.flops(shape))
    flops[BOTH] = flops[FORWARD] + flops[BACKWARD]
    # The goals are those of the kernels.
    goal = op.timing.goal if on_gpu else lambda direction, shape: None
    rows = []
    for name, measurement in outcome.measured.items():
        for direction in measurement.seconds:
            seconds, spread = median_and_spread(measurement.seconds[direction])
            error = measurement.errors.get(direction)
            least = traffic[direction].least
            rows.append(
                {
                    "op": op.name,
                    "shape": list(shape),
                    "dtype": str(dtype).removeprefix("torch."),
                    "direction": direction,
                    "contender": name,
                    "milliseconds": seconds * 1e3,
                    "spread": spread * 1e3,
                    "calls": len(measurement.seconds[direction]),
                    "gigabytes_per_second": least / seconds / 1e9,
                    "teraflops_per_second": flops[direction] / seconds / 1e12,
                    "tokens_per_second": op.timing.tokens(shape) / seconds or None,
                    "share_of_ceiling": ceilings.floor(least, flops[direction]) / seconds,
                    "goal": goal(direction, shape),
                    "bytes_least": least,
                    "bytes_moved_by_fastattn": traffic[direction].moved,
                    "peak_bytes": measurement.peak_bytes.get(direction),
                    "saved_bytes": measurement.saved_bytes,
                    "error": error and _number(error.error),
                    "error_allowed": error and _number(error.allowed),
                    "error_of": error and error.name,
                }
            )
    return rows


def _number(value: float) -> float | str:
    """JSON has no infinities and no NaN."""
    return value if math.isfinite(value) else str(value)


def print_ceilings(ceilings: Ceilings) -> None:
    print(
        f"ceilings measured here: copy {ceilings.copy / 1e9:.0f} GB/s, "
        f"bfloat16 product {ceilings.product / 1e12:.3g} TFLOP/s"
    )


def print_case(rows: Sequence[Row], failures: Mapping[str, str]) -> None:
    """Print the contenders of one case side by side."""
    by_contender: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_contender.setdefault(row["contender"], {})[row["direction"]] = row
    if rows:
        first = rows[0]
        print_table(
            f"{first['op']} {shape_name(first['shape'])} {first['dtype']}",
            (
                "who",
                *(f"{direction} ms" for direction in DIRECTIONS),
                "forward GB/s",
                "of ceiling",
                "backward GB/s",
                "of ceiling",
                "tokens/s",
                "peak MB",
                "saved MB",
                "error",
                "gradients",
            ),
            [
                (
                    name,
                    *(_time(found.get(direction)) for direction in DIRECTIONS),
                    *(
                        cell
                        for direction in (FORWARD, BACKWARD)
                        for cell in (_bandwidth(found.get(direction)), _share(found.get(direction)))
                    ),
                    _tokens(found.get(BOTH)),
                    _megabytes(found.get(BOTH), "peak_bytes"),
                    _megabytes(found.get(BOTH), "saved_bytes"),
                    *(_error(found.get(direction)) for direction in (FORWARD, BACKWARD)),
                )
                for name, found in by_contender.items()
            ],
        )
    for name, reason in failures.items():
        print(f"  {name}: {reason}")


# Of contenders without a backward there is no row of it.


def _time(row: Row | None) -> str:
    return f"{row['milliseconds']:.3f} ±{row['spread']:.3f}" if row else "-"


def _bandwidth(row: Row | None) -> str:
    return f"{row['gigabytes_per_second']:.4g}" if row else "-"


def _share(row: Row | None) -> str:
    if row is None:
        return "-"
    share = f"{row['share_of_ceiling']:.0%}"
    if row["contender"] == "fastattn" and row["goal"] is not None:
        return f"{share} (goal {row['goal']:.0%})"
    return share


def _tokens(row: Row | None) -> str:
    return f"{row['tokens_per_second']:.4g}" if row and row["tokens_per_second"] else "-"


def _megabytes(row: Row | None, what: str) -> str:
    return f"{row[what] / 1e6:.1f}" if row and row[what] is not None else "-"


def _error(row: Row | None) -> str:
    if row is None or row["error"] is None:
        return "-"
    error, allowed = float(row["error"]), float(row["error_allowed"])
    return f"{error:.0e}" if error <= allowed else f"{error:.0e} > {allowed:.0e}"


def print_traffic(ops: Iterable[Op], target: Any) -> None:
    """Print the bytes that our kernels move beside the least possible, at the sizes of a GPU."""
    lines = []
    for op in ops:
        if op.benchmark is None:
            continue
        for shape in sorted(op.timing.sizes, key=lambda shape: shape[-1]):
            traffic = op.timing.traffic(shape, op.dtypes[0], target)
            lines.append(
                (
                    op.name,
                    shape_name(shape),
                    str(op.dtypes[0]).removeprefix("torch."),
                    *(_bytes(traffic[direction]) for direction in (FORWARD, BACKWARD)),
                )
            )
    print_table(
        f"MB moved by design / least possible, on {target.multiprocessors} multiprocessors",
        ("op", "shape", "dtype", "forward", "backward"),
        lines,
    )


def _bytes(traffic: Traffic) -> str:
    moved, least = traffic.moved / 1e6, traffic.least / 1e6
    return f"{moved:.0f} / {least:.0f} = {moved / least:.2f}"


def print_comparison(old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Print the times of two result files beside each other, where both have them."""
    for what in ("device", "versions", "commit", "backend"):
        if old[what] != new[what]:
            print(f"{what} differs: {old[what]} -> {new[what]}")
    before = {_case(row): row for row in old["results"]}
    lines = []
    for row in new["results"]:
        if _case(row) not in before:
            continue
        earlier = before[_case(row)]
        change = row["milliseconds"] / earlier["milliseconds"] - 1
        apart = abs(row["milliseconds"] - earlier["milliseconds"])
        within = apart <= row["spread"] + earlier["spread"]
        verdict = "within the spread" if within else "slower" if change > 0 else "faster"
        lines.append((*_case(row), _time(earlier), _time(row), f"{change:+.0%}", verdict))
    if not lines:
        print("the two files have no case in common")
        return
    print_table(
        "times in ms, median ± half the interquartile range",
        ("op", "shape", "dtype", "direction", "who", "old", "new", "change", ""),
        lines,
    )


def _case(row: Row) -> tuple[str, ...]:
    return (
        row["op"],
        shape_name(row["shape"]),
        row["dtype"],
        row["direction"],
        row["contender"],
    )
