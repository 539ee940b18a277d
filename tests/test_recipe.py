"""docs/adding-an-op.md is true: its six pieces make an op, on which the generated tests pass."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastattn.ops.core.backends import HAS_TRITON, INTERPRETED

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "adding-an-op.md").read_text()
FILES = dict(re.findall(r"```python file=(\S+)\n(.*?)```", PAGE, flags=re.DOTALL))
LINES = dict(re.findall(r"```python line=(\S+)\n(.*?)```", PAGE, flags=re.DOTALL))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(INTERPRETED or not HAS_TRITON, reason="starts processes with the kernels"),
]


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository in which the page has been followed."""
    copy = tmp_path_factory.mktemp("recipe")
    for part in ("bench", "docs", "fastattn", "kernels", "tests"):
        ignored = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(ROOT / part, copy / part, symlinks=True, ignore=ignored)
    for name in ("CONTRIBUTING.md", "Makefile", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, copy)
    for name, text in FILES.items():
        assert not (copy / name).exists(), name
        (copy / name).write_text(text)
    for name, line in LINES.items():
        with (copy / name).open("a") as file:
            file.write(line)
    return copy


def run(copy: Path, *command: str, interpret: bool = False) -> str:
    """What a command of Python prints in the copy."""
    environment = {**os.environ, "PYTHONPATH": str(copy)}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=copy,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_tests(copy: Path, *arguments: str, interpret: bool = False) -> str:
    """The same of its tests."""
    options = ("-q", "-p", "no:xdist", "-p", "no:cacheprovider")
    return run(copy, "pytest", *options, *arguments, interpret=interpret)


def test_there_are_six_pieces():
    assert len(FILES) + len(LINES) == 6
    assert all(len(text.splitlines()) == 1 for text in LINES.values())


def test_the_generated_tests_pass(followed: Path):
    passed = run_tests(
        followed,
        *("tests/ops", "tests/bench/test_traffic.py", "tests/compiled"),
        *("-m", "kernels", "-k", "squared_relu"),
        interpret=True,
    )
    assert int(re.findall(r"(\d+) passed", passed)[0]) > 60


def test_the_tests_of_the_whole_tree_take_it(followed: Path):
    run_tests(
        followed,
        *("tests/test_layers.py", "tests/test_private_names.py", "tests/ops/test_kernel_ops.py"),
        *("tests/nn/test_fx.py", "tests/ops/test_export.py"),
        *("tests/bench/test_registry.py", "tests/compiled", "tests/ops/test_squared_relu.py"),
        *("-m", "not kernels", "-k", "squared_relu or test_every_file_of_ops_has_an_entry"),
    )


def test_the_check_knows_it(followed: Path):
    assert "all passed" in run(followed, "fastattn", "check", "--quick", "--op", "squared_relu")


def test_it_is_linted(followed: Path):
    pytest.importorskip("ruff")
    names = [*FILES, *LINES]
    run(followed, "ruff", "check", *names)
    run(followed, "ruff", "format", "--check", *names)
