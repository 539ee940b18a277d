"""Generation of every decoder: with a cache the same tokens as without, in any company."""

from typing import Any

import pytest
import torch
from small_models import LANGUAGE_MODELS, TOKENS, small

import fastattn
from fastattn.generation import choose_tokens, stream
from fastattn.generation.sampling import penalize_repetition
from support import DEVICE

# What else has logits of every token is no decoder, or has no cache.
DECODERS = [
    name
    for name in LANGUAGE_MODELS
    if name.endswith(("ForCausalLM", "LMHeadModel"))
    and hasattr(LANGUAGE_MODELS[name], "make_cache")
]
BACKENDS = ["reference", pytest.param("triton", marks=pytest.mark.kernels)]
PROMPTS = torch.tensor([[5, 7, 9, 2, 3], [3, 8, 0, 0, 0], [1, 4, 6, 11, 0]])
LENGTHS = torch.tensor([5, 2, 4])


def generate_without_cache(model: Any, prompt: list[int], new: int) -> list[int]:
    """The most likely tokens, each from all before it."""
    tokens = list(prompt)
    device = next(model.parameters()).device
    for _ in range(new):
        with torch.no_grad():
            logits = model(torch.tensor([tokens], device=device)).logits[0, -1]
        tokens.append(int(logits.argmax()))
    return tokens


def model_on(name: str, backend: str, **options: Any) -> tuple[Any, Any]:
    device = "cpu" if backend == "reference" else DEVICE
    return small(name, **options).to(device), device


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", DECODERS)
def test_tokens_are_those_without_a_cache(name, backend):
    model, device = model_on(name, backend)
    with fastattn.backend(backend):
        made = fastattn.generate(
            model, PROMPTS.to(device), LENGTHS.to(device), max_new_tokens=4, pad=17
        )
        for place, length in enumerate(LENGTHS.tolist()):
            expected = generate_without_cache(model, PROMPTS[place, :length].tolist(), 4)
            assert made.tokens[place, : length + 4].tolist() == expected
            assert made.tokens[place, length + 4 :].eq(17).all()
    assert made.lengths.tolist() == (LENGTHS + 4).tolist()


def test_a_window_forgets_with_a_cache_as_without():
    model = small("MistralForCausalLM", sliding_window=3)
    made = fastattn.generate(model, PROMPTS[:1], max_new_tokens=8)
    assert made.tokens[0].tolist() == generate_without_cache(model, PROMPTS[0].tolist(), 8)


@pytest.mark.parametrize("chunk", [1, 2, 4, 5])
def test_prompts_may_be_read_in_parts(chunk):
    model = small("LlamaForCausalLM")
    options = {"max_new_tokens": 3}
    whole = fastattn.generate(model, PROMPTS, LENGTHS, **options)
    parts = fastattn.generate(model, PROMPTS, LENGTHS, prefill_chunk=chunk, **options)
    assert torch.equal(parts.tokens, whole.tokens)
    torch.testing.assert_close(parts.log_probs, whole.log_probs)


def test_log_probabilities_are_the_models():
    model = small("LlamaForCausalLM")
    made = fastattn.generate(model, PROMPTS, LENGTHS, max_new_tokens=4, do_sample=True, seed=3)
    for place, length in enumerate(LENGTHS.tolist()):
        tokens = made.tokens[place, : length + 4]
        with torch.no_grad():
            log_probs = model(tokens[None]).logits[0, length - 1 : -1].log_softmax(-1)
        expected = log_probs.gather(-1, tokens[length:, None])[:, 0]
        torch.testing.assert_close(made.log_probs[place], expected.float())


def test_a_stop_token_ends_its_sequence_alone():
    model = small("LlamaForCausalLM", max_position_embeddings=32)
    options: dict[str, Any] = {"max_new_tokens": 20, "do_sample": True, "temperature": 4.0}
    free = fastattn.generate(model, PROMPTS, LENGTHS, seed=1, **options)
    # The second sequence's third token; nothing before it is one.
    stop = int(free.tokens[1, 4])
    assert stop not in free.tokens[1, 2:4]
    heard = []
    made = fastattn.generate(
        model, PROMPTS, LENGTHS, seed=1, stop=[stop], on_token=heard.append, **options
    )
    assert made.lengths[1] == 5
    assert made.tokens[1, 4:].eq(stop).all()
    assert made.log_probs[1, 3:].eq(0).all()
    for place in (0, 2):
        end = int(made.lengths[place])
        assert torch.equal(made.tokens[place, :end], free.tokens[place, :end])
    assert heard[2].finished[1]
    assert heard[2].tokens[1] == stop


