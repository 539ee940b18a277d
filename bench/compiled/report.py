"""Tables for the terminal, JSON for tools, and the difference between two runs."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton

from ..output import print_table, write
from .measure import Failure, Row

HEADER = (
    "op",
    "kernel",
    "shapes",
    "dtype",
    "warps",
    "regs",
    "spill",
    "shared",
    "MMA",
    "loads",
    "stores",
    "async",
    "instr",
    "loops",
    "over budget",
)
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def print_rows(rows: Sequence[Row], problems: Sequence[list[str]]) -> None:
    """Print one table a target; the shapes that share a kernel share a line."""
    tables: dict[str, dict[tuple[str, ...], list[str]]] = {}
    for row, found in zip(rows, problems, strict=True):
        lines = tables.setdefault(row.target, {})
        lines.setdefault(_cells(row, found), []).append("x".join(map(str, row.shape)))
    for target, lines in tables.items():
        print_table(
            target,
            HEADER,
            [(*cells[:2], " ".join(shapes), *cells[2:]) for cells, shapes in lines.items()],
        )


def _cells(row: Row, problems: list[str]) -> tuple[str, ...]:
    """All cells but that of the shapes."""
    code = row.code
    return (
        row.op,
        row.kernel.removesuffix("_kernel"),
        DTYPES.get(row.dtype, row.dtype),
        str(row.num_warps),
        str(code.registers),
        str(code.spill_bytes),
        str(row.shared_memory),
        f"{code.tensor_core}/{row.dots}" if row.dots else "",
        _widths(code.loads),
        _widths(code.stores),
        " ".join(
            f"{count} {name}"
            for name, count in (
                ("cp", code.async_copies),
                ("tma", code.bulk_copies),
                ("atom", code.atomics),
            )
            if count
        ),
        str(code.instructions),
        " ".join(str(loop.instructions) for loop in code.loops),
        "; ".join(problems),
    )


def _widths(widths: dict[int, int]) -> str:
    return " ".join(f"{bits}:{count}" for bits, count in widths.items())


def write_json(
    path: Path, rows: Sequence[Row], problems: Sequence[list[str]], failures: Sequence[Failure]
) -> None:
    """Write everything that was measured."""
    document = {
        "versions": {
            "torch": torch.__version__,
            "triton": triton.__version__,
            "python": platform.python_version(),
        },
        "rows": [
            dataclasses.asdict(row) | {"problems": found}
            for row, found in zip(rows, problems, strict=True)
        ],
        "failures": [dataclasses.asdict(failure) for failure in failures],
    }
    write(path, document)


COMPARED = ("registers", "spill_bytes", "instructions", "tensor_core", "loads", "stores")


def print_comparison(old: Path, rows: Sequence[Row]) -> None:
    """Print which kernels changed since the run that wrote `old`."""
    before = _by_case(json.loads(old.read_text())["rows"])
    # A round trip through JSON makes both sides alike: its keys are strings.
    now = _by_case(json.loads(json.dumps([dataclasses.asdict(row) for row in rows])))
    lines = []
    for case, row in now.items():
        if case not in before:
            lines.append([*case[:-1], "new"])
            continue
        changes = [
            f"{name} {old_value} -> {new_value}"
            for name, old_value, new_value in _changes(before[case], row)
        ]
        if changes:
            lines.append([*case[:-1], "; ".join(changes)])
    # Cases that this run did not ask for are not gone.
    asked = {case[:4] for case in now}
    lines += [[*case[:-1], "gone"] for case in before if case[:4] in asked and case not in now]
    if lines:
        header = ("target", "op", "shape", "dtype", "kernel", "change")
        print_table(f"changes since {old}", header, lines)
    else:
        print(f"no change since {old}")


def _by_case(rows: Iterable[dict[str, Any]]) -> dict[tuple[str, ...], dict[str, Any]]:
    """Rows by what they are of; the last part tells kernels of one name in one case apart."""
    seen: Counter[tuple[str, ...]] = Counter()
    cases = {}
    for row in rows:
        shape = "x".join(map(str, row["shape"]))
        case = (row["target"], row["op"], shape, row["dtype"], row["kernel"])
        cases[(*case, str(seen[case]))] = row
        seen[case] += 1
    return cases


def _changes(before: dict[str, Any], now: dict[str, Any]) -> Iterable[tuple[str, Any, Any]]:
    for name in ("num_warps", "shared_memory"):
        if before[name] != now[name]:
            yield name, before[name], now[name]
    for name in COMPARED:
        if before["code"][name] != now["code"][name]:
            yield name, before["code"][name], now["code"][name]
