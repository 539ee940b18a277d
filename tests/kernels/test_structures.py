"""Bars for kernels and ops: few parameters, few lines that are one name, and short files."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = sorted((ROOT / "kernels").rglob("*.py"))
OPS = sorted((ROOT / "fastattn" / "ops").rglob("*.py"))

MOST_PARAMETERS = 20
MOST_LINES = 350
LARGEST_SHARE = 0.12

PUBLIC = {"attention_varlen": "its options are the user's"}

MORE_PARAMETERS = {
    "attention_backward": "registered ops take flat arguments: each tensor and option by itself",
    "compute_tile": "not rebuilt yet",
    "cross_entropy_backward_kernel": "not rebuilt yet",
    "cross_entropy_forward_kernel": "not rebuilt yet",
    "gated_linear_backward_kernel": "not rebuilt yet",
    "gated_linear_forward_kernel": "not rebuilt yet",
    "matmul_kernel": "not rebuilt yet",
    "norm_backward_kernel": "not rebuilt yet",
    "norm_forward_kernel": "not rebuilt yet",
    "norm_forward_wide_kernel": "not rebuilt yet",
    "rotary_kernel": "not rebuilt yet",
}
"""Functions with more than MOST_PARAMETERS, and why."""

LONGER_FILES = {
    "kernels/attention/config.py": "a table of tiles",
    "kernels/cross_entropy.py": "not rebuilt yet",
    "kernels/matmul/gated_linear.py": "not rebuilt yet",
    "kernels/matmul/matmul.py": "not rebuilt yet",
    "kernels/norm/backward.py": "not rebuilt yet",
    "kernels/norm/forward.py": "not rebuilt yet",
}
"""Files of more than MOST_LINES, and why."""

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
    lines = {str(path.relative_to(ROOT)): path.read_text().count("\n") for path in KERNELS}
    assert {name for name, count in lines.items() if count > MOST_LINES} == {*LONGER_FILES}


@pytest.mark.parametrize(
    ("folder", "share"), [("attention", LARGEST_SHARE), ("", 0.15)], ids=["attention", "all"]
)
def test_few_lines_are_one_name(folder, share):
    inside = [path for path in KERNELS if path.is_relative_to(ROOT / "kernels" / folder)]
    lines = [line for path in inside for line in path.read_text().splitlines()]
    assert sum(map(bool, map(ONE_NAME.match, lines))) / len(lines) < share
