"""Imports point down only: every import statement of the package is held against its layers.

    __main__, commands, demo, generation, models, integrations -> nn -> functional -> ops
    ops -> kernels, reference

`checking`, `interpreter` and `losses` stand beside `functional`, `patching` above `nn`, and
`machine`, which executes compiled kernels and knows none of them, beside everything. The statements
are read from the syntax tree, so an import inside a function counts as much as one at the top of a
file. What is loaded by its name when a user first needs it is none: `patching.libraries` does so
with integrations, and the package with what `fastattn._LATER` lists of the layers above it.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import fastattn

ROOT = Path(__file__).parents[1]

TOP = {"__main__", "commands", "demo", "generation", "integrations", "models"}
BELOW_TOP = {
    "__init__",
    "checking",
    "functional",
    "interpreter",
    "kernels",
    "losses",
    "machine",
    "nn",
    "ops",
    "patching",
    "reference",
    "terms",
}

# For each layer, the layers that it may import from. `__init__` is the package's own namespace.
MAY_IMPORT = {
    **dict.fromkeys(TOP, TOP | BELOW_TOP),
    "__init__": {"functional", "losses", "nn", "ops", "patching", "reference"},
    "terms": {"ops", "kernels"},
    "patching": {"patching", "nn", "functional", "ops", "kernels", "reference"},
    "nn": {"nn", "functional", "ops", "kernels", "reference"},
    "functional": {"functional", "ops", "kernels", "reference"},
    "losses": {"losses", "ops"},
    "checking": {"checking", "ops", "reference"},
    "interpreter": {"ops", "kernels"},
    "machine": {"machine", "kernels"},
    "ops": {"ops", "kernels", "reference"},
    "kernels": {"kernels"},
    "reference": {"reference"},
    "_version": set(),
}

# The one list of names, which the package and fastattn.ops take as a whole.
PUBLIC_NAMES = "fastattn.ops.public"

# What editors are told to be in ours besides; a module's `__getattr__` gives these names.
TORCHS_NAMES = ("torch.nn", "torch.nn.functional")


class Import(NamedTuple):
    """One imported module, by its absolute dotted name."""

    target: str
    line: int
    relative: bool
    at_module_level: bool
    wildcard: bool


def walk_imports(source: str, module: str, is_package: bool = False) -> Iterator[Import]:
    """Yield every import of a module's source, however deep in the code it stands."""
    package = module.split(".") if is_package else module.split(".")[:-1]

    def visit(node: ast.AST, at_module_level: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, False, at_module_level, False)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, node.module] if node.module else start)
            for alias in node.names:
                wildcard = alias.name == "*"
                # `from fastattn import ops` names a layer, and `from fastattn.ops import x` does
                # not need x to be told one.
                target = base if wildcard or base != "fastattn" else f"{base}.{alias.name}"
                yield Import(target, node.lineno, node.level > 0, at_module_level, wildcard)
        inside_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, at_module_level and not inside_function)

    yield from visit(ast.parse(source), True)


def layer_of(module: str) -> str:
    """The layer of a module of fastattn; a name that the package itself offers is `__init__`'s."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in MAY_IMPORT else "__init__"


def fault(item: Import, layer: str) -> str | None:
    """What is wrong with one import in a layer, or None."""
    name = item.target.partition(".")[0]
    target_layer = layer_of(item.target)
    if item.wildcard and item.target not in (PUBLIC_NAMES, *TORCHS_NAMES):
        return "a wildcard import hides where names come from"
    if name == "kernels":
        return "the import name is fastattn.kernels"
    if name == "fastattn" and target_layer not in MAY_IMPORT[layer] | {"_version"}:
        return f"{layer} may not import from {target_layer}"
    if name == "fastattn" and layer == "kernels" and not item.relative:
        return "kernels import each other relatively"
    if name == "triton" and layer not in ("kernels", "machine") and item.at_module_level:
        return "only kernels and the machine may import triton at module level"
    if name in sys.stdlib_module_names | {"fastattn", "torch", "triton"} or layer in TOP:
        return None
    # For type checkers alone; torch itself depends on it.
    if name == "typing_extensions" and layer == "ops":
        return None
    if name == "numpy" and layer == "machine":
        return None
    return "the core may import torch and triton only"


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """Say in words what is wrong with the imports of one module's source."""
    layer = layer_of(module)
    found = ((item, fault(item, layer)) for item in walk_imports(source, module, is_package))
    return [f"{module}:{item.line}: {item.target}: {text}" for item, text in found if text]


