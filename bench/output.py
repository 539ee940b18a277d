"""What every tool here gives: tables for the terminal, and result files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def print_table(title: str, header: Sequence[str], lines: Iterable[Sequence[str]]) -> None:
    """Print a table, with rich where it is installed."""
    lines = list(lines)
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
        print(f"\n{title}")
        for line in (header, *lines):
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))
        return
    table = Table(*header, title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for line in lines:
        table.add_row(*line, style="red" if header[-1] == "over budget" and line[-1] else None)
    # A line that is too long for the terminal is still easier to read than cut off cells.
    unlimited = Console().options.update(max_width=1000)
    needed = Console().measure(table, options=unlimited).maximum
    Console(width=max(needed, Console().width)).print(table)


def write(path: Path, document: Mapping[str, Any]) -> None:
    """Write a result file, a row a line; an interrupted run leaves the one before whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    entries = ",\n".join(f" {json.dumps(name)}: {_text(value)}" for name, value in document.items())
    partial.write_text(f"{{\n{entries}\n}}\n")
    os.replace(partial, path)


def _text(value: Any) -> str:
    if isinstance(value, list) and value:
        return "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]"
    return json.dumps(value)
