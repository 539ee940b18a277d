"""The site in a Chromium, where one is installed: three pages, pictures of them, and a search."""

import contextlib
import functools
import struct
import threading
import zlib
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from chromium import Chromium, find_chromium

BUILD = Path(__file__).parents[2] / "build"
SITE = BUILD / "site"
PICTURES = BUILD / "screenshots"

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="no Chromium is installed")


class Quiet(SimpleHTTPRequestHandler):
    """A server that prints nothing."""

    def log_message(self, format: str, *args: object) -> None:
        """Leave it."""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Where the site is served: a page cannot search in files."""
    assert SITE.is_dir(), "make docs builds the site"
    handler = functools.partial(Quiet, directory=str(SITE))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    """One for all tests."""
    path = find_chromium()
    assert path
    with contextlib.closing(Chromium(path)) as chromium:
        yield chromium


def bytes_of(picture: bytes) -> tuple[int, int, set[int]]:
    """The width and height of a PNG, and which bytes its lines hold: few in one of one colour."""
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    place, width, height, lines = 8, 0, 0, b""
    while place < len(picture):
        length, kind = struct.unpack(">I4s", picture[place : place + 8])
        content = picture[place + 8 : place + 8 + length]
        if kind == b"IHDR":
            width, height = struct.unpack(">II", content[:8])
        lines += content if kind == b"IDAT" else b""
        place += 12 + length
    return width, height, set(zlib.decompress(lines))


@pytest.mark.parametrize(
    ("page", "title"),
    [("", "fastattn"), ("attention", "Attention"), ("api/fastattn", "fastattn")],
)
def test_a_page_opens(browser, address, page, title):
    browser.open(f"{address}/{page}")
    assert browser.evaluate("document.querySelector('h1').firstChild.textContent") == title
    # The theme's styles and scripts are there: its header stays, and its search has been set up.
    header = "getComputedStyle(document.querySelector('.md-header')).position"
    assert browser.evaluate(header) == "sticky"
    assert browser.faults(address) == []
    picture = browser.take_screenshot()
    PICTURES.mkdir(exist_ok=True)
    (PICTURES / f"{page.replace('/', '-') or 'index'}.png").write_bytes(picture)
    width, height, held = bytes_of(picture)
    assert width >= 1000
    assert height >= 600
    assert len(held) > 100


def test_a_search_finds_an_op_and_leads_there(browser, address):
    browser.open(address)
    browser.wait_for("Boolean(document.querySelector('[data-md-component=search-query]'))")
    browser.evaluate("document.querySelector('[data-md-component=search-query]').focus()")
    browser.send("Input.insertText", text="linear_cross_entropy")
    links = browser.wait_for(
        "[...document.querySelectorAll('.md-search-result__link')].map(link => link.href)"
        ".filter(link => link.includes('#fastattn.linear_cross_entropy'))[0]"
    )
    (PICTURES / "search.png").write_bytes(browser.take_screenshot())
    browser.open(links)
    found = "document.getElementById('fastattn.linear_cross_entropy')"
    assert "linear_cross_entropy" in browser.evaluate(f"{found}.textContent")
    assert browser.evaluate(f"{found}.getBoundingClientRect().top < innerHeight")
