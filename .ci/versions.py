"""A smoke part of the suite with the oldest, the pinned and the newest PyTorch and Triton.

    make versions                        # under every Python that is there
    make versions ARGS='oldest newest'   # these alone

Each runs in a clean environment in .venv-versions, which is removed afterwards; what came of it is
a row of the table in docs/versions.md. Rows of what was not run stay as they are.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "versions.md"
FOLDER = ROOT / ".venv-versions"
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
INSTALLED = {
    # Triton's interpreter of that time needs an older NumPy.
    "oldest": ["torch==2.10.*", "triton==3.6.*", "numpy<2.4"],
    "pinned": ["-c", str(ROOT / "constraints.txt"), "torch", "triton", "numpy"],
    "newest": ["torch", "triton", "numpy"],
}
TOOLS = ["hypothesis", "pytest", "pytest-timeout", "safetensors", "setuptools"]

PARTS = {
    "reference": (
        {},
        ["tests/test_import.py", "tests/nn", "tests/models", "tests/losses", "tests/generation"],
        ["-m", "not kernels and not slow"],
    ),
    "kernels": (
        {"TRITON_INTERPRET": "1"},
        ["tests/ops/test_every_op.py"],
        ["-m", "kernels and not slow", "-k", "accuracy_rule or opcheck or autocast"],
    ),
}
"""What is run of the reference backend, and of kernels in Triton's interpreter."""


def find_python(version: str) -> str | None:
    """The interpreter of a version of Python, if it is there."""
    if version == f"{sys.version_info.major}.{sys.version_info.minor}":
        return sys.executable
    command = shutil.which(f"python{version}")
    # pyenv has commands that fail, of versions that are installed and not chosen.
    if command and subprocess.run([command, "-c", ""], capture_output=True).returncode == 0:
        return command
    return None


def run_part(python: Path, part: str) -> str:
    """What came of a part: how many passed, and the names of those that failed."""
    environment, files, options = PARTS[part]
    keep = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    keep |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    command = [str(python), "-m", "pytest", "-q", "--timeout", "300", *files, *options]
    output = subprocess.run(
        command, cwd=ROOT, env=keep, capture_output=True, text=True, check=False
    ).stdout
    print(output[-2000:])
    passed = re.search(r"(\d+) passed", output)
    failed = re.findall(
        r"^(?:FAILED|ERROR) [\w/]*?(test_\w+)\.py(?:::([\w:\[\]-]+))?", output, re.M
    )
    said = f"{passed[1] if passed else 'none'} passed"
    return said + "".join(f"; `{file}::{name}` failed" for file, name in failed)


def try_versions(name: str, version: str) -> list[str]:
    """Install and run: the cells of a row."""
    python = find_python(version)
    if python is None:
        return ["", "", "no such Python here", ""]
    environment = FOLDER / f"{name}-{version}"
    try:
        subprocess.run([python, "-m", "venv", "--clear", str(environment)], check=True)
        inside = environment / "bin" / "python"
        install = [str(inside), "-m", "pip", "install", "--quiet", "--no-cache-dir"]
        if subprocess.run([*install, *INSTALLED[name], *TOOLS], check=False).returncode:
            return ["", "", "could not be installed", ""]
        tell = "import importlib.metadata as m; print(m.version('torch'), m.version('triton'))"
        versions = subprocess.check_output([str(inside), "-c", tell], text=True).split()
        return [*versions, *(run_part(inside, part) for part in PARTS)]
    finally:
        shutil.rmtree(environment, ignore_errors=True)


def read_rows(page: str) -> dict[tuple[str, str], list[str]]:
    """The rows of the table, by what was installed and the Python."""
    rows = {}
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 6 and cells[0] in INSTALLED:
            rows[cells[0], cells[1]] = cells[2:]
    return rows


def write_rows(page: str, rows: dict[tuple[str, str], list[str]]) -> str:
    """The page with another table."""
    lines = [
        "| versions | Python | torch | triton | reference | kernels |",
        "|---|---|---|---|---|---|",
    ]
    for name in INSTALLED:
        for version in PYTHONS:
            cells = rows.get((name, version), ["", "", "not run", "not run"])
            lines.append("| " + " | ".join([name, version, *cells]) + " |")
    table = "\n".join(["<!-- written by make versions -->", *lines, "<!-- end -->"])
    return re.sub(
        r"<!-- written by make versions -->.*<!-- end -->", lambda _: table, page, flags=re.S
    )


def main() -> int:
    """Run what was asked for, and write each row as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(INSTALLED), metavar="|".join(INSTALLED))
    parser.add_argument("--python", choices=PYTHONS, action="append", help="all that are there")
    arguments = parser.parse_args()
    failed = False
    for name in arguments.names:
        for version in arguments.python or filter(find_python, PYTHONS):
            print(f"{name}, Python {version}", flush=True)
            cells = try_versions(name, version)
            print(*cells, sep="\n", flush=True)
            failed |= (
                any("failed" in cell or "none passed" in cell for cell in cells) or not cells[0]
            )
            page = PAGE.read_text()
            PAGE.write_text(write_rows(page, read_rows(page) | {(name, version): cells}))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
