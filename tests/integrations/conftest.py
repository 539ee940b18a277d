"""Tests of what joins fastattn to other libraries: `make integrations` runs them, `make test` not.

They need what the extra `integrations` brings. What the tests of families find is written into the
table of docs/hugging-face.md where `--table` names that file.
"""

import os
import sys
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

collect_ignore_glob = [] if find_spec("transformers") else ["test_*.py"]

# Nothing is ever downloaded.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).parent))

from torchvision_import import import_torchvision  # noqa: E402

import_torchvision()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--table`, the page whose table is written anew."""
    parser.addoption("--table", metavar="PAGE", help="write the table of families into this page")


class Table:
    """Collects what the tests of families report, and writes it when all have run."""

    def __init__(self, page: Path) -> None:
        self.page = page
        self.outcomes: dict[tuple[str, str], list[bool]] = defaultdict(list)
        self.parts: dict[str, set[str]] = defaultdict(set)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note the outcome of a test that says which family and scenario it is of."""
        named: dict[str, Any] = dict(report.user_properties)
        if report.when == "call" and "family" in named:
            self.outcomes[named["family"], named["scenario"]].append(report.passed)
            self.parts[named["family"]].update(named.get("parts", ()))

    def pytest_sessionfinish(self) -> None:
        """Write the table between its two marks."""
        from table import write_table

        if self.outcomes:
            write_table(self.page, self.outcomes, self.parts)


def pytest_configure(config: pytest.Config) -> None:
    """Collect outcomes in the process that hears of all of them."""
    page = config.getoption("--table", None)
    if page and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Table(Path(str(page))))
