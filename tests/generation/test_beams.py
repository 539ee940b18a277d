"""Beams find what transformers' beams find, and enough of them the best that there is."""

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
from small_models import TOKENS, small

import fastattn
import fastattn.nn as fnn
from fastattn.ops.core.backends import INTERPRETED

reference_only = pytest.mark.skipif(INTERPRETED, reason="compares the reference backend")
NAMES = ["LlamaForCausalLM", *PAIRS]
RULES: list[dict[str, Any]] = [
    {"num_beams": 1},
    *(
        {"num_beams": beams, "length_penalty": penalty, "early_stopping": early}
        for beams, penalty, early in [
            (2, 1.0, False),
            (3, 0.0, False),
            (3, 2.0, "never"),
            (3, 1.0, True),
            (4, -0.7, "never"),
            (4, -0.7, False),
            (3, 1.0, False),
        ]
    ),
    {"num_beams": 3, "repetition_penalty": 1.7},
]
# Where it changes the result that candidates beyond the first n do not finish, that a prompt whose
# search has ended takes nothing up, and that "never" hopes for the greatest length.
TELLING: dict[str, list[tuple[int, float, Any, list[int]]]] = {
    "LlamaForCausalLM": [
        (3, 0.0, False, [2, 20]),
        (4, 1.0, False, [4, 7, 10, 16, 5]),
        (3, 1.0, "never", [4]),
        (2, 2.0, "never", [4, 17, 21, 9, 11]),
    ],
    "T5ForConditionalGeneration": [(2, 0.5, False, [17, 14])],
    "BartForConditionalGeneration": [(2, 0.0, False, [17, 10, 11])],
}


def starts_of(name: str) -> list[int]:
    return [1] * len(LENGTHS) if name in PAIRS else LENGTHS.tolist()


@reference_only
@pytest.mark.parametrize("name", NAMES)
def test_sequences_and_scores_are_those_of_transformers(name, tmp_path):
    """With one stop token, several and none, and searches that end long before the last token."""
    theirs, model = both(name, tmp_path)
    ended_early = 0
    free, _ = written(theirs, 6, [])
    stops = [[], [free[1][2]], [free[0][-1], free[2][4], 12]]
    cases = [(rules, stops[number % 3]) for number, rules in enumerate(RULES)]
    for beams, penalty, early, stop in TELLING[name]:
        rules = {"num_beams": beams, "length_penalty": penalty, "early_stopping": early}
        cases.append((rules, stop))
    for rules, stop in cases:
        if name == "LlamaForCausalLM" and "repetition_penalty" in rules:
            # transformers would lessen the padding on the left as well.
            continue
        made = fastattn.generate(model, PROMPTS, LENGTHS, max_new_tokens=18, stop=stop, **rules)
        expected, scores = written(theirs, 18, stop, **rules)
        assert_same(continuations(made, starts_of(name)), expected)
        if rules["num_beams"] > 1:
            torch.testing.assert_close(made.scores, scores)
        ended_early += max(map(len, expected)) < 18
    assert ended_early > 1


@pytest.mark.parametrize("name", NAMES)
def test_enough_beams_find_the_best(name):
    """Of all sequences of two tokens, for every prompt."""
    model: Any = small(name)
    made = fastattn.generate(model, PROMPTS, LENGTHS, max_new_tokens=2, num_beams=TOKENS)
    pairs = torch.cartesian_prod(torch.arange(TOKENS), torch.arange(TOKENS))
    for place, start in enumerate(starts_of(name)):
        prompt = made.tokens[place, :start].expand(len(pairs), -1)
        tokens = torch.cat((prompt, pairs), 1)
        given: dict[str, Any] = {"input_ids": tokens}
        if name in PAIRS:
            source = PROMPTS[place, : LENGTHS[place]].expand(len(pairs), -1)
            given = {"input_ids": source, "decoder_input_ids": tokens}
        with torch.no_grad():
            log_probs = model(**given).logits[:, start - 1 : -1].log_softmax(-1)
        totals = log_probs.gather(-1, pairs[..., None])[..., 0].sum(1)
        assert made.tokens[place, start : start + 2].tolist() == pairs[totals.argmax()].tolist()
        assert made.scores is not None
        torch.testing.assert_close(made.scores[place], (totals.max() / 2).float())


