"""What models write with our attention is what they write with their own, whatever the cache."""

from typing import Any

import pytest
import torch

from families import FAMILIES, inputs_of, make_model, tokens
from fastattn.ops.core.backends import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="compares the reference backend")

PADDED = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1], [1] * 9])
WAYS: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "no cache": {"use_cache": False},
    "beams": {"num_beams": 3},
    "left-padded": {"attention_mask": PADDED},
    "left-padded, static": {
        "attention_mask": PADDED,
        "cache_implementation": "static",
        "disable_compile": True,
    },
    "left-padded beams": {"attention_mask": PADDED, "num_beams": 2},
}


def written(name: str, implementation: str, way: dict[str, Any], **inputs: Any) -> torch.Tensor:
    model = make_model(FAMILIES[name], implementation).double().eval()
    return model.generate(
        **inputs, **way, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0
    )


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "mistral", "gpt2"])
def test_decoders_write_the_same(name: str, way: dict[str, Any]):
    """As eager attention writes for each prompt alone: in float64 it makes NaN of padding."""
    prompts = tokens(2, 9)
    found = written(name, "fastattn", way, input_ids=prompts)
    alone = {option: value for option, value in way.items() if option != "attention_mask"}
    mask = way.get("attention_mask", torch.ones_like(prompts)).bool()
    for prompt, real, text in zip(prompts, mask, found, strict=True):
        expected = written(name, "eager", alone, input_ids=prompt[real][None])[0]
        assert torch.equal(text[-8:], expected[-8:])


@pytest.mark.parametrize("way", ["dynamic", "static", "beams"])
@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_pairs_write_the_same(name: str, way: str):
    inputs: dict[str, Any] = dict(inputs_of(FAMILIES[name]))
    del inputs["decoder_input_ids"]
    if name == "whisper":
        inputs["input_features"] = inputs["input_features"].double()
    else:
        inputs["attention_mask"] = (torch.arange(14) < torch.tensor([[14], [9]])).long()
    expected = written(name, "eager", WAYS[way], **inputs)
    assert torch.equal(written(name, "fastattn", WAYS[way], **inputs), expected)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_prompt_may_come_in_parts(name: str):
    ids = tokens(2, 12)
    model = make_model(FAMILIES[name], "fastattn").double().eval()
    whole = model(ids, use_cache=False).logits
    first = model(ids[:, :5], use_cache=True)
    second = model(ids[:, 5:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(torch.cat((first.logits, second), 1), whole, rtol=0, atol=1e-6)
