"""Private names of torch and Triton exist, have their reasons, and stand in kernels/private.py."""

import ast
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_layers import FILES

from fastattn.kernels.private import NAMES, OVERRIDDEN, missing_names

HERE = "fastattn.kernels.private"

# What is private in other libraries, as transformers, stands in a file of its integration's;
# tests/integrations say whether it is still there.
OF_OTHERS = {"fastattn.integrations.transformers.private"}

TREES = {module: ast.parse(path.read_text()) for module, path in FILES.items()}


def names_in(text: str) -> set[str]:
    """The words of a text that begin with one underscore."""
    return set(re.findall(r"(?<![\w])_[a-zA-Z]\w*", text))


def own_names() -> set[str]:
    """What files of ours define: functions, classes, variables and attributes."""
    found: set[str] = set()
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                # Only on `self`: others may be torch's, as in kernels/private.py.
                if isinstance(node.value, ast.Name) and node.value.id == "self":
                    found.add(node.attr)
            elif isinstance(node, ast.ImportFrom) and (node.level or module == HERE):
                found.update(alias.name.rpartition(".")[2] for alias in node.names)
    return found


THEIRS = {
    name
    for kind in (torch.nn.Module(), torch.Tensor, torch.autograd.Function, torch._C)
    for name in dir(kind)
} | set().union(*map(names_in, NAMES))

# With Python's own: those of named tuples only look private, lest a field has the name.
OURS = (own_names() - THEIRS) | {"_getframe", "_asdict", "_fields", "_make", "_replace"}

# Parts of Triton that are not private by their names, and change as if they were.
TRITONS = ("triton.compiler.", "triton.knobs.", "triton.runtime.driver")


def private_names(tree: ast.AST) -> Iterator[str]:
    """What a file uses of others that begins with an underscore."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Attribute):
            names = [node.attr]
            if ast.unparse(node).startswith(TRITONS):
                yield ast.unparse(node)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module != "__future__":
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        for name in names:
            if name.startswith("_") and not name.startswith("__") and name not in OURS:
                yield name


def overriding(tree: ast.AST) -> set[str]:
    """The methods that classes of a file define again, as they may."""
    defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    return defined & set(OVERRIDDEN)


def test_none_is_missing_in_the_installed_versions():
    missing = {name: NAMES[name] for name in missing_names()}
    assert not missing, f"torch {torch.__version__} has no {missing}"


def test_a_missing_name_is_told(monkeypatch):
    monkeypatch.setitem(NAMES, "torch._C._no_such_name", "")
    assert missing_names() == ["torch._C._no_such_name"]


@pytest.mark.parametrize("name", NAMES)
def test_each_has_its_reason_in_a_sentence(name):
    assert NAMES[name].endswith(".")


@pytest.mark.parametrize("module", sorted(FILES.keys() - {HERE} - OF_OTHERS))
def test_no_other_file_uses_any(module):
    found = sorted(set(private_names(TREES[module])) - overriding(TREES[module]))
    assert not found, f"{module} uses {found}; see kernels/private.py"


def test_what_is_used_there_is_listed():
    listed = set().union(*map(names_in, NAMES))
    names = {name for name in private_names(TREES[HERE]) if name.startswith("_")}
    assert names <= listed


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from torch._C import _is_tracing", ["_C", "_is_tracing"]),
        ("import torch._dynamo", ["_dynamo"]),
        ("def f(module):\n    return module._forward_hooks", ["_forward_hooks"]),
        ("torch._C._nn.linear(x)", ["_C", "_nn"]),
        ("self._modules", ["_modules"]),
        ("triton.knobs.runtime", ["triton.knobs.runtime"]),
        ("from ._version import __version__\nself.__class__", []),
    ],
)
def test_uses_are_found(source: str, expected: list[Any]):
    assert sorted(private_names(ast.parse(source))) == expected
