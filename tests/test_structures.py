"""Bars: files are short; kernels and ops have few parameters, and few lines that are one name."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
KERNELS = sorted((ROOT / "kernels").rglob("*.py"))
LIBRARY = sorted((ROOT / "fastattn").rglob("*.py"))
OPS = sorted((ROOT / "fastattn" / "ops").rglob("*.py"))

MOST_PARAMETERS = 20
MOST_LINES = 350
LARGEST_SHARE = 0.12

PUBLIC = {"attention_varlen": "its options are the user's"}

MORE_PARAMETERS = {
    "attention_backward": "registered ops take flat arguments: each tensor and option by itself",
    "attention_hopper_keys_backward_kernel": "each chunk of a tensor's columns has a descriptor",
    "attention_hopper_queries_backward_kernel": "the same",
}
"""Functions with more than MOST_PARAMETERS, and why."""

MORE_LINES = {
    "fastattn/machine/movement.py": "one list of instructions, each a few lines by itself",
}
"""Files with more than MOST_LINES, and why."""

ONE_NAME = re.compile(r'^\s*"?\w+"?(: tl\.constexpr)?,$')


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Each function of a file with the number of its parameters."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            given = node.args
            yield node.name, len(given.posonlyargs) + len(given.args) + len(given.kwonlyargs)


def test_functions_have_few_parameters():
    found = {
        name
        for path in (*KERNELS, *OPS)
        for name, count in functions(path)
        if count > MOST_PARAMETERS
    }
    assert found == {*PUBLIC, *MORE_PARAMETERS}


def test_files_are_short():
    files = {*KERNELS, *LIBRARY}
    lines = {str(path.relative_to(ROOT)): path.read_text().count("\n") for path in files}
    assert {name for name, count in lines.items() if count > MOST_LINES} <= MORE_LINES.keys()


def test_few_lines_are_one_name():
    lines = [line for path in KERNELS for line in path.read_text().splitlines()]
    assert sum(map(bool, map(ONE_NAME.match, lines))) < LARGEST_SHARE * len(lines)
