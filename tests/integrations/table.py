"""The table of families in docs/hugging-face.md, from the outcomes of a run."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from against_eager import SCENARIOS
from families import FAMILIES

BEGIN, END = "<!-- written by make integrations -->", "<!-- end -->"


def write_table(page: Path, outcomes: Mapping[tuple[str, str], Sequence[bool]]) -> None:
    """Replace what stands between the marks of a page by what was found.

    Args:
        page: the Markdown file.
        outcomes: of each family and scenario, whether each dtype passed.
    """
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n{_lines(outcomes)}\n{END}{after}")


def _lines(outcomes: Mapping[tuple[str, str], Sequence[bool]]) -> str:
    head = ("family", "class", "what its attention has", *SCENARIOS)
    rows = [head, ("---",) * len(head)]
    for name, family in FAMILIES.items():
        cells = [_word(outcomes.get((name, scenario), ())) for scenario in SCENARIOS]
        rows.append((f"`{name}`", f"`{family.model}`", family.has, *cells))
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return f"With transformers {version('transformers')} and torch {version('torch')}:\n\n{table}"


def _word(passed: Sequence[bool]) -> str:
    if not passed:
        return ""
    return "yes" if all(passed) else "**no**"
