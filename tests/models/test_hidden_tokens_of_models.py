"""Padding may be anything, NaN too: no model's other tokens have anything of it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from model_support import BACKENDS, device_of
from small_models import LANGUAGE_MODELS, TOKENS, batch_of, small
from torch import nn

import fastattn
from fastattn.models import Model
from support import WIDEST, assert_close, same_bits

PADDING = TOKENS - 1
"""A token that is nowhere but at the padding."""

PADDED = {"right": slice(5, None), "left": slice(None, 2), "inside": slice(3, 5)}


def outcome(
    model: Model, batch: dict[str, torch.Tensor], instead: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """A model's logits and loss where the vectors of padding are this number."""

    def replace(module: nn.Module, arguments: Any, output: torch.Tensor) -> torch.Tensor:
        return output.masked_fill((arguments[0] == PADDING)[..., None], instead)

    # Tokens' embeddings alone, for no sequence is so long that a position has this number.
    hooks = [
        module.register_forward_hook(replace)
        for module in model.modules()
        if isinstance(module, nn.Embedding) and module.num_embeddings == TOKENS
    ]
    assert hooks
    try:
        output = model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    assert output.loss is not None
    return output.logits, output.loss


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
@pytest.mark.parametrize("garbage", [math.nan, pytest.param(math.inf, marks=pytest.mark.slow)])
@pytest.mark.parametrize("where", [*PADDED, "lengths"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_padding_reaches_no_other_token(name, backend, where, garbage):
    device = device_of(backend)
    model = small(name, WIDEST).to(device)
    batch = batch_of(model, 3, 7)
    ids = batch["input_ids"].clamp(max=PADDING - 1)
    mask = torch.ones_like(ids)
    mask[1, PADDED.get(where, slice(5, None))] = 0
    batch["input_ids"] = ids.masked_fill(mask == 0, PADDING)
    batch["attention_mask"] = torch.tensor([7, 5, 7]) if where == "lengths" else mask
    labels = batch["labels"] = batch["labels"].clamp(max=PADDING - 1)
    generates = name.endswith("ForConditionalGeneration")
    if not generates:
        # Neither what padding predicts counts, nor that it is predicted.
        batch["labels"] = labels.masked_fill((mask == 0) | (mask.roll(1, 1) == 0), -100)
    batch = {key: tensor.to(device) for key, tensor in batch.items()}
    with fastattn.backend(backend):
        plain, found = (outcome(model, batch, number) for number in (0.0, garbage))
    seen = slice(None) if generates else mask.bool().to(device)
    routed = any(isinstance(module, fastattn.nn.Experts) for module in model.modules())
    for a, b in ((found[0][seen], plain[0][seen]), (found[1], plain[1])):
        assert b.isfinite().all()
        if routed and backend == "reference":
            # Padding is some expert's as well, and of how many rows a product has PyTorch's bits
            # may hang.
            assert_close(a, b, name)
        else:
            assert same_bits(a, b)
