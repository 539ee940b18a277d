"""What `fastattn.patch` does to models of Hugging Face's beyond its table of rules."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch.nn as nn
from transformers import PretrainedConfig, PreTrainedModel

from ...patching import Changed, Finder, LeftAlone, Wanted
from ...patching.mlp import find_mlp
from .loss import loss_finder
from .names import BATCHING_NAME, NAME, PACKING_NAME
from .private import implementation_of
from .rotary import find_rotary
from .sums import find_sum

RECORD = "_fastattn_attention"
"""The attribute of a model that has the names which its parts had for their attention."""


def make_finders(model: nn.Module, wanted: Wanted) -> Sequence[Finder]:
    """Rules for heads with their loss, feed-forward layers, rotary positions and residual sums."""
    finders: list[Finder] = []
    if wanted.loss:
        finders.append(loss_finder(model))
    if wanted.mlp:
        finders.append(find_mlp)
    if wanted.rotary:
        finders.append(find_rotary)
    if wanted.norms:
        finders.append(find_sum)
    return finders


def change_settings(model: nn.Module, wanted: Wanted) -> Sequence[Changed | LeftAlone]:
    """Have every model compute attention by ours, as `set_attn_implementation` does."""
    found: list[Changed | LeftAlone] = []
    if wanted.attention:
        for place, part in _outermost(model):
            before = _names(part.config)
            if before[""] in (NAME, PACKING_NAME, BATCHING_NAME):
                continue
            try:
                part.set_attn_implementation(NAME)
            except ValueError as error:
                found.append(LeftAlone((place,), type(part), f"its attention: {error}"))
                continue
            if _names(part.config) == before:
                reason = "its attention cannot be named, for it does not ask transformers for it"
                found.append(LeftAlone((place,), type(part), reason))
                continue
            setattr(part, RECORD, before)
            found.append(Changed(place, "attention", str(before[""]), NAME))
    return found


def restore_settings(model: nn.Module) -> None:
    """Give every model the attention back that it had."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and RECORD in vars(module):
            module.set_attn_implementation(vars(module)[RECORD])
            delattr(module, RECORD)


def _outermost(model: nn.Module) -> Iterator[tuple[str, PreTrainedModel]]:
    """The models in a model that stand in no other, with their places."""
    inside: set[nn.Module] = set()
    for place, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and module not in inside:
            inside.update(module.modules())
            yield place, module


def _names(config: PretrainedConfig) -> dict[str, Any]:
    """The names of attention, as `set_attn_implementation` takes them for a model and its parts."""
    parts = {name: getattr(config, name) for name in config.sub_configs}
    named = {name: _names(part) for name, part in parts.items() if part is not None}
    return {"": implementation_of(config), **named}
