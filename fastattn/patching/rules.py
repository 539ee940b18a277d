"""Which module of a model becomes which of ours."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn as nn

from .. import nn as ours


def _no_attributes(_: nn.Module) -> Mapping[str, Any]:
    return {}


def _no_objection(_: nn.Module) -> str | None:
    return None


@dataclass(frozen=True)
class Rule:
    """A class of modules, and the class that its instances become.

    An instance keeps its identity, its attributes, parameters and children: its class alone
    changes. Hence the new class derives from the old one and computes with what the old one has.

        class FastNorm(SomeModelsNorm):
            def forward(self, x):
                return fastattn.rms_norm(x, self.weight, self.variance_epsilon, casting="llama")

        fastattn.patch(model, rules=[Rule(SomeModelsNorm, FastNorm)])

    Args:
        theirs: the class that is replaced; instances of subclasses are not.
        ours: the class that its instances become, a subclass of `theirs`. To be pickled it has to
            stand in a module.
        attributes: what instances of `ours` have beyond those of `theirs`, given one of these;
            `unpatch` takes them away. No parameters, buffers or modules.
        objection: why one instance of `theirs` has to stay as it is, or None.

    Raises:
        TypeError: `ours` does not derive from `theirs`.

    Example:
        >>> class Scaled(torch.nn.Identity): ...
        >>> class Ours(Scaled): ...
        >>> rule = fastattn.patching.Rule(Scaled, Ours)
        >>> model = torch.nn.Sequential(Scaled())
        >>> len(fastattn.patch(model, rules=[rule]).replaced)
        1
    """

    theirs: type[nn.Module]
    ours: type[nn.Module]
    attributes: Callable[[nn.Module], Mapping[str, Any]] = _no_attributes
    objection: Callable[[nn.Module], str | None] = _no_objection

    def __post_init__(self) -> None:
        if self.ours is self.theirs or not issubclass(self.ours, self.theirs):
            raise TypeError(
                f"Rule: ours must be a subclass of theirs, got {self.ours.__name__} for "
                f"{self.theirs.__name__}"
            )


Finder = Callable[[nn.Module, type[nn.Module]], "Rule | str | None"]
"""Looks at a module and its class, and gives the rule for it, the reason why it is left alone, or
None if it has nothing to say."""


@dataclass(frozen=True)
class Wanted:
    """What a patch is to replace, as `fastattn.patch` takes it."""

    norms: bool = True
    mlp: bool = True
    rotary: bool = True
    loss: bool = True
    attention: bool = True
    linear: bool = False


def _no_activation(_: nn.Module) -> Mapping[str, Any]:
    return {"activation": None}


LINEAR = Rule(nn.Linear, ours.Linear, _no_activation)
"""Not among RULES: alone, a product gains nothing over cuBLAS."""

RULES: tuple[Rule, ...] = (
    Rule(nn.MultiheadAttention, ours.MultiheadAttention),
    Rule(nn.TransformerEncoderLayer, ours.TransformerEncoderLayer),
    Rule(nn.TransformerDecoderLayer, ours.TransformerDecoderLayer),
    Rule(nn.TransformerEncoder, ours.TransformerEncoder),
    Rule(nn.TransformerDecoder, ours.TransformerDecoder),
    Rule(nn.Transformer, ours.Transformer),
    Rule(nn.LayerNorm, ours.LayerNorm),
    Rule(nn.RMSNorm, ours.RMSNorm),
    Rule(nn.Dropout, ours.Dropout),
    Rule(nn.Softmax, ours.Softmax),
    Rule(nn.LogSoftmax, ours.LogSoftmax),
    Rule(nn.CrossEntropyLoss, ours.CrossEntropyLoss),
)
"""What `fastattn.patch` does without being asked for more."""

OPTIONS: Mapping[type[nn.Module], str] = {
    nn.MultiheadAttention: "attention",
    nn.TransformerEncoderLayer: "attention",
    nn.TransformerDecoderLayer: "attention",
    nn.TransformerEncoder: "attention",
    nn.TransformerDecoder: "attention",
    nn.Transformer: "attention",
    nn.LayerNorm: "norms",
    nn.RMSNorm: "norms",
    nn.CrossEntropyLoss: "loss",
}
"""Which of `Wanted` a rule belongs to; the others are always wanted."""


def choose_rules(wanted: Wanted) -> dict[type[nn.Module], Rule]:
    """Those of RULES, and LINEAR, that are wanted, by the class that they replace."""
    rules = (rule for rule in RULES if getattr(wanted, OPTIONS.get(rule.theirs, ""), True))
    return {rule.theirs: rule for rule in (*rules, *([LINEAR] if wanted.linear else []))}


UNTOUCHED: Mapping[type[nn.Module], str] = {
    nn.Embedding: "a lookup, which PyTorch does as fast as memory",
    nn.Linear: "on request: patch(model, linear=True)",
    nn.modules.linear.NonDynamicallyQuantizableLinear: (
        "not called: attention computes with its parameters"
    ),
}
"""Why modules of some classes without a rule are better left alone."""

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
"""Classes that compute nothing themselves, which no report mentions."""
