"""A draft changes how tokens come about, and not which come, nor how often."""

from typing import Any

import pytest
import torch
from generation_support import LENGTHS, PAIRS, PROMPTS, model_on, other
from small_models import small

import fastattn
import fastattn.nn as fnn
from fastattn.generation.sampling import penalize_repetition, token_probabilities
from fastattn.generation.speculative import accept

COUPLES = [
    ("LlamaForCausalLM", "LlamaForCausalLM"),
    ("GPT2LMHeadModel", "LlamaForCausalLM"),
    ("DeepseekV3ForCausalLM", "GPT2LMHeadModel"),
    *((name, name) for name in PAIRS),
]


@pytest.mark.parametrize("guesses", [1, 5])
@pytest.mark.parametrize(("name", "of_draft"), COUPLES)
def test_greedy_tokens_are_those_without_a_draft(name, of_draft, guesses):
    """Up to the model's last position, which guesses would go beyond, and with stop tokens."""
    model: Any = small(name)
    free = fastattn.generate(model, PROMPTS, LENGTHS, max_new_tokens=12)
    # The first sequence ends early, the others later or not at all.
    for stop in ([], [int(free.tokens[0, 7])]):
        options: dict[str, Any] = {"max_new_tokens": 12, "stop": stop, "pad": 23}
        expected = fastattn.generate(model, PROMPTS, LENGTHS, **options)
        draft = other(model, of_draft)
        made = fastattn.generate(
            model, PROMPTS, LENGTHS, draft=draft, num_draft_tokens=guesses, **options
        )
        assert torch.equal(made.tokens, expected.tokens)
        assert torch.equal(made.lengths, expected.lengths)
        torch.testing.assert_close(made.log_probs, expected.log_probs)


def test_rings_of_windows_take_back_the_most_guesses_that_are_allowed():
    model: Any = small("MistralForCausalLM", sliding_window=3, max_position_embeddings=256)
    options: dict[str, Any] = {"max_new_tokens": 90}
    expected = fastattn.generate(model, PROMPTS, LENGTHS, **options)
    draft = other(model, "MistralForCausalLM", sliding_window=3, max_position_embeddings=256)
    made = fastattn.generate(model, PROMPTS, LENGTHS, draft=draft, num_draft_tokens=32, **options)
    assert torch.equal(made.tokens, expected.tokens)


@pytest.mark.kernels
@pytest.mark.slow
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "BartForConditionalGeneration"])
def test_kernels_verify_as_the_reference_chooses(name):
    model, device = model_on(name, "triton")
    options: dict[str, Any] = {"max_new_tokens": 5}
    with fastattn.backend("reference"):
        expected = fastattn.generate(small(name), PROMPTS, LENGTHS, **options)
    with fastattn.backend("triton"):
        made = fastattn.generate(
            model, PROMPTS.to(device), LENGTHS.to(device), draft=other(model, name), **options
        )
    assert torch.equal(made.tokens.cpu(), expected.tokens)


def count_reads(model: Any) -> list[int]:
    """A list that grows by how many tokens of a sequence each call of `read` gets."""
    reads, plain = [], model.read

    def read(tokens: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        reads.append(tokens.shape[1])
        return plain(tokens, *arguments, **options)

    model.read = read
    return reads


@pytest.mark.parametrize("do_sample", [False, True])
def test_all_guesses_of_the_model_itself_are_kept(do_sample):
    model, draft = small("LlamaForCausalLM"), small("LlamaForCausalLM")
    reads = count_reads(model)
    fastattn.generate(
        model, PROMPTS, LENGTHS, max_new_tokens=12, draft=draft, num_draft_tokens=3,
        do_sample=do_sample, top_k=5, seed=0,
    )  # fmt: skip
    # The prompts, and 12 tokens in rounds of 3 guesses and one that follows from them.
    assert reads == [5, 4, 4, 4]


def test_drafts_end_with_the_last_sequence():
    model: Any = small("LlamaForCausalLM")
    free = fastattn.generate(model, PROMPTS, LENGTHS, max_new_tokens=12)
    stop = sorted({int(free.tokens[place, n + 1]) for place, n in enumerate(LENGTHS.tolist())})
    reads = count_reads(model)
    made = fastattn.generate(
        model, PROMPTS, LENGTHS, max_new_tokens=12, draft=model, num_draft_tokens=2, stop=stop
    )
    assert (made.lengths <= LENGTHS + 2).all()
    # As draft the model reads twice for its guesses, and the last of these.
    assert reads == [5, 5, 1, 1, 1, 3]


DRAWS = 6000
SIZES: dict[str, Any] = {"vocab_size": 4, "pad_token_id": None}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.6, "top_k": 3},
        {"top_p": 0.85, "repetition_penalty": 1.6},
        {"temperature": 2.0, "min_p": 0.2},
    ],
    ids=["plain", "top k", "top p", "min p"],
)
def test_the_distribution_is_the_models(options):
    """Of three tokens together, by chi-square: a deviation as large comes once in a million."""
    model: Any = small("LlamaForCausalLM", **SIZES)
    draft = other(model, "LlamaForCausalLM", **SIZES)
    prompt = torch.tensor([[2, 1]])
    expected = probabilities_of_three(model, prompt, **options)
    made = fastattn.generate(
        model,
        prompt.expand(DRAWS, -1),
        max_new_tokens=3,
        draft=draft,
        num_draft_tokens=2,
        do_sample=True,
        seed=0,
        **options,
    )
    drafts = probabilities_of_three(draft, prompt, **options)
    counts = (made.tokens[:, 2:] * torch.tensor([16, 4, 1])).sum(1).bincount(minlength=64)
    assert counts[expected == 0].eq(0).all()
    # What comes less than five times on average is one category.
    rare = expected * DRAWS < 5.0
    assert deviation(counts, expected, rare) < CRITICAL[int((~rare).sum())]
    # And the draft's own distribution would be found out.
    assert deviation(drafts * DRAWS, expected, rare) > 300.0