def test_the_loop_ends_with_its_sequences():
    model = small("LlamaForCausalLM", max_position_embeddings=64)
    steps = list(stream(model, PROMPTS, LENGTHS, max_new_tokens=40, stop=range(TOKENS)))
    assert len(steps) == 8
    assert all(step.finished.all() for step in steps)


def test_random_tokens_repeat_with_their_seed():
    model = small("LlamaForCausalLM")
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": True, "temperature": 2.0}
    first, second, other = (
        fastattn.generate(model, PROMPTS, LENGTHS, seed=seed, **options).tokens
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


DRAWS = 20_000
LOGITS = torch.tensor([2.0, 1.0, 0.5, -1.0, 1.5])


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"top_k": 2}, [0, 4]),
        # In falling order 0.43, 0.26, 0.16, 0.10, 0.02.
        ({"top_p": 0.8}, [0, 1, 4]),
        ({"top_p": 1e-6}, [0]),
        ({"min_p": 0.3}, [0, 1, 4]),
        ({"temperature": 0.5}, [0, 1, 2, 3, 4]),
    ],
)
def test_tokens_are_drawn_from_what_is_left(options, left):
    """By chi-square: a deviation as large comes once in a million."""
    logits = LOGITS / options.get("temperature", 1.0)
    expected = torch.zeros(5).index_copy(0, torch.tensor(left), logits[left].softmax(0))
    drawn = choose_tokens(
        LOGITS.expand(DRAWS, 5),
        do_sample=True,
        generator=torch.Generator().manual_seed(0),
        **options,
    )
    counts = drawn.bincount(minlength=5)
    assert counts[expected == 0].eq(0).all()
    wanted = DRAWS * expected[left]
    assert ((counts[left] - wanted) ** 2 / wanted).sum() < 35.0


def test_repeated_tokens_lose():
    logits = torch.tensor([[2.0, -1.0, 0.5, 3.0]] * 2)
    tokens = torch.tensor([[1, 3], [0, 2]])
    found = penalize_repetition(logits, tokens, torch.tensor([2, 1]), 2.0)
    assert found.tolist() == [[2.0, -2.0, 0.5, 1.5], [1.0, -1.0, 0.5, 3.0]]
    model = small("LlamaForCausalLM")
    made = fastattn.generate(model, PROMPTS, LENGTHS, max_new_tokens=8, repetition_penalty=1e6)
    for place, length in enumerate(LENGTHS.tolist()):
        tokens = made.tokens[place, : length + 8]
        # With positive logits left a token never comes twice.
        assert len(set(tokens[length:].tolist())) >= 7


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be positive"),
        ({"max_new_tokens": 13}, "need 17 positions, and LlamaForCausalLM has 16"),
        ({"lengths": torch.tensor([0, 1, 1])}, r"lengths must be in \[1, 5\]"),
        ({"lengths": torch.tensor([1])}, "lengths must be integers"),
        ({"tokens": torch.zeros(2, 0).long()}, "one token at least"),
        ({"do_sample": True, "temperature": 0.0}, "temperature must be positive"),
        ({"do_sample": True, "top_k": 0}, "top_k must be positive"),
        ({"do_sample": True, "top_p": 0.0}, "top_p must be in"),
        ({"do_sample": True, "min_p": 2.0}, "min_p must be in"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be positive"),
    ],
)
def test_what_does_not_fit_is_refused(wrong, message):
    given: dict[str, Any] = {"tokens": PROMPTS, "max_new_tokens": 2}
    with pytest.raises(ValueError, match=message):
        fastattn.generate(small("LlamaForCausalLM"), **{**given, **wrong})
