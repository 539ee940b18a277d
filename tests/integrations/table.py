"""The table of families in docs/hugging-face.md, from the outcomes of a run."""

from collections.abc import Mapping, Sequence, Set
from importlib.metadata import version
from pathlib import Path

from against_eager import SCENARIOS
from families import FAMILIES

PARTS = ("attention", "rotary", "norms", "sums", "MLP", "loss")
"""What `fastattn.patch` may replace of a model."""

BEGIN, END = "<!-- written by make integrations -->", "<!-- end -->"


def write_table(
    page: Path,
    outcomes: Mapping[tuple[str, str], Sequence[bool]],
    parts: Mapping[str, Set[str]],
) -> None:
    """Replace what stands between the marks of a page by what was found.

    Args:
        page: the Markdown file.
        outcomes: of each family and scenario, whether each dtype passed.
        parts: what a patch replaced of each family.
    """
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n{_lines(outcomes, parts)}\n{END}{after}")


def _lines(
    outcomes: Mapping[tuple[str, str], Sequence[bool]], parts: Mapping[str, Set[str]]
) -> str:
    patched = [f"patch: {part}" for part in PARTS]
    head = ("family", "class", "what its attention has", *SCENARIOS, *patched)
    rows = [head, ("---",) * len(head)]
    for name, family in FAMILIES.items():
        cells = [_word(outcomes.get((name, scenario), ())) for scenario in SCENARIOS]
        found, passed = parts.get(name, ()), outcomes.get((name, "patched"), ())
        cells += [_word(passed) if part in found else "" for part in PARTS]
        rows.append((f"`{name}`", f"`{family.model}`", family.has, *cells))
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return f"With transformers {version('transformers')} and torch {version('torch')}:\n\n{table}"


def _word(passed: Sequence[bool]) -> str:
    if not passed:
        return ""
    return "yes" if all(passed) else "**no**"
