"""What tests of generation share: prompts, models on a backend, and models of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model_support import made, save
from small_models import SIZES, TOKENS, small

from fastattn import models
from support import DEVICE

BACKENDS = ["reference", pytest.param("triton", marks=pytest.mark.kernels)]
PROMPTS = torch.tensor([[5, 7, 9, 2, 3], [3, 8, 0, 0, 0], [4, 6, 11, 12, 0]])
LENGTHS = torch.tensor([5, 2, 4])
PAIRS = ["T5ForConditionalGeneration", "BartForConditionalGeneration"]


def model_on(name: str, backend: str, **options: Any) -> tuple[Any, Any]:
    """A small model and the device that it is on."""
    device = "cpu" if backend == "reference" else DEVICE
    return small(name, **options).to(device), device


def other(model: Any, name: str, **options: Any) -> Any:
    """A small model that would choose other tokens, on the first one's device."""
    changed: Any = small(name, **options).to(next(model.parameters()).device)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in changed.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(0.3 * noise.to(parameter.device))
    return changed


def both(name: str, folder: Path, **options: Any) -> tuple[Any, Any]:
    """A small model of transformers in float64, and ours of its checkpoint."""
    transformers = pytest.importorskip("transformers")
    kind = getattr(models, name).config_class
    sizes = {**SIZES[kind.model_type], "bos_token_id": None, "eos_token_id": None, **options}
    if name.startswith("T5"):
        sizes["decoder_start_token_id"] = 0
    else:
        sizes["max_position_embeddings"] = 32
    config = getattr(transformers, kind.__name__)(**sizes)
    if name.startswith("Bart"):
        config.forced_eos_token_id = None
    theirs = made(lambda: getattr(transformers, name)(config)).double()
    theirs.generation_config.forced_eos_token_id = None
    return theirs, models.from_pretrained(save(theirs, folder))


def written(theirs: Any, new: int, stop: list[int], **options: Any) -> tuple[list[Any], Any]:
    """What transformers' generate writes behind each of the prompts, and its scores.

    A decoder has its prompts padded on the left, as it wants them.
    """
    longest = PROMPTS.shape[1]
    mask = (torch.arange(longest) < LENGTHS[:, None]).long()
    given, first = PROMPTS, 1
    if not theirs.config.is_encoder_decoder:
        rolled = [
            (row.roll(longest - n), m.roll(longest - n))
            for row, m, n in zip(PROMPTS, mask, LENGTHS.tolist(), strict=True)
        ]
        given, mask = (torch.stack(rows) for rows in zip(*rolled, strict=True))
        first = longest
    output = theirs.generate(
        given,
        attention_mask=mask,
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=stop or None,
        pad_token_id=TOKENS - 1,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    return output.sequences[:, first:].tolist(), getattr(output, "sequences_scores", None)


def continuations(generated: Any, starts: list[int]) -> list[list[int]]:
    """The tokens behind each prompt."""
    return [
        tokens[start:end].tolist()
        for tokens, start, end in zip(
            generated.tokens, starts, generated.lengths.tolist(), strict=True
        )
    ]


def assert_same(found: list[list[int]], expected: list[list[int]]) -> None:
    """What was written is the same, up to what transformers fills up with."""
    for ours, theirs in zip(found, expected, strict=True):
        assert theirs[: len(ours)] == ours
        assert len(set(theirs[len(ours) :])) <= 1