def package_files() -> Iterator[tuple[str, Path]]:
    """Every module of the package with its file; the kernels in their real folder."""
    linked = ROOT / "fastattn" / "kernels"
    for path in sorted([*(ROOT / "fastattn").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]):
        if not path.is_relative_to(linked):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts if parts[0] == "fastattn" else ("fastattn", *parts))
            yield name.removesuffix(".__init__"), path


FILES = dict(package_files())


@pytest.mark.parametrize("module", FILES)
def test_imports_point_down(module: str):
    path = FILES[module]
    assert module == "fastattn" or module.split(".")[1] in MAY_IMPORT, (
        f"{module} belongs to no layer; say in MAY_IMPORT where it stands"
    )
    assert violations(path.read_text(), module, path.name == "__init__.py") == []


def test_every_part_is_walked():
    assert {"fastattn", "fastattn._version"} <= FILES.keys()
    layers = {layer_of(module) for module in FILES}
    assert {"kernels", "ops", "reference", "nn", "functional"} <= layers


def test_only_the_layers_above_are_imported_later():
    assert {layer_of(module) for module in fastattn._LATER.values()} <= TOP
    program = """
import sys, fastattn
assert not [name for name in sys.modules if name.startswith("fastattn.models")]
assert fastattn.models.from_pretrained
assert not hasattr(fastattn, "something_else")
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("fastattn.ops.a", "from ..functional import f", "ops may not import from functional"),
        ("fastattn.ops.a", "from .. import nn", "ops may not import from nn"),
        ("fastattn.ops.a", "from .. import backend", "ops may not import from __init__"),
        ("fastattn.ops.a", "def f():\n    import fastattn.nn", "ops may not import from nn"),
        ("fastattn.functional", "from .nn import RMSNorm", "functional may not import from nn"),
        ("fastattn.functional", "from . import checking", "may not import from checking"),
        ("fastattn.nn.a", "from ..models import llama", "nn may not import from models"),
        ("fastattn.checking", "from .functional import f", "may not import from functional"),
        ("fastattn.reference.a", "from ..ops import a", "reference may not import from ops"),
        ("fastattn.reference.a", "import numpy", "may import torch and triton only"),
        ("fastattn.kernels.a", "from ..ops import backends", "kernels may not import from ops"),
        ("fastattn.kernels.a", "from fastattn.kernels.common import f", "relatively"),
        ("fastattn.kernels.a", "import numpy as np", "may import torch and triton only"),
        ("fastattn.ops.a", "import triton.language as tl", "only kernels and the machine"),
        ("fastattn.ops.a", "try:\n    import triton\nfinally:\n    pass", "only kernels"),
        ("fastattn.ops.a", "from ..machine import driver", "ops may not import from machine"),
        ("fastattn.machine.a", "from ..ops import a", "machine may not import from ops"),
        ("fastattn.ops.a", "from kernels import common", "the import name is fastattn.kernels"),
        ("fastattn.nn.a", "from torch.nn.modules import *", "wildcard"),
    ],
)
def test_checker_finds_violations(module: str, source: str, expected: str):
    (found,) = violations(source, module)
    assert expected in found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fastattn.__main__", "from .commands import info\nimport rich"),
        ("fastattn.models.llama", "from .. import nn, functional, backend"),
        ("fastattn.nn.a", "from ..ops.a import a\nfrom . import b\nimport torch.nn"),
        ("fastattn.ops.a", "def f():\n    import triton\n    from ..kernels import a"),
        ("fastattn.kernels.a", "import math\nimport triton\nimport torch\nfrom .b import c"),
        ("fastattn.machine.a", "import numpy as np\nimport triton\nfrom .b import c"),
        ("fastattn.reference.a", "import torch\nfrom .b import c"),
    ],
)
def test_checker_accepts_what_is_allowed(module: str, source: str):
    assert violations(source, module) == []


def test_checker_resolves_relative_imports_of_a_package():
    assert violations("from .ops import a\nfrom ._version import b", "fastattn", True) == []
    assert violations("from .commands import a", "fastattn", True)
    assert violations("from ..nn import a", "fastattn.ops", True)


def test_the_list_of_public_names_may_be_taken_as_a_whole():
    assert violations("from .public import *", "fastattn.ops", True) == []
    assert violations("from .softmax import *", "fastattn.ops", True)
