"""The comparison in Markdown: all at a glance, then each contender with its errors and messages."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .features import CAUSAL, GQA, PLAIN
from .judging import (
    ABSENT,
    CRASHED,
    FORWARD,
    GRADIENTS,
    IMPRECISE,
    IMPRECISION,
    NOT_TRIED,
    REFUSED,
    RIGHT,
    WRONG,
)

Row = Mapping[str, Any]
Cell = list[Row]
"""The verdicts of a column: of one thing, or of forward and gradients."""

MARKS = {
    RIGHT: "✓",
    IMPRECISE: "~",
    WRONG: "✗",
    REFUSED: "r",
    ABSENT: "-",
    CRASHED: "!",
    NOT_TRIED: "?",
}
ROUNDABOUT = "◦"
NOT_ASKED = " "

COLUMNS = ("forward", "gradients", "with GQA", "with causal")

LEGEND = f"""\
Each cell has four marks: the forward pass, the gradients, both with GQA (8 query heads on 2), both
with a causal mask (blank where the feature is one itself, or asks for gradients alone).

- `{MARKS[RIGHT]}` right
- `{ROUNDABOUT}` right, but in a roundabout way: by an M x N tensor of masks or biases, by packing
  sequences anew, or by arithmetic on the LSE
- `{MARKS[IMPRECISE]}` right but for an error of up to {IMPRECISION:.0f} times what the rule allows
- `{MARKS[WRONG]}` wrong
- `{MARKS[REFUSED]}` refused with an error
- `{MARKS[ABSENT]}` absent: there is no argument for it
- `{MARKS[CRASHED]}` the process crashed
- `{MARKS[NOT_TRIED]}` not tried for lack of time"""

RULE = """\
An error is right up to twice (gradients: three times) that of PyTorch's plain computation in the
same dtype, both against float64, and rounding ([the rule](../../fastattn/checking.py)). Numbers
are the largest error of all tensors as a share of that."""


def markdown(document: Mapping[str, Any]) -> str:
    """A result file as a page."""
    by_contender: dict[str, list[Row]] = {}
    for row in document["results"]:
        by_contender.setdefault(row["contender"], []).append(row)
    parts = [heading(document), LEGEND, summary(by_contender), RULE]
    parts += [details(name, rows, document["remarks"]) for name, rows in by_contender.items()]
    notes = [f"- {name} {reason}." for name, reason in document["not_tried"].items()]
    return "\n\n".join([*parts, "## Not here", "\n".join(notes)]) + "\n"


def heading(document: Mapping[str, Any]) -> str:
    device = document["device"]
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    return (
        "# What attention can do, by trying it\n\n"
        f"Written by `python -m bench.features` on {document['when'][:10]}, on "
        f"{'one ' if device['type'] != 'cpu' else 'a CPU: '}{device['name']}, in "
        f"{document['dtype']}, with {versions}; commit {document['commit']}."
    )


def summary(by_contender: Mapping[str, Sequence[Row]]) -> str:
    """Features by contenders."""
    return table_of(
        list(by_contender),
        {
            feature: [
                f"`{''.join(map(mark, cells(rows, feature)))}`" for rows in by_contender.values()
            ]
            for feature in features_of(by_contender)
        },
    )


def table_of(columns: Sequence[str], lines: Mapping[str, Sequence[str]]) -> str:
    """A table with a line a feature."""
    rows = [["feature", *columns], ["---"] * (len(columns) + 1)]
    rows += [[feature, *line] for feature, line in lines.items()]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def features_of(by_contender: Mapping[str, Sequence[Row]]) -> list[str]:
    return list(dict.fromkeys(row["feature"] for rows in by_contender.values() for row in rows))


def cells(rows: Sequence[Row], feature: str) -> list[Cell]:
    """A feature's four columns."""
    own = [row for row in rows if row["feature"] == feature]
    plain = [row for row in own if row["variant"] == PLAIN]
    return [
        [row for row in plain if row["what"] == FORWARD],
        [row for row in plain if row["what"] == GRADIENTS],
        [row for row in own if row["variant"] == GQA],
        [row for row in own if row["variant"] == CAUSAL],
    ]


def mark(cell: Cell) -> str:
    """The mark of the worst verdict."""
    if not cell:
        return NOT_ASKED
    order = list(MARKS)
    kind = max((row["kind"] for row in cell), key=order.index)
    return ROUNDABOUT if kind == RIGHT and any("how" in row for row in cell) else MARKS[kind]


def details(name: str, rows: Sequence[Row], remarks: Mapping[str, str]) -> str:
    """One contender: what came out in words, its messages as notes."""
    title = f"## {name}"
    if remark := remarks.get(name):
        title += f"\n\nHere: {remark}."
    if all(row["kind"] in (REFUSED, ABSENT) for row in rows):
        reasons = dict.fromkeys(row["message"] for row in rows if row["kind"] == REFUSED)
        listed = "\n".join(f"- {reason}" for reason in reasons)
        return f"{title}\n\nRefuses every call that it has arguments for:\n\n{listed}"
    notes: dict[str, int] = {}
    table = table_of(
        COLUMNS,
        {
            feature: [words(cell, notes) for cell in cells(rows, feature)]
            for feature in features_of({name: rows})
        },
    )
    listed = "\n".join(f"{number}. {message}" for message, number in notes.items())
    return f"{title}\n\n{table}" + (f"\n\n{listed}" if listed else "")


def words(cell: Cell, notes: dict[str, int]) -> str:
    """A cell in words; forward and gradients apart where they differ in kind."""
    said = list(dict.fromkeys(_verdict(row, notes) for row in cell))
    if len({row["kind"] for row in cell}) > 1:
        return "; ".join(f"{row['what']} {_verdict(row, notes)}" for row in cell)
    if len(said) > 1:
        worst = max(cell, key=lambda row: float(row.get("of_allowed", 0.0)))
        return _verdict(worst, notes)
    return "".join(said)


def _verdict(row: Row, notes: dict[str, int]) -> str:
    text = row["kind"]
    if "of_allowed" in row:
        share = float(row["of_allowed"])
        text += f" {share:.3g}" if math.isfinite(share) else ", not finite"
        text += f" ({row['tensor']})" if row["kind"] != RIGHT else ""
    remarks = [row[key] for key in ("message", "how") if key in row]
    return text + "".join(f" [{notes.setdefault(said, len(notes) + 1)}]" for said in remarks)
