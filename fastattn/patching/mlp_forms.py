"""What a feed-forward layer computes, read from one call without numbers.

There are a hundred texts of such layers, which differ in names, in the order of a product and in
where dropout stands. torch.fx records what a forward calls, in training and in evaluation, and the
record is held against the two forms that our kernels know:

    last(dropout(activation(gate(x)) * up(x))), gate and up by themselves or halves of one product
    last(dropout(activation(first(x)))), or without a last layer

A layer that does anything else has no form, and is left alone.
"""

import copy
import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F

from .. import nn as ours
from ..nn.mlp import GATED_FUNCTIONS
from ..reference.linear import ACTIVATIONS as FUNCTIONS

Drop = str | float
"""A Dropout by its name in the layer, or the probability that a function is given."""


@dataclass(frozen=True)
class MLPForm:
    """A feed-forward layer by the names of its parts.

    Attributes:
        first: (gate, up), or the one layer that gives both or is alone.
        activation: as `fastattn.linear` and `fastattn.gated_linear` call it.
        function: the name of the part that is the activation, None if it is no part.
        active: of a product with both, which half is activated; None if there is nothing to gate.
        between: the dropouts before the last layer.
        last: the last layer, None if there is none.
        after: the dropouts after it.
    """

    first: tuple[str, ...]
    activation: str
    function: str | None
    active: int | None
    between: tuple[Drop, ...]
    last: str | None
    after: tuple[Drop, ...]


def read_form(module: nn.Module) -> MLPForm | None:
    """The form of a layer whose forward takes one tensor, or None if it has none that is known."""
    try:
        forms = [_read(module, training) for training in (True, False)]
    except Exception:  # What cannot be recorded, because it asks for numbers say, has no form.
        return None
    return forms[0] if forms[0] == forms[1] else None


def find_activation(function: Callable[[torch.Tensor], Any]) -> str | None:
    """The name that ours have for a function of every element, told by its values."""
    x = torch.linspace(-8.0, 8.0, 321, dtype=torch.float64)
    with torch.no_grad():
        y = function(x.clone())
        for name, known in FUNCTIONS.items():
            if isinstance(y, torch.Tensor) and torch.allclose(y, known(x), rtol=1e-6, atol=1e-8):
                return name
    return None


class _Proxy(torch.fx.Proxy):
    """A tensor without numbers, of the dtype that the layer's parameters have."""

    @property
    def dtype(self) -> torch.dtype:
        tracer: Any = self.tracer
        return next(tracer.root.parameters()).dtype


