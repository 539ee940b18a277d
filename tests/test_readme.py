"""README's examples run, its files exist, and its table knows every op."""

import re
from pathlib import Path

import pytest

from fastattn.ops.core.catalog import OPERATIONS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
# Those that define kernels are run in tests/ops/test_attention_plug_ins.py.
EXAMPLES = [block for block in BLOCKS if "@triton.jit" not in block]


def test_there_are_three_quick_starts():
    assert len(EXAMPLES) == 3


@pytest.mark.parametrize("example", EXAMPLES, ids=["module", "function", "model"])
def test_quick_start_runs(example):
    exec(compile(example, "README.md", "exec"), {})


def test_links_lead_to_files():
    headings = re.findall(r"^#+ (.*)$", README, flags=re.MULTILINE)
    anchors = {f"#{heading.lower().replace(' ', '-')}" for heading in headings}
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", README):
        assert target in anchors or (ROOT / target).exists(), target


@pytest.mark.parametrize("name", OPERATIONS)
def test_table_has_every_op(name):
    assert re.search(rf"^\|.*`{name}`.*\|$", README, flags=re.MULTILINE)


def test_make_targets_that_are_named_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`?make ([a-z]+)", README)):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_it_stays_readable_in_five_minutes():
    assert len(README.splitlines()) < 300
