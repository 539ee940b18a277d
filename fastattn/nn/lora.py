"""Low-rank adaptation of models: linear layers that are trained by two small matrices each."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn as nn

from .hooks import has_own_hooks
from .linear import Conv1D
from .lora_layers import Adapted, LoRAConv1D, LoRALinear
from .mlp import computes_product, is_only

LORA = re.compile(r"(^|\.)lora_[AB]$")
"""The names of what is trained."""


def apply_lora(
    model: nn.Module,
    targets: str | Iterable[str],
    *,
    rank: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
) -> list[str]:
    """Put a LoRALinear in the place of each linear layer that is named, and freeze all others.

    GPT-2's `Conv1D`, ours and transformers', is a linear layer too, and becomes a LoRAConv1D.
    Afterwards lora_A and lora_B are the only parameters of the model that ask for gradients.

    Args:
        model: the model, which is changed.
        targets: what is adapted: the last part of a layer's name ("q_proj"), its whole name
            ("layers.0.self_attn.q_proj"), or a pattern for the whole name ("layers.*.q_proj",
            "*"); one or several.
        rank, alpha, dropout: as in `LoRALinear`.

    Returns:
        The names of the layers that are adapted.

    Raises:
        ValueError: a target names no linear layer, or one that has hooks or is not just a linear
            layer, which would be lost. The model is as it was.

    Example:
        >>> model = fastattn.nn.GatedMLP(8, 16)
        >>> fastattn.nn.apply_lora(model, "down_proj", rank=2)
        ['down_proj']
    """
    targets = [targets] if isinstance(targets, str) else list(targets)
    linear = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Linear) or _is_conv1d(type(module))
    }
    chosen: dict[str, nn.Module] = {}
    for target in targets:
        named = {name: linear[name] for name in linear if _matches(name, target)}
        if not named:
            raise ValueError(
                f"apply_lora: no linear layer is named {target!r}; there are "
                f"{', '.join(sorted({name.rpartition('.')[2] for name in linear})) or 'none'}"
            )
        chosen |= named
    for name, layer in chosen.items():
        if not _can_be_replaced(layer) or not name:
            raise ValueError(
                f"apply_lora: {name or 'the model itself'} is a {type(layer).__name__} that cannot "
                "be replaced: it must be a torch.nn.Linear, fastattn.nn.Linear or Conv1D within "
                "the model, without hooks, and a Linear without an activation"
            )
    for name, parameter in model.named_parameters():
        if not LORA.search(name):
            parameter.requires_grad_(False)
    # A layer that stands in several places stays one layer.
    adapted = {
        id(layer): _adapt_layer(layer, rank=rank, alpha=alpha, dropout=dropout)
        for layer in chosen.values()
    }
    for name, layer in chosen.items():
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, adapted[id(layer)])
    owners = Counter(
        id(parameter)
        for module in model.modules()
        for parameter in module.parameters(recurse=False)
    )
    for layer in adapted.values():
        layer.shares_weight = owners[id(layer.weight)] > 1
    return list(chosen)


def merge_lora(model: nn.Module) -> None:
    """Put plain linear layers, which give the same, in the place of all adapted ones.

    Example:
        >>> model = fastattn.nn.GatedMLP(8, 16)
        >>> names = fastattn.nn.apply_lora(model, "down_proj", rank=2)
        >>> fastattn.nn.merge_lora(model)
        >>> type(model.down_proj).__name__
        'Linear'
    """
    plain: dict[int, nn.Module] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, Adapted) and name:
            parent, _, own = name.rpartition(".")
            layer = plain.setdefault(id(module), module.to_linear())
            setattr(model.get_submodule(parent), own, layer)


def lora_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The lora_A and lora_B of a model alone; `load_state_dict(..., strict=False)` loads them.

    Example:
        >>> model = fastattn.nn.GatedMLP(8, 16)
        >>> names = fastattn.nn.apply_lora(model, "down_proj", rank=2)
        >>> sorted(fastattn.nn.lora_state_dict(model))
        ['down_proj.lora_A', 'down_proj.lora_B']
    """
    return {name: tensor for name, tensor in model.state_dict().items() if LORA.search(name)}


def _is_conv1d(kind: type) -> bool:
    """Whether a class is that of GPT-2's linear layers, ours or transformers'."""
    named = (kind.__module__, kind.__qualname__)
    return kind is Conv1D or named == ("transformers.pytorch_utils", "Conv1D")


def _can_be_replaced(layer: nn.Module) -> bool:
    """Whether its parameters, and the activation of a Conv1D, are all that a call depends on."""
    return computes_product(layer, has_own_hooks) or (
        _is_conv1d(type(layer)) and is_only(layer, (type(layer),), has_own_hooks)
    )


def _adapt_layer(layer: nn.Module, **options: Any) -> Adapted:
    if isinstance(layer, nn.Linear):
        return LoRALinear.from_linear(layer, **options)
    return LoRAConv1D.from_conv1d(layer, **options)


def _matches(name: str, target: str) -> bool:
    return name.rpartition(".")[2] == target or fnmatchcase(name, target)
