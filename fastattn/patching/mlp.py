"""Feed-forward layers of any library, computed by our kernels."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn as nn

from .. import ops
from ..nn.hooks import has_hooks
from ..nn.mlp import GATED_FUNCTIONS, are_readable, is_only, is_only_linear
from ..ops.core.arguments import FLOAT_DTYPES
from ..ops.core.precision import is_autocast_on
from ..ops.core.tensor_kinds import is_foreign
from ..reference.linear import ACTIVATIONS as FUNCTIONS
from .mlp_forms import Drop, MLPForm, read_form
from .rules import Rule
from .twins import make_twin

NAMED = ("mlp", "ffn", "feedforward", "intermediate")
"""What classes of feed-forward layers have in their names, of which the report says more."""


class PatchedMLP(nn.Module):
    """A feed-forward layer whose first products and activation are our kernels.

    Parts that more is done by than a product, as adapters and quantizers put there, are called, and
    then the activation. So is the last layer always.
    """

    _fastattn_mlp: MLPForm

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the class computes, by ours wherever all parts have the input's dtype."""
        form = self._fastattn_mlp
        if len(args) == 1 and not kwargs and _takes(self, form, args[0]):
            hidden = _activate(self, form, args[0])
            hidden = _drop(self, form.between, hidden)
            if form.last is not None:
                hidden = getattr(self, form.last)(hidden)
            return _drop(self, form.after, hidden)
        return super().forward(*args, **kwargs)


def find_mlp(module: nn.Module, kind: type[nn.Module]) -> Rule | str | None:
    """The rule for a feed-forward layer, or why it is left alone; None if it is none."""
    if type(kind) is not type or not any(module.children()) or not _takes_one_tensor(kind):
        return None
    form = read_form(module)
    if form is None:
        named = any(part in kind.__name__.lower() for part in NAMED)
        return "a feed-forward layer of an unknown form; its parts are looked at" if named else None

    def attributes(_: nn.Module) -> Mapping[str, Any]:
        return {"_fastattn_mlp": form}

    return Rule(kind, make_twin(kind, PatchedMLP), attributes)


def _takes_one_tensor(kind: type[nn.Module]) -> bool:
    parameters = list(inspect.signature(kind.forward).parameters.values())
    return len(parameters) == 2 and parameters[1].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD


def _takes(layer: nn.Module, form: MLPForm, x: Any) -> bool:
    """Whether a call is one that ours and theirs compute alike."""
    if not isinstance(x, torch.Tensor) or is_foreign(x) or x.dtype not in FLOAT_DTYPES:
        return False
    if form.function is not None and has_hooks(getattr(layer, form.function)):
        return False
    if is_autocast_on(x.device.type):
        return True
    names = form.first if form.last is None else (*form.first, form.last)
    weights = [getattr(getattr(layer, name), "weight", None) for name in names]
    return all(weight is None or weight.dtype is x.dtype for weight in weights)


def _activate(layer: nn.Module, form: MLPForm, x: torch.Tensor) -> torch.Tensor:
    """What comes before the last layer and its dropout."""
    first = [getattr(layer, name) for name in form.first]
    activation: Any = form.activation
    if len(first) == 2:
        gate, up = first
        if is_only_linear(gate) and is_only_linear(up):
            weights = (gate.weight, up.weight, gate.bias, up.bias)
            # As theirs, it saves gate and up; computing them again would take another third.
            return ops.gated_linear(x, *weights, activation=activation, recompute=False)
        return _gate(activation, gate(x), up(x))
    if form.active is not None:
        both = first[0](x)
        if form.active == 0 and not is_foreign(both):
            return GATED_FUNCTIONS[activation](both)  # type: ignore[call-arg]
        halves = both.chunk(2, -1)
        return _gate(activation, halves[form.active], halves[1 - form.active])
    if is_only_linear(first[0]):
        return ops.linear(x, first[0].weight, first[0].bias, activation=activation)
    if _is_transposed(first[0]) and are_readable(first[0].weight, first[0].bias):
        return ops.linear(x, first[0].weight.t(), first[0].bias, activation=activation)
    return FUNCTIONS[activation](first[0](x))


def _is_transposed(layer: nn.Module) -> bool:
    """Whether a layer is transformers' Conv1D, a Linear with a weight of (in, out)."""
    kind = type(layer)
    known = kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"
    return known and is_only(layer, (kind,))


def _gate(activation: str, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    if gate.dtype is not up.dtype or is_foreign(gate) or is_foreign(up):
        return FUNCTIONS[activation](gate) * up
    return GATED_FUNCTIONS[activation](gate, up)


def _drop(layer: nn.Module, dropouts: tuple[Drop, ...], x: torch.Tensor) -> torch.Tensor:
    for dropout in dropouts:
        if isinstance(dropout, str):
            x = getattr(layer, dropout)(x)
        else:
            x = nn.functional.dropout(x, dropout, layer.training)
    return x
