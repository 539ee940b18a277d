"""Encoder-decoders generate from caches what they generate without, and what transformers does."""

from typing import Any

import pytest
import torch
from generation_support import (
    BACKENDS,
    LENGTHS,
    PAIRS,
    PROMPTS,
    assert_same,
    both,
    continuations,
    model_on,
    written,
)
from small_models import small

import fastattn
import fastattn.nn as fnn
from fastattn.ops.core.backends import INTERPRETED
from support import same_bits

reference_only = pytest.mark.skipif(INTERPRETED, reason="compares the reference backend")


def generate_without_cache(model: Any, source: torch.Tensor, begun: list[int], new: int) -> Any:
    """The most likely tokens, each from all before it and from the source read anew."""
    tokens = list(begun)
    for _ in range(new):
        given = torch.tensor([tokens], device=source.device)
        with torch.no_grad():
            logits = model(source[None], decoder_input_ids=given).logits[0, -1]
        tokens.append(int(logits.argmax()))
    return tokens


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PAIRS)
def test_tokens_are_those_without_a_cache(name, backend):
    model, device = model_on(name, backend)
    start = model.config.decoder_start_token_id
    with fastattn.backend(backend):
        made = fastattn.generate(
            model, PROMPTS.to(device), LENGTHS.to(device), max_new_tokens=4, pad=17
        )
        for place, length in enumerate(LENGTHS.tolist()):
            source = PROMPTS[place, :length].to(device)
            assert made.tokens[place].tolist() == generate_without_cache(model, source, [start], 4)
    assert made.lengths.tolist() == [5, 5, 5]


@reference_only
@pytest.mark.parametrize("options", [{}, {"feed_forward_proj": "gated-gelu"}], ids=["t5", "1.1"])
@pytest.mark.parametrize("name", PAIRS)
def test_tokens_are_those_of_transformers(name, options, tmp_path):
    options = options if name.startswith("T5") else {"scale_embedding": bool(options)}
    theirs, model = both(name, tmp_path, **options)
    for stop in ([], [7, 12]):
        made = fastattn.generate(model, PROMPTS, LENGTHS, max_new_tokens=10, stop=stop)
        expected, _ = written(theirs, 10, stop)
        assert_same(continuations(made, [1, 1, 1]), expected)


@pytest.mark.parametrize("name", PAIRS)
def test_the_source_is_read_once(name):
    model: Any = small(name)
    body = model.base
    watched = [body.encoder, *(m for n, m in body.decoder.named_modules() if is_cross_key(n))]
    calls = dict.fromkeys(watched, 0)

    def count(module: Any, *_: Any) -> None:
        calls[module] += 1

    for module in watched:
        module.register_forward_hook(count)
    fastattn.generate(model, PROMPTS, LENGTHS, max_new_tokens=5)
    # One encoder, and the keys of two layers.
    assert list(calls.values()) == [1, 1, 1]


def is_cross_key(name: str) -> bool:
    return name.endswith(("EncDecAttention.k", "encoder_attn.k_proj"))


@pytest.mark.parametrize("chunk", [None, 1, 2])
@pytest.mark.parametrize("name", PAIRS)
def test_a_decoder_may_begin_with_more_tokens(name, chunk):
    model, begun = small(name), torch.tensor([[2, 9, 4]] * 3)
    options: dict[str, Any] = {"decoder_tokens": begun, "max_new_tokens": 3}
    made = fastattn.generate(model, PROMPTS, LENGTHS, prefill_chunk=chunk, **options)
    for place, length in enumerate(LENGTHS.tolist()):
        expected = generate_without_cache(model, PROMPTS[place, :length], [2, 9, 4], 3)
        assert made.tokens[place].tolist() == expected
    steps = list(fastattn.stream(model, PROMPTS, LENGTHS, **options))
    assert torch.equal(torch.stack([s.tokens for s in steps], 1), made.tokens[:, 3:])


