"""`generate_batch`: prompts that come and go, with their keys in pages of transformers' cache."""

from typing import Any

import pytest
import torch
import transformers

from families import FAMILIES, make_model
from fastattn.integrations.transformers import BATCHING_NAME, PACKING_NAME
from fastattn.integrations.transformers.attention import attention_forward
from fastattn.integrations.transformers.batching import attend_continued
from fastattn.ops.core.backends import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="compares the reference backend")
initialization = pytest.importorskip("transformers.generation.continuous_batching.initialization")

PROMPTS = [[5, 7, 9], [3, 8, 1, 4, 2, 10, 11, 12, 13, 2, 3], [1], [6, 2, 6, 2, 4]]
NEW = 9
# No token ends a text.
OPTIONS: dict[str, Any] = {
    "max_new_tokens": NEW,
    "do_sample": False,
    "eos_token_id": -1,
    "pad_token_id": 0,
}


def written(model: Any, **options: Any) -> list[list[int]]:
    """What `generate_batch` writes, with so few tokens a batch that prompts come in parts."""
    sizes = {"page_size": 4, "num_blocks": 24, "max_batch_tokens": 6, "max_memory_percent": 0.001}
    found = model.generate_batch(
        PROMPTS,
        generation_config=transformers.GenerationConfig(**OPTIONS),
        continuous_batching_config=transformers.ContinuousBatchingConfig(**sizes, **options),
        progress_bar=False,
    )
    assert [output.error for output in found.values()] == [None] * len(PROMPTS)
    by_prompt = {tuple(output.prompt_ids): output.generated_tokens for output in found.values()}
    return [by_prompt[tuple(prompt)] for prompt in PROMPTS]


def written_alone(model: Any) -> list[list[int]]:
    model.set_attn_implementation("eager")
    return [
        model.generate(torch.tensor([prompt]), **OPTIONS)[0, len(prompt) :].tolist()
        for prompt in PROMPTS
    ]


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_batches_write_what_prompts_alone_do(name: str):
    model = make_model(FAMILIES[name], PACKING_NAME).double().eval()
    assert written(model) == written_alone(model)


def test_pages_are_read_where_they_lie(monkeypatch):
    """As on CUDA, where transformers hands them over; on a CPU it has to be told to."""
    monkeypatch.setattr(
        initialization, "ensure_decode_fast_path_is_available", lambda *arguments: None
    )
    calls = []

    def counted(module: Any, query: Any, *arguments: Any, **kwargs: Any) -> Any:
        calls.append(kwargs.get("block_table") is not None)
        return attention_forward(module, query, *arguments, **kwargs)

    mapping = transformers.AttentionInterface._global_mapping
    monkeypatch.setitem(mapping, BATCHING_NAME, counted)
    model = make_model(FAMILIES["llama"], BATCHING_NAME).double().eval()
    assert written(model, max_blocks_per_request=6) == written_alone(model)
    assert any(calls)
    assert not all(calls)


def test_padding_of_a_batch_writes_nothing():
    """Graphs have room for more sequences than there are: those have neither keys nor pages."""
    torch.manual_seed(0)
    k_cache, v_cache = torch.randn(2, 3, 4, 2, 8)
    before = k_cache.clone()
    table = torch.tensor([[2, 0], [1, -1], [-1, -1]], dtype=torch.int32)
    query, key, value = (torch.randn(1, heads, 3, 8) for heads in (4, 2, 2))
    of_keys = torch.tensor([0, 6, 10, 10], dtype=torch.int32)
    pages = {"block_table": table, "k_cache": k_cache, "v_cache": v_cache}
    options: dict[str, Any] = {"sliding_window": None, "dropout_p": 0.0}
    ends = torch.arange(4, dtype=torch.int32)
    found = attend_continued(query, key, value, (ends, of_keys), pages, **options)
    before[0, 1], before[1, 3] = key[0, :, 0], key[0, :, 1]
    assert torch.equal(k_cache, before)
    for place, (pages_of_it, length) in enumerate((([2, 0], 6), ([1], 4))):
        keys, values = (cache[pages_of_it].flatten(0, 1)[:length] for cache in (k_cache, v_cache))
        expected = torch.nn.functional.scaled_dot_product_attention(
            query[:, :, place, None],
            *(x.transpose(0, 1)[None] for x in (keys, values)),
            enable_gqa=True,
        )
        torch.testing.assert_close(found[:, :, place, None], expected)
