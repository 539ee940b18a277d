"""One picture an op and dtype: time, share of the ceiling and memory against the row's width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..environment import slug
from ..op import BACKWARD, FORWARD
from .results import CPU_NOTE, Row

# Ours is drawn strongly and last; the others can be told apart by hue and by marker.
STYLES = {
    "eager": ("#9aa0a6", "v"),
    "torch": ("#5f6368", "s"),
    "compile": ("#e8710a", "^"),
    "Liger": ("#12a150", "D"),
    "quack": ("#9334e6", "P"),
    "fastattn": ("#1a56db", "o"),
}

PANELS = (
    ("time, ms", "milliseconds"),
    ("share of the ceiling", "share_of_ceiling"),
    ("peak memory, MB", "peak_bytes"),
)


def draw(document: Mapping[str, Any], folder: Path, stem: str) -> list[Path]:
    """Draw every op and dtype of a result file that has more than one size.

    Raises:
        ImportError: matplotlib is not installed.
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in document["results"]:
        groups.setdefault((row["op"], row["dtype"]), []).append(row)
    return [
        _draw_one(document, rows, folder / f"{stem}-{slug(op)}-{dtype}.png")
        for (op, dtype), rows in groups.items()
        if len({tuple(row["shape"]) for row in rows}) > 1
    ]


def _draw_one(document: Mapping[str, Any], rows: Sequence[Row], path: Path) -> Path:
    # pyplot would keep the figure, and choose a window system.
    from matplotlib.figure import Figure

    panels = [panel for panel in PANELS if any(row[panel[1]] is not None for row in rows)]
    figure = Figure(figsize=(11, 3.3 * len(panels) + 1.3), dpi=120, layout="constrained")
    axes = figure.subplots(len(panels), 2, squeeze=False, sharex=True, sharey="row")
    for line, (label, column) in zip(axes, panels, strict=True):
        for axis, direction in zip(line, (FORWARD, BACKWARD), strict=True):
            _draw_panel(axis, [row for row in rows if row["direction"] == direction], column)
        line[0].set_ylabel(label)
        _scale(
            line[0], [y for axis in line for drawn in axis.get_lines() for y in drawn.get_ydata()]
        )
    for axis, direction in zip(axes[0], (FORWARD, BACKWARD), strict=True):
        axis.set_title(direction)
    for axis in axes[-1]:
        axis.set_xlabel("columns of a row")
    handles = {line.get_label(): line for axis in axes[:, 0] for line in axis.get_lines()}
    handles = {name: line for name, line in handles.items() if not name.startswith("_")}
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=7, frameon=False
    )
    figure.suptitle(_title(document, rows), fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _title(document: Mapping[str, Any], rows: Sequence[Row]) -> str:
    versions = document["versions"]
    copy = document["ceilings"]["copy_gigabytes_per_second"]
    title = (
        f"{rows[0]['op']}, {rows[0]['dtype']}, on {document['device']['name']}\n"
        f"torch {versions['torch']}, triton {versions.get('triton', '-')}, "
        f"copy {copy:.0f} GB/s"
    )
    return title if document["backend"] == "triton" else f"{title}\n{CPU_NOTE}"


def _draw_panel(axis: Any, rows: Sequence[Row], column: str) -> None:
    contenders = {row["contender"] for row in rows}
    known = [name for name in STYLES if name in contenders]
    for name in [*sorted(contenders - set(known)), *known]:
        own = sorted(
            (row for row in rows if row["contender"] == name), key=lambda row: row["shape"][-1]
        )
        color, marker = STYLES.get(name, ("#c5221f", "X"))
        ours = name == "fastattn"
        axis.plot(
            [row["shape"][-1] for row in own],
            [row[column] / 1e6 if column == "peak_bytes" else row[column] for row in own],
            color=color,
            marker=marker,
            markersize=6 if ours else 4.5,
            linewidth=2.6 if ours else 1.3,
            label=name,
        )
    widths = sorted({row["shape"][-1] for row in rows})
    axis.set_xscale("log", base=2)
    axis.set_xticks(widths, [_short(width) for width in widths])
    axis.minorticks_off()
    axis.grid(True, color="#e8eaed")
    axis.spines[["top", "right"]].set_visible(False)
    if column == "share_of_ceiling":
        _mark_goals(axis, rows)


def _scale(axis: Any, values: Sequence[float]) -> None:
    """Start a line of panels at zero, unless somebody is so slow that the others would vanish."""
    if max(values) > 20 * min(values):
        axis.set_yscale("log")
    else:
        axis.set_ylim(0, 1.05 * max(values))


def _mark_goals(axis: Any, rows: Sequence[Row]) -> None:
    """Draw the goal as a short bar at each width, and the ceiling where there is a goal."""
    from matplotlib.ticker import PercentFormatter

    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    goals = {row["shape"][-1]: row["goal"] for row in rows if row["goal"] is not None}
    if goals:
        axis.axhline(1.0, color="#202124", linewidth=0.8, linestyle="--")
        axis.plot(
            list(goals),
            list(goals.values()),
            linestyle="none",
            marker="_",
            markersize=16,
            color="#202124",
            label="goal",
        )


def _short(width: int) -> str:
    return f"{width // 1024}K" if width % 1024 == 0 else str(width)