@pytest.mark.parametrize("name", [*PAIRS, "T5Model", "BartModel"])
def test_forwards_with_a_cache_are_the_whole(name):
    """Also where sources differ in length, what is behind them is NaN, and sequences move."""
    model: Any = small(name)
    tokens = torch.tensor([[2, 9, 4, 5], [2, 3, 8, 6], [2, 2, 7, 1]])
    given: dict[str, Any] = {"attention_mask": LENGTHS}
    cache = model.make_cache(3, 4)
    for own in cache:
        own.k.fill_(float("nan"))
        own.v.fill_(float("nan"))

    def read(output: Any) -> torch.Tensor:
        return output.last_hidden_state if name.endswith("Model") else output.logits

    with torch.no_grad():
        whole = read(model(PROMPTS, **given, decoder_input_ids=tokens))
        first = read(model(PROMPTS, **given, decoder_input_ids=tokens[:, :2], cache=cache))
        for context in cache.contexts:
            context.k = context.k.clone()
            for place, length in enumerate(LENGTHS.tolist()):
                context.k[place, :, length:] = float("nan")
        order = torch.tensor([2, 0, 1])
        cache.reorder(order)
        rest = read(model(decoder_input_ids=tokens[order, 2:], cache=cache))
    torch.testing.assert_close(first, whole[:, :2])
    torch.testing.assert_close(rest, whole[order, 2:])


def test_what_does_not_go_with_a_cache_is_refused():
    model: Any = small("T5ForConditionalGeneration")
    tokens = torch.tensor([[0, 3]] * 3)
    cache = model.make_cache(3, 4)
    given: dict[str, Any] = {"decoder_input_ids": tokens}
    with pytest.raises(TypeError, match="input_ids may be left out only where a cache has them"):
        model(**given)
    with pytest.raises(ValueError, match="no context has been read"):
        model(**given, cache=model.make_cache(3, 4))
    mask = torch.ones_like(PROMPTS)
    with pytest.raises(ValueError, match="attention_mask is the number of each source's tokens"):
        model(PROMPTS, mask, **given, cache=cache)
    with pytest.raises(ValueError, match="beside a cache there is no decoder_attention_mask"):
        model(PROMPTS, decoder_attention_mask=mask[:, :2], **given, cache=cache)
    with pytest.raises(ValueError, match="the cache has 1 layer"):
        model(PROMPTS, **given, cache=fnn.EncoderDecoderCache(list(cache)[:1]))
    model.train()
    with pytest.raises(ValueError, match="no dropout of attention to a cache"):
        model(PROMPTS, **given, cache=model.make_cache(3, 4))
    with pytest.raises(TypeError, match="give input_ids or decoder_input_ids"):
        small("BartModel")()


def test_sequences_of_one_context_stay_together():
    model: Any = small("BartForConditionalGeneration")
    cache = model.make_cache(3, 4)
    tokens = torch.tensor([[2, 9], [2, 3], [2, 8]])
    with torch.no_grad():
        model(PROMPTS, LENGTHS, decoder_input_ids=tokens, cache=cache)
        cache.repeat(2)
        held = [own.k.clone() for own in cache]
        with pytest.raises(ValueError, match="change places among each other alone"):
            cache.reorder(torch.tensor([0, 1, 2, 3, 4, 0]))
        assert all(same_bits(own.k, k) for own, k in zip(cache, held, strict=True))
        cache.reorder(torch.tensor([1, 0, 3, 3, 5, 4]))
        new = torch.tensor([[4], [5], [6], [7], [8], [9]])
        found = model(decoder_input_ids=new, cache=cache).logits[:, 0]
        places = torch.arange(6) // 2
        whole = torch.cat((tokens[places], new), 1)
        given = {"attention_mask": LENGTHS[places], "decoder_input_ids": whole}
        expected = model(PROMPTS[places], **given).logits[:, -1]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("LlamaForCausalLM", {"decoder_tokens": PROMPTS}, "are for encoder-decoders"),
        (PAIRS[0], {"decoder_tokens": PROMPTS[:1]}, "must have one batch, got 3 and 1"),
        (PAIRS[0], {"decoder_tokens": PROMPTS[:, :0]}, "decoder_tokens must be integers"),
        (PAIRS[0], {"prefill_chunk": 0}, "prefill_chunk must be positive"),
    ],
)
def test_what_a_decoder_cannot_begin_with_is_refused(name, wrong, message):
    with pytest.raises(ValueError, match=message):
        fastattn.generate(small(name), PROMPTS, LENGTHS, max_new_tokens=2, **wrong)
