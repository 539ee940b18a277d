"""Residual sums with the norm after them, in one kernel.

Layers add a branch to its stream and normalize the sum, in one of these ways, with any names:

    hidden = residual + hidden            hidden = attended + hidden      self.norm(hidden + x)
    residual = hidden                     output = self.norm(hidden)
    hidden = self.norm(hidden)

Such statements of a layer's own forward become a call of `add_and_norm`. A sum at a layer's end,
whose norm is the next layer's first, stays.
"""

import ast
import copy
from collections.abc import Iterator
from typing import Any

import torch.nn as nn
from transformers import PreTrainedModel

from ...patching import Rule, make_twin
from ...patching.added_norms import add_and_norm
from ...patching.texts import Forward, read_text, write_forward

SUM = "_fastattn_add_and_norm"
"""What `add_and_norm` is called in a forward made anew."""


class PatchedLayer(nn.Module):
    """A layer of another library, whose sums with a norm after them are one kernel each."""

    @staticmethod
    def rewrite(theirs: type[nn.Module]) -> Forward:
        """The class's forward, with the sums replaced."""
        definition = read_text(theirs.forward)
        assert definition is not None
        changed = _Sums().visit(copy.deepcopy(definition))
        return write_forward(theirs.forward, changed, {SUM: add_and_norm})


def find_sum(module: nn.Module, kind: type[nn.Module]) -> Rule | str | None:
    """The rule for a layer with sums before norms; None if it has none."""
    if type(kind) is not type or isinstance(module, PreTrainedModel):
        return None
    # Positions are broadcast over the batch when they are added to an embedding.
    if any(isinstance(part, nn.Embedding) for part in module.children()):
        return None
    definition = read_text(kind.forward)
    if definition is None:
        return None
    sums = _Sums()
    sums.visit(copy.deepcopy(definition))
    if not any(_is_norm(getattr(module, name, None)) for name in sums.norms):
        return None
    try:
        return Rule(kind, make_twin(kind, PatchedLayer))
    except ValueError as error:
        return f"its forward cannot be made anew: {error}"


def _is_norm(part: Any) -> bool:
    return isinstance(part, nn.LayerNorm | nn.RMSNorm) or "norm" in type(part).__name__.lower()


class _Sums(ast.NodeTransformer):
    """Replaces sums with a norm after them; `norms` has the names of these."""

    def __init__(self) -> None:
        self.norms: list[str] = []

    def generic_visit(self, node: ast.AST) -> ast.AST:
        """Replace runs of statements, wherever they stand, before what is inside of them."""
        for name in ("body", "orelse", "finalbody"):
            statements = getattr(node, name, None)
            if isinstance(statements, list):
                setattr(node, name, list(self.replace(statements)))
        return super().generic_visit(node)

    def replace(self, statements: list[ast.stmt]) -> Iterator[ast.stmt]:
        """The statements, of which some are replaced."""
        rest = list(statements)
        while rest:
            count, replaced = self.match(rest)
            yield from replaced or rest[:1]
            del rest[: count or 1]

    def match(self, statements: list[ast.stmt]) -> tuple[int, list[ast.stmt]]:
        """How many statements at the front are a sum and a norm, and what they become."""
        first = _assigned(statements[0])
        if first is None or not _is_sum(first[1]):
            return 0, []
        total, added = first
        second = _assigned(statements[1]) if len(statements) > 1 else None
        kept = None
        if second is not None and _is_name(second[1], total) and len(statements) > 2:
            kept, second = second[0], _assigned(statements[2])
        if second is None:
            return 0, []
        result, norm = second[0], _called_norm(second[1])
        if norm is None or not _is_name(norm[1], total):
            return 0, []
        if kept in (result, total):
            return 0, []
        self.norms.append(norm[0].attr)
        call = _sum_call(added, norm[0])
        if kept is None and result == total:
            normal = ast.Subscript(call, ast.Constant(0), ast.Load())
            made = ast.Assign([ast.Name(result, ast.Store())], normal)
        else:
            made = ast.Assign([_pair([result, kept or total])], call)
        replaced: list[ast.stmt] = [ast.copy_location(made, statements[0])]
        if kept is not None and result != total:
            # The sum has two names from here on.
            again = ast.Assign([ast.Name(total, ast.Store())], ast.Name(kept, ast.Load()))
            replaced.append(ast.copy_location(again, statements[0]))
        return (2 if kept is None else 3), replaced

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """`self.norm(a + b)`."""
        self.generic_visit(node)
        norm = _called_norm(node)
        if norm is None or not _is_sum(norm[1]):
            return node
        self.norms.append(norm[0].attr)
        first = ast.Subscript(_sum_call(norm[1], norm[0]), ast.Constant(0), ast.Load())
        return ast.copy_location(first, node)


def _assigned(statement: ast.stmt) -> tuple[str, ast.expr] | None:
    """The name and the value of a statement that gives one name a value."""
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        target = statement.targets[0]
        if isinstance(target, ast.Name):
            return target.id, statement.value
    return None


def _is_sum(value: ast.expr) -> bool:
    return isinstance(value, ast.BinOp) and isinstance(value.op, ast.Add)


def _is_name(value: ast.expr, name: str) -> bool:
    return isinstance(value, ast.Name) and value.id == name


def _called_norm(value: ast.expr) -> tuple[ast.Attribute, ast.expr] | None:
    """The part of the layer that is called with one argument, and this."""
    if not isinstance(value, ast.Call) or value.keywords or len(value.args) != 1:
        return None
    part = value.func
    if isinstance(part, ast.Attribute) and _is_name(part.value, "self"):
        return part, value.args[0]
    return None


def _sum_call(added: Any, norm: ast.Attribute) -> ast.Call:
    return ast.Call(ast.Name(SUM, ast.Load()), [added.left, added.right, norm], [])


def _pair(names: list[str]) -> ast.expr:
    return ast.Tuple([ast.Name(name, ast.Store()) for name in names], ast.Store())
