"""README and docs/: their examples run, their links lead somewhere, and README invites."""

import importlib
import re
from pathlib import Path

import pytest

import fastattn

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

# Those that define kernels need a file of their own: tests/ops/test_attention_plug_ins.py runs
# those of terms.md.
EXAMPLES = [
    pytest.param(block, id=f"{page.name}-{place}")
    for page in PAGES
    for place, block in enumerate(
        re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    )
    if "import triton" not in block
]


@pytest.mark.parametrize("example", EXAMPLES)
def test_example_runs(example: str):
    if "transformers" in example:
        pytest.importorskip("transformers")
    exec(compile(example, "example", "exec"), {})


def anchors_of(page: Path) -> set[str]:
    """The anchors of a page's headings, as Markdown's readers make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
        name, _, anchor = target.partition("#")
        linked = page.parent / name if name else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors_of(linked), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_make_targets_exist(page: Path):
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`make ([a-z]+)", page.read_text())):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_and_tools_exist(page: Path):
    text = page.read_text()
    for path in re.findall(r"`((?:fastattn|kernels|tests|bench|docs)/[\w/.-]*)`", text):
        assert (ROOT / path).exists(), path
    for module in set(re.findall(r"`python -m (bench[\w.]*)", text)):
        folder = ROOT / module.replace(".", "/")
        assert (folder / "__main__.py").exists() or folder.with_suffix(".py").exists(), module


def test_every_page_can_be_found():
    linked = {target for page in PAGES for target in re.findall(r"([\w-]+\.md)", page.read_text())}
    assert {page.name for page in PAGES} <= linked | {README.name}


def test_readme_invites():
    lines = README.read_text().splitlines()
    assert len(lines) <= 150
    assert lines.index("## Install") < 40
    assert all(len(line) <= 160 for line in lines if line.startswith("|"))


def test_names_of_the_table_exist():
    table = re.findall(r"^\| (\[.*?\]\(docs/[^)]*\)) \|", README.read_text(), flags=re.MULTILINE)
    names = [name for cell in table for name in re.findall(r"`([\w.]+)`", cell)]
    assert len(names) > 20
    for name in names:
        if name.startswith("fastattn."):
            importlib.import_module(name)
        else:
            assert hasattr(fastattn, name)
