"""Steps of generation: keys are read to the last that counts, whatever room a cache has."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

from families import FAMILIES, make_model, tokens
from fastattn import nn
from fastattn.integrations.transformers import steps
from fastattn.ops.core.backends import INTERPRETED

reference = pytest.mark.skipif(INTERPRETED, reason="compares the reference backend")
IDS = tokens(2, 15)
PADDED = (torch.arange(15) >= torch.tensor([[0], [3]])).long()


@pytest.fixture
def counted(monkeypatch) -> list[list[int]]:
    """The lengths that decode attention is told, call by call."""
    calls: list[list[int]] = []
    decode_attention = steps.decode_attention

    def listen(*arguments: Any, lengths: torch.Tensor, **terms: Any) -> Any:
        calls.append(lengths.tolist())
        return decode_attention(*arguments, lengths=lengths, **terms)

    monkeypatch.setattr(steps, "decode_attention", listen)
    return calls


def poison(cache: Any) -> None:
    """Make NaN of every place of a static cache that no token has."""
    for layer in cache.layers:
        if layer.is_initialized:
            used = int(layer.get_seq_length())
            layer.keys[:, :, used:] = float("nan")
            layer.values[:, :, used:] = float("nan")


@torch.no_grad()
def in_parts(model: Any, cache: Any, parts: list[int], mask: torch.Tensor) -> torch.Tensor:
    """The logits of tokens that come in parts."""
    found, done = [], 0
    for ids in IDS.split(parts, 1):
        done += ids.shape[1]
        if isinstance(cache, StaticCache):
            poison(cache)
        found.append(model(ids, attention_mask=mask[:, :done], cache=cache).logits)
    return torch.cat(found, 1)


@reference
@pytest.mark.parametrize("mask", [torch.ones_like(PADDED), PADDED], ids=["whole", "left-padded"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "mistral", "deepseek_v3"])
def test_room_that_nothing_has_is_not_read(name: str, mask: torch.Tensor, counted):
    """A prompt, guesses and steps, of static caches beside dynamic ones: equal logits."""
    model = make_model(FAMILIES[name], "fastattn").double().eval()
    parts, real = [9, 1, 3, 1, 1], mask.bool()
    expected = in_parts(model, DynamicCache(config=model.config), parts, mask)
    counted.clear()
    cache: Any = StaticCache(config=model.config, max_cache_len=40)
    found = in_parts(model, cache, parts, mask)
    torch.testing.assert_close(found[real], expected[real])
    # Of windows there are always the same, and a cache that is not full has a token more each time.
    assert max(max(lengths) for lengths in counted) <= 15
    if not all(layer.is_sliding for layer in cache.layers):
        assert all([n, n] in counted for n in (10, 13, 14, 15))


@reference
@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize("implementation", ["fastattn", "eager"])
def test_models_take_our_caches(name: str, implementation: str):
    model = make_model(FAMILIES[name], implementation).double().eval()
    parts, mask, config = [9, 1, 3, 1, 1], torch.ones_like(PADDED), model.config
    expected = in_parts(model, DynamicCache(config=config), parts, mask)
    heads, dim = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    options: dict[str, Any] = {"dtype": torch.float64}
    make, room = nn.KVCache, 20
    if name == "mistral":
        before = config.sliding_window - 1
        make, room, options["window"] = nn.RingKVCache, before + 3, before
    caches = [make(2, heads, room, dim, **options) for _ in range(config.num_hidden_layers)]
    found = in_parts(model, nn.CacheStack(caches), parts, mask)
    torch.testing.assert_close(found, expected)


@pytest.mark.kernels
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_kernels_read_no_room_that_nothing_has(name: str):
    model = make_model(FAMILIES[name], "fastattn").eval()
    cache = StaticCache(config=model.config, max_cache_len=40)
    found = in_parts(model, cache, [9, 1, 5], PADDED)
    with torch.no_grad():
        expected = model(IDS, attention_mask=PADDED, use_cache=False).logits
    real = PADDED.bool()
    torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-5)


@reference
def test_a_step_is_one_graph_for_all_lengths():
    """Compiled once; nothing waits for a length, which a graph could not."""
    torch.compiler.reset()
    model = make_model(FAMILIES["llama"], "fastattn").double().eval()
    expected = in_parts(model, DynamicCache(config=model.config), [9] + [1] * 6, PADDED)
    graphs = []

    def compiler(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    cache = StaticCache(config=model.config, max_cache_len=40)
    with torch.no_grad():
        found = [model(IDS[:, :9], attention_mask=PADDED[:, :9], cache=cache).logits]
        step = torch.compile(model, fullgraph=True, dynamic=False, backend=compiler)
        mask = torch.nn.functional.pad(PADDED, (0, 25), value=1)
        for place in range(9, 15):
            poison(cache)
            positions = torch.tensor([[place]])
            ids = IDS[:, place : place + 1]
            found.append(step(ids, attention_mask=mask, position_ids=positions, cache=cache).logits)
    real = PADDED.bool()
    torch.testing.assert_close(torch.cat(found, 1)[real], expected[real])
    assert len(graphs) == 1
