"""README's examples run, its files exist, and its table knows every op."""

import re
from pathlib import Path

import pytest

from fastattn.ops.catalog import OPERATIONS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_there_are_three_quick_starts():
    assert len(EXAMPLES) == 3


@pytest.mark.parametrize("example", EXAMPLES, ids=["module", "function", "model"])
def test_quick_start_runs(example):
    exec(compile(example, "README.md", "exec"), {})


def test_links_lead_to_files():
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", README):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("name", OPERATIONS)
def test_table_has_every_op(name):
    assert re.search(rf"^\|.*`{name}`.*\|$", README, flags=re.MULTILINE)


def test_make_targets_that_are_named_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`?make ([a-z]+)", README)):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_it_stays_readable_in_five_minutes():
    assert len(README.splitlines()) < 300
