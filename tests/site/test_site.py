"""The site that `make docs` built: its links lead somewhere, and its search finds every op."""

import importlib
import json
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

import fastattn
from fastattn.ops.core.catalog import OPERATIONS

SITE = Path(__file__).parents[2] / "build" / "site"


class Page(HTMLParser):
    """What a page links to, and what can be linked to in it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.links: list[str] = []
        self.sources: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep the links and the anchors of a tag."""
        of = dict(attrs)
        self.links += [link for name in ("href", "src") if (link := of.get(name))]
        self.sources += [link for link in (of.get("src"),) if link]
        self.anchors |= {anchor for name in ("id", "name") if (anchor := of.get(name))}


@pytest.fixture(scope="module")
def pages() -> dict[Path, Page]:
    """Every page but that for what is not found, which has absolute links."""
    paths = [path for path in SITE.rglob("*.html") if path.name != "404.html"]
    assert paths, "make docs builds the site"
    return {path.resolve(): Page(path) for path in paths}


@pytest.fixture(scope="module")
def titles() -> set[str]:
    """Of the entries of the search index, without what stands behind a name, as "dataclass"."""
    index = json.loads((SITE / "search" / "search_index.json").read_text())
    return {entry["title"].partition(" ")[0] for entry in index["docs"]}


def test_links_lead_somewhere(pages):
    lost = []
    for page in pages.values():
        for link in page.links:
            target, _, anchor = unquote(link).partition("#")
            if ":" in target or target.startswith("//"):
                continue
            path = (page.path.parent / target).resolve() if target else page.path.resolve()
            path = path / "index.html" if path.is_dir() else path
            if not path.exists() or (anchor and anchor not in pages[path].anchors):
                lost.append(f"{page.path.relative_to(SITE)}: {link}")
    assert not lost


def test_pages_ask_no_other_server_for_anything(pages):
    pictures = [link for page in pages.values() for link in page.sources]
    assert pictures
    assert not [link for link in pictures if link.startswith(("http:", "https:", "//"))]


def test_search_finds_every_op(titles):
    assert len(OPERATIONS) > 20
    assert {f"fastattn.{name}" for name in OPERATIONS} <= titles


@pytest.mark.parametrize("module", ["nn", "functional", "losses", "patching"])
def test_search_finds_every_name_of_a_module(titles, module):
    module = importlib.import_module(f"fastattn.{module}")
    names = getattr(module, "__all__", None) or [
        name for name, value in vars(module).items() if callable(value) and name[0] != "_"
    ]
    assert {f"{module.__name__}.{name}" for name in names} <= titles


def test_the_site_has_a_page_of_every_document(pages):
    docs = Path(fastattn.__file__).parents[1] / "docs"
    built = {path.parent.name for path in pages}
    assert {path.stem for path in docs.glob("*.md")} <= built
    assert {path.stem for path in (docs / "examples").glob("*.py")} <= built