def deviation(counts: torch.Tensor, expected: torch.Tensor, rare: torch.Tensor) -> float:
    """The chi-square of counts, with the rare ones together."""
    together = [torch.cat((x[~rare], x[rare].sum()[None])) for x in (counts, expected * DRAWS)]
    found, wanted = (x[together[1] > 0] for x in together)
    return float(((found - wanted) ** 2 / wanted).sum())


CRITICAL = {n: n + 5 * (2 * n) ** 0.5 + 20 for n in range(65)}
"""More than what comes once in a million, for so many degrees of freedom."""


@torch.no_grad()
def probabilities_of_three(
    model: Any, prompt: torch.Tensor, repetition_penalty: float = 1.0, **options: Any
) -> torch.Tensor:
    """(64,) how probable each sequence of three tokens is behind the prompt."""
    tokens, total = prompt, torch.ones(1)
    for _ in range(3):
        logits = model(tokens).logits[:, -1]
        if repetition_penalty != 1.0:
            counts = torch.full((len(tokens),), tokens.shape[1])
            logits = penalize_repetition(logits, tokens, counts, repetition_penalty)
        chances = token_probabilities(logits, do_sample=True, **options)
        total = (total[:, None] * chances).flatten()
        new = torch.arange(4).repeat(len(tokens))[:, None]
        tokens = torch.cat((tokens.repeat_interleave(4, 0), new), 1)
    return total


def test_what_is_refused_comes_from_the_rest():
    """One guess: kept as often as the distributions overlap, with the model's distribution."""
    p = torch.tensor([0.5, 0.3, 0.2, 0.0]).expand(DRAWS, 2, 4)
    q = torch.tensor([0.1, 0.1, 0.2, 0.6]).expand(DRAWS, 1, 4)
    generator = torch.Generator().manual_seed(0)
    guesses = torch.multinomial(q[:, 0], 1, generator=generator)
    kept, token = accept(p, q, guesses, generator)
    first = torch.where(kept > 0, guesses[:, 0], token)
    counts = first.bincount(minlength=4)
    assert counts[3] == 0
    assert ((counts - p[0, 0] * DRAWS) ** 2 / (p[0, 0] * DRAWS))[:3].sum() < 30.0
    # A binomial's six standard deviations.
    assert abs(int(kept.sum()) - 0.4 * DRAWS) < 6 * (0.24 * DRAWS) ** 0.5


def test_random_tokens_repeat_with_their_seed():
    model: Any = small("LlamaForCausalLM")
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": True, "temperature": 2.0}
    first, second, different = (
        fastattn.generate(
            model, PROMPTS, LENGTHS, seed=seed, draft=other(model, "LlamaForCausalLM"), **options
        ).tokens
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, different)


def test_caches_may_have_pages():
    model: Any = small("LlamaForCausalLM")
    expected = fastattn.generate(model, PROMPTS, LENGTHS, max_new_tokens=9)
    draft = other(model, "LlamaForCausalLM")

    def make_pages(batch: int, capacity: int) -> fnn.CacheStack:
        first = fnn.PagedKVCache(40, 2, 1, 4, batch=batch, dtype=torch.float64)
        return fnn.CacheStack([first, first.beside()])

    for one in (model, draft):
        one.make_cache = make_pages
    made = fastattn.generate(model, PROMPTS, LENGTHS, max_new_tokens=9, draft=draft)
    assert torch.equal(made.tokens, expected.tokens)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_draft_tokens": 0}, r"num_draft_tokens must be in \[1, 32\], got 0"),
        ({"num_draft_tokens": 33}, "num_draft_tokens must be in .*, got 33"),
        ({"draft": small("T5ForConditionalGeneration")}, "a decoder for a decoder"),
        ({"draft": small("LlamaForCausalLM", vocab_size=9)}, "vocabulary of 24 tokens, got 9"),
        ({"on_token": print}, "on_token hears of one token"),
        ({"max_new_tokens": 13}, "need 17 positions"),
    ],
)
def test_what_does_not_fit_is_refused(wrong, message):
    model: Any = small("LlamaForCausalLM")
    given: dict[str, Any] = {"max_new_tokens": 2, "draft": model}
    with pytest.raises(ValueError, match=message):
        fastattn.generate(model, PROMPTS, **{**given, **wrong})
