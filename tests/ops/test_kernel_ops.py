"""Every declared op has the parameters of its launcher, and says in which file that is."""

import ast
import inspect
import typing
from pathlib import Path
from typing import Any

import pytest

import fastattn  # noqa: F401
from fastattn.ops.core.backends import HAS_TRITON
from fastattn.ops.core.lazy_imports import LazyFunction, find
from fastattn.ops.core.registration import KERNEL_OPS, KernelOp

ROOT = Path(__file__).parents[2]
OPS = [pytest.param(op, id=name) for name, op in KERNEL_OPS.items()]
OF_KERNELS = [
    pytest.param(op, id=name)
    for name, op in KERNEL_OPS.items()
    if isinstance(op.launcher, LazyFunction)
]


def kind(annotation: Any) -> Any:
    """An annotation as an op's schema knows it: one of a few words is a string."""
    if typing.get_origin(annotation) is typing.Literal:
        return type(typing.get_args(annotation)[0])
    return annotation


@pytest.mark.skipif(not HAS_TRITON, reason="launchers need Triton")
@pytest.mark.parametrize("op", OPS)
def test_a_declaration_has_the_parameters_and_the_result_of_its_launcher(op: KernelOp):
    declared, launched = (
        inspect.signature(function, eval_str=True)
        for function in (op.declaration, find(op.launcher))
    )
    parameters = list(launched.parameters.values())
    count = len(declared.parameters)
    assert [(p.name, p.annotation) for p in declared.parameters.values()] == [
        (p.name, kind(p.annotation)) for p in parameters[:count]
    ]
    assert declared.return_annotation == launched.return_annotation
    # What a launcher takes beside it has a default, and is for those who call it directly.
    assert all(p.default is not p.empty for p in parameters[count:])


def imported(tree: ast.Module, package: str) -> dict[str, str]:
    """The modules of ours that a file imports for type checkers, by the names it gives them."""
    (block,) = (
        node for node in tree.body if isinstance(node, ast.If) and is_for_type_checkers(node)
    )
    found = {}
    for statement in block.body:
        assert isinstance(statement, ast.ImportFrom)
        if statement.level == 0:
            continue
        start = ".".join(package.split(".")[: len(package.split(".")) - statement.level + 1])
        for alias in statement.names:
            found[alias.asname or alias.name] = f"{start}.{statement.module}.{alias.name}"
    return found


def made_lazy(tree: ast.Module) -> dict[str, str]:
    """The modules that a file makes lazy, by the names it gives them."""
    return {
        node.targets[0].id: node.value.args[0].value  # type: ignore[attr-defined]
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("lazy_module(")
    }


def is_for_type_checkers(node: ast.If) -> bool:
    return ast.unparse(node.test) == "TYPE_CHECKING"


@pytest.mark.parametrize("op", OF_KERNELS)
def test_an_editor_follows_a_declaration_to_the_launcher_that_runs(op: KernelOp):
    tree = ast.parse(Path(inspect.getfile(op.declaration)).read_text())
    assert imported(tree, op.declaration.__module__.rpartition(".")[0]) == made_lazy(tree)


@pytest.mark.parametrize("op", OF_KERNELS)
def test_a_docstring_names_the_file_of_the_launcher(op: KernelOp):
    assert isinstance(op.launcher, LazyFunction)
    path = op.launcher.module.removeprefix("fastattn.").replace(".", "/") + ".py"
    assert (ROOT / path).is_file()
    assert path in (op.declaration.__doc__ or "")
