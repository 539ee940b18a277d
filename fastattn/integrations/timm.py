"""What `fastattn.patch` does to vision transformers of timm's beyond its table of rules.

Their attention calls `F.scaled_dot_product_attention` itself. A forward made anew from the class's
text calls `fastattn.functional.scaled_dot_product_attention` in its place; PyTorch's stays where it
is, for all others. Feed-forward layers become ours as everywhere, and so do norms, which are known
by what they compute. Attention that timm was told not to fuse keeps its own formula.
"""

import ast
import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch.nn as nn
import torch.nn.functional as F

from .. import functional
from ..patching import Changed, Finder, LeftAlone, Rule, Wanted, make_twin
from ..patching.mlp import find_mlp
from ..patching.texts import Forward, read_text, write_forward

SDPA = "scaled_dot_product_attention"

OURS = "_fastattn_attention"
"""What the function is called in a forward made anew."""


class PatchedAttention(nn.Module):
    """Attention of timm's that calls ours."""

    @staticmethod
    def rewrite(theirs: type[nn.Module]) -> Forward:
        """The class's forward, with the function replaced."""
        definition = read_text(theirs.forward)
        assert definition is not None
        changed = _Calls(theirs.forward).visit(copy.deepcopy(definition))
        ours = functional.scaled_dot_product_attention
        return write_forward(theirs.forward, changed, {OURS: ours})


def make_finders(model: nn.Module, wanted: Wanted) -> Sequence[Finder]:
    """Rules for attention and for feed-forward layers."""
    return [*[find_attention] * wanted.attention, *[find_mlp] * wanted.mlp]


def find_attention(module: nn.Module, kind: type[nn.Module]) -> Rule | str | None:
    """The rule for a module that calls PyTorch's attention; None if it does not."""
    if type(kind) is not type or kind.__module__.partition(".")[0] != "timm":
        return None
    definition = read_text(kind.forward)
    if definition is None:
        return None
    calls = _Calls(kind.forward)
    calls.visit(copy.deepcopy(definition))
    if not calls.count:
        return None
    if getattr(module, "fused_attn", True) is False:
        return "its attention is not fused: timm.layers.set_fused_attn(True)"
    return Rule(kind, make_twin(kind, PatchedAttention))


def change_settings(model: nn.Module, wanted: Wanted) -> Sequence[Changed | LeftAlone]:
    """Nothing but classes is changed."""
    return ()


def restore_settings(model: nn.Module) -> None:
    """So there is nothing to restore."""


class _Calls(ast.NodeTransformer):
    """Replaces `F.scaled_dot_product_attention`, by whatever name F has; `count` says how often."""

    def __init__(self, forward: Any) -> None:
        self.globals = inspect.unwrap(forward).__globals__
        self.count = 0

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        """The function as an attribute of torch.nn.functional."""
        module = node.value.id if isinstance(node.value, ast.Name) else ""
        if node.attr != SDPA or self.globals.get(module) is not F:
            return self.generic_visit(node)
        self.count += 1
        return ast.copy_location(ast.Name(OURS, ast.Load()), node)