@pytest.mark.parametrize("name", NAMES)
def test_log_probabilities_and_scores_are_the_models(name):
    model: Any = small(name)
    options: dict[str, Any] = {"max_new_tokens": 9, "num_beams": 3, "length_penalty": 0.6}
    free = fastattn.generate(model, PROMPTS, LENGTHS, **options)
    stop = [int(free.tokens[0, starts_of(name)[0]]), 12]
    made = fastattn.generate(model, PROMPTS, LENGTHS, stop=stop, **options)
    assert made.scores is not None
    assert (made.lengths - torch.tensor(starts_of(name)) < 9).any()
    for place, start in enumerate(starts_of(name)):
        tokens = made.tokens[place : place + 1, : made.lengths[place]]
        given: dict[str, Any] = {"input_ids": tokens}
        if name in PAIRS:
            source = PROMPTS[place : place + 1, : LENGTHS[place]]
            given = {"input_ids": source, "decoder_input_ids": tokens}
        with torch.no_grad():
            log_probs = model(**given).logits[0, start - 1 : -1].log_softmax(-1)
        expected = log_probs.gather(-1, tokens[0, start:, None])[:, 0].float()
        new = len(expected)
        torch.testing.assert_close(made.log_probs[place, :new], expected)
        assert made.log_probs[place, new:].eq(0).all()
        assert made.tokens[place, made.lengths[place] :].eq(stop[0]).all()
        torch.testing.assert_close(made.scores[place], expected.sum() / new**0.6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "BartForConditionalGeneration"])
def test_beams_share_pages(name, backend):
    """And through kernels they are what they are without pages on the reference."""
    model, device = model_on(name, backend)
    options: dict[str, Any] = {"max_new_tokens": 4, "num_beams": 2, "stop": [7]}
    with fastattn.backend("reference"):
        expected = fastattn.generate(small(name), PROMPTS, LENGTHS, **options)
    plain, pools = model.make_cache, []

    def make_pages(batch: int, capacity: int) -> Any:
        cache = plain(batch, capacity)
        own = cache[0].k
        where: dict[str, Any] = {"device": device, "dtype": own.dtype}
        first = fnn.PagedKVCache(24, 2, own.shape[1], own.shape[3], batch=batch, **where)
        pages = [first, *(first.beside() for _ in cache[1:])]
        pools.extend(pages)
        return type(cache)(pages)

    model.make_cache = make_pages
    with fastattn.backend(backend):
        made = fastattn.generate(model, PROMPTS.to(device), LENGTHS.to(device), **options)
    assert torch.equal(made.tokens.cpu(), expected.tokens)
    torch.testing.assert_close(made.scores, expected.scores, check_device=False)
    assert all(pool.batch == 6 for pool in pools)


@pytest.mark.parametrize("chunk", [1, 2])
def test_prompts_of_beams_may_be_read_in_parts(chunk):
    model = small("LlamaForCausalLM")
    options: dict[str, Any] = {"max_new_tokens": 4, "num_beams": 2}
    whole = fastattn.generate(model, PROMPTS, LENGTHS, **options)
    parts = fastattn.generate(model, PROMPTS, LENGTHS, prefill_chunk=chunk, **options)
    assert torch.equal(parts.tokens, whole.tokens)


def test_repeated_tokens_lose_in_prompts_of_every_length():
    model = small("LlamaForCausalLM")
    options: dict[str, Any] = {"max_new_tokens": 5, "num_beams": 3, "repetition_penalty": 1.5}
    made = fastattn.generate(model, PROMPTS, LENGTHS, **options)
    for place, length in enumerate(LENGTHS.tolist()):
        alone = fastattn.generate(model, PROMPTS[place : place + 1, :length], **options)
        end = length + 5
        assert torch.equal(alone.tokens[0], made.tokens[place, :end])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_beams": 0}, "num_beams must be positive"),
        ({"do_sample": True}, "neither sampled nor drafted"),
        ({"draft": small("LlamaForCausalLM")}, "neither sampled nor drafted"),
        ({"on_token": print}, "on_token hears of one token"),
        ({"early_stopping": "soon"}, "early_stopping must be True, False or 'never'"),
        ({"stop": range(TOKENS)}, "need 50 continuations each step"),
    ],
)
def test_what_does_not_fit_is_refused(wrong, message):
    given: dict[str, Any] = {"max_new_tokens": 2, "num_beams": 2}
    with pytest.raises(ValueError, match=message):
        fastattn.generate(small("LlamaForCausalLM"), PROMPTS, **{**given, **wrong})