class _Tracer(torch.fx.Tracer):
    """Records calls of the layer's parts, whatever these are."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: torch.fx.Node) -> _Proxy:
        return _Proxy(node, self)


def _read(module: nn.Module, training: bool) -> MLPForm | None:
    probe = copy.copy(module)
    probe.training = training
    graph = _Tracer().trace(probe)
    # A parameter that is only looked at, for its dtype say, changes nothing.
    nodes = [node for node in graph.nodes if node.op != "get_attr" or node.users]
    if sum(node.op == "placeholder" for node in nodes) != 1:
        return None
    reader = _Reader(probe, nodes[0])
    form = reader.read(nodes[-1].args[0])
    # The input and the output are not among those read.
    return form if form is not None and len(reader.seen) == len(nodes) - 2 else None


class _Reader:
    """Reads a record from its end; `seen` has what it has understood."""

    def __init__(self, module: nn.Module, x: torch.fx.Node) -> None:
        self.module = module
        self.x = x
        self.seen: set[torch.fx.Node] = set()

    def read(self, node: Any) -> MLPForm | None:
        """The form of what a node computes."""
        node, after = self.read_dropouts(node)
        last = None
        between: tuple[Drop, ...] = ()
        if self.read_activation(node) is None:
            last = self.called(node)
            if last is None or self.is_silent(last):
                return None
            node, between = self.read_dropouts(self.take(node).args[0])
        gated = self.read_product(node)
        if gated is not None:
            active, up = gated
            found = self.read_activation(active)
        else:
            up, found = None, self.read_activation(node)
        if found is None:
            return None
        activation, function, inner = found
        if up is None:
            first = self.read_first(inner)
            parts = None if first is None else ((first,), None)
        else:
            parts = self.read_gate(inner, up)
        if parts is None or (up is not None and activation not in GATED_FUNCTIONS):
            return None
        names, half = parts
        return MLPForm(names, activation, function, half, between, last, after)

    def take(self, node: torch.fx.Node) -> torch.fx.Node:
        """The node, counted as read."""
        self.seen.add(node)
        return node

    def called(self, node: Any) -> str | None:
        """The name of the part that a node calls with one tensor."""
        if not isinstance(node, torch.fx.Node) or node.op != "call_module":
            return None
        one = len(node.args) == 1 and not node.kwargs and isinstance(node.args[0], torch.fx.Node)
        return str(node.target) if one else None

    def is_silent(self, name: str) -> bool:
        """Whether a part has no parameters, so that it is no layer."""
        return not any(True for _ in self.module.get_submodule(name).parameters())

    def read_dropouts(self, node: Any) -> tuple[Any, tuple[Drop, ...]]:
        """What dropouts are applied to, and these in the order in which they are."""
        found: list[Drop] = []
        while isinstance(node, torch.fx.Node):
            name = self.called(node)
            kind = None if name is None else type(self.module.get_submodule(name))
            if name is not None and kind in (nn.Dropout, ours.Dropout):
                found.insert(0, name)
            elif node.op == "call_function" and node.target is F.dropout:
                given = inspect.signature(F.dropout).bind(*node.args, **node.kwargs)
                given.apply_defaults()
                if given.arguments["training"] is not self.module.training:
                    break
                found.insert(0, float(given.arguments["p"]))
            elif kind is not nn.Identity:
                break
            node = self.take(node).args[0]
        return node, tuple(found)

    def read_activation(self, node: Any) -> tuple[str, str | None, Any] | None:
        """The activation that a node is, the part of that name, and what it is applied to."""
        name = self.called(node)
        if name is not None and self.is_silent(name):
            activation = find_activation(self.module.get_submodule(name))
        elif isinstance(node, torch.fx.Node) and node.op == "call_function" and node.args:
            if node.target in (operator.mul, operator.getitem, torch.mul):
                return None
            call: Any = node.target
            activation = find_activation(lambda x: call(x, *node.args[1:], **node.kwargs))
        else:
            return None
        return None if activation is None else (activation, name, self.take(node).args[0])

    def read_product(self, node: Any) -> tuple[Any, Any] | None:
        """What is activated, and what it is multiplied by."""
        if not isinstance(node, torch.fx.Node) or len(node.args) != 2 or node.kwargs:
            return None
        if node.target not in (operator.mul, torch.mul, "mul"):
            return None
        self.take(node)
        a, b = node.args
        return (a, b) if self.read_activation(a) is not None else (b, a)

    def read_first(self, node: Any) -> str | None:
        """The layer that a node applies to the input."""
        name = self.called(node)
        if name is None or node.args[0] is not self.x or self.is_silent(name):
            return None
        self.take(node)
        return name

    def read_gate(self, gate: Any, up: Any) -> tuple[tuple[str, ...], int | None] | None:
        """The layers of gate and up, and which half is the gate if there is one layer."""
        halves = [self.read_half(node) for node in (gate, up)]
        if halves[0] is not None and halves[1] is not None:
            (name, active), (other, passive) = halves[0], halves[1]
            return ((name,), active) if name == other and active + passive == 1 else None
        names = [self.read_first(node) for node in (gate, up)]
        return None if None in names else (tuple(map(str, names)), None)

    def read_half(self, node: Any) -> tuple[str, int] | None:
        """The layer of whose output a node is a half, and which."""
        if not isinstance(node, torch.fx.Node) or node.target is not operator.getitem:
            return None
        whole, place = node.args
        if not isinstance(whole, torch.fx.Node) or whole.target not in ("chunk", torch.chunk):
            return None
        rest = (*whole.args[1:], *whole.kwargs.values())
        if rest != (2, -1) or place not in (0, 1):
            return None
        name = self.read_first(whole.args[0])
        if name is None:
            return None
        self.take(node)
        self.take(whole)
        return name, int(place)  # type: ignore[arg-type]  # place is 0 or 1
