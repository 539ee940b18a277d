"""Rings of keys: random steps beside plain lists, several laps, models, how far they go back."""

from typing import Any

import pytest
import torch
from small_models import small

import fastattn
import fastattn.nn as fnn
from support import DEVICE, WIDEST, same_bits

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import Phase, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule  # noqa: E402

BACKENDS = ["reference", pytest.param("triton", marks=pytest.mark.kernels)]
CAPACITY, WINDOW, BATCH, DIM = 7, 4, 3, 4
SEQUENCES = st.integers(0, BATCH - 1)


def poison(cache: fnn.RingKVCache) -> None:
    """Make NaN of every place whose key has been left or cut off."""
    cache._write()
    _, reached = cache._find_lost(cache.lengths)
    for sequence, (length, end) in enumerate(
        zip(cache.lengths.tolist(), reached.tolist(), strict=True)
    ):
        held = [number % cache.capacity for number in range(max(0, end - cache.capacity), length)]
        unused = [place for place in range(cache.capacity) if place not in held]
        for pool in (cache.k, cache.v):
            if pool is not None:
                pool[sequence, :, unused] = float("nan")


def attend_to_all(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int
) -> torch.Tensor:
    """(M, D) attention of a sequence's last queries, in a window."""
    shape = (len(q), len(keys))
    last = len(keys) - len(q)
    seen = torch.ones(shape, dtype=torch.bool).tril(last).triu(last - window)
    scores = (q @ keys.T / q.shape[1] ** 0.5).masked_fill(~seen, float("-inf"))
    return scores.softmax(-1) @ values


class Steps(RuleBasedStateMachine):
    """What a ring attends to, beside a list of all tokens of each sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = fnn.RingKVCache(BATCH, 1, CAPACITY, DIM, window=WINDOW, dtype=torch.float64)
        self.generator = torch.Generator().manual_seed(0)
        # Of each sequence (n, 2, DIM): keys and values.
        self.held = [torch.zeros(0, 2, DIM, dtype=torch.float64)] * BATCH
        # How far each had got, and how many tokens it had before the last call.
        self.reached, self.before = [0] * BATCH, [0] * BATCH

    @rule(new=st.integers(0, 12), window=st.integers(0, WINDOW))
    def attend(self, new: int, window: int) -> None:
        q, k, v = torch.randn(
            3, BATCH, 1, new, DIM, generator=self.generator, dtype=torch.float64
        ).unbind()
        self.before = [len(tokens) for tokens in self.held]
        found = self.cache.attend(q, k, v, window=window)
        added = torch.stack((k, v), 3)[:, 0]
        self.held = [torch.cat(pair) for pair in zip(self.held, added, strict=True)]
        self.reached = [max(x, len(t)) for x, t in zip(self.reached, self.held, strict=True)]
        for sequence, tokens in enumerate(self.held):
            expected = attend_to_all(q[sequence, 0], *tokens.unbind(1), window)
            torch.testing.assert_close(found[sequence, 0], expected)

    @rule(lengths=st.lists(st.integers(0, 30), min_size=BATCH, max_size=BATCH), one=st.booleans())
    def crop(self, lengths: list[int], one: bool) -> None:
        lengths = [lengths[0]] * BATCH if one else lengths
        kept = [min(n, len(tokens)) for n, tokens in zip(lengths, self.held, strict=True)]
        # What may always be done: back to before the last call, or by as many as fit in the ring.
        allowed = all(
            n == 0 or n >= min(before, reached - (CAPACITY - WINDOW))
            for n, before, reached in zip(kept, self.before, self.reached, strict=True)
        )
        before = self.cache.lengths
        try:
            self.cache.crop(lengths[0] if one else torch.tensor(lengths))
        except ValueError:
            assert not allowed
            assert self.cache.lengths is before
            return
        self.held = [tokens[:n] for tokens, n in zip(self.held, kept, strict=True)]
        self.before = [min(n, before) for n, before in zip(kept, self.before, strict=True)]
        self.reached = [x if n else 0 for n, x in zip(kept, self.reached, strict=True)]

    @rule(order=st.lists(SEQUENCES, min_size=BATCH, max_size=BATCH))
    def reorder(self, order: list[int]) -> None:
        self.cache.reorder(torch.tensor(order))
        self.held = [self.held[sequence] for sequence in order]
        self.reached = [self.reached[sequence] for sequence in order]
        self.before = [len(tokens) for tokens in self.held]

    @rule()
    def forget_what_is_left(self) -> None:
        poison(self.cache)
        self.before = [len(tokens) for tokens in self.held]

    @invariant()
    def counts_tokens(self) -> None:
        counts = [len(tokens) for tokens in self.held]
        assert counts == self.cache.lengths.tolist()
        assert self.cache.tokens == max(counts)
        assert self.cache.k.shape == (BATCH, 1, CAPACITY, DIM)


Steps.TestCase.settings = settings(
    max_examples=15,
    stateful_step_count=20,
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.generate, Phase.shrink],
)
TestSteps = Steps.TestCase


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("options", "terms"),
    [
        ({"softcap": 5.0, "sinks": True}, {}),
        ({"relative": fnn.AlibiPositions(4)}, {"starts": [0, 6]}),
        ({"rotary": fnn.RotaryEmbedding(8)}, {}),
    ],
    ids=["softcap and sinks", "alibi and padding", "rotary"],
)
def test_laps_are_the_whole(options: dict[str, Any], terms: dict[str, Any], backend: str):
    """Steps, and prompts of all lengths beside the window's, over seven laps."""
    device, dtype = ("cpu", torch.float64) if backend == "reference" else (DEVICE, WIDEST)
    torch.manual_seed(0)
    attention = fnn.Attention(32, 4, 2, causal=True, window=4, **options).to(dtype).eval()
    if attention.sinks is not None:
        torch.nn.init.normal_(attention.sinks)
    attention = attention.to(device)
    x = torch.randn(2, 52, 32, dtype=dtype, device=device)
    given = {name: torch.tensor(value, device=device) for name, value in terms.items()}
    cache = fnn.RingKVCache(2, 2, 7, 8, window=4, dtype=dtype, device=device)
    whole = fnn.KVCache(2, 2, 52, 8, dtype=dtype, device=device)
    found = []
    with fastattn.backend(backend), torch.no_grad():
        for part in x.split([5, 1, 1, 3, 8, 2, 1, 14, 1, 3, 3, 9, 1], 1):
            own = dict(given)
            if "rotary" in options:
                own["positions"] = cache.lengths[:, None] + torch.arange(
                    part.shape[1], device=device
                )
            poison(cache)
            found.append(attention(part, cache=cache, **own))
        if "rotary" in options:
            given["positions"] = 0
        expected = attention(x, cache=whole, **given)
    torch.testing.assert_close(torch.cat(found, 1), expected)


def test_a_latent_ring():
    torch.manual_seed(0)
    cache, whole = (
        fnn.RingKVCache(2, 1, 6, 8, window=3, value_dim=5, latent=True),
        fnn.KVCache(2, 1, 20, 8, value_dim=5, latent=True),
    )
    for new in (2, 7, 1, 1, 4):
        q, k = torch.randn(2, 4, new, 8), torch.randn(2, 1, new, 8)
        options = {"window": 3, "return_lse": True}
        found, expected = (own.attend(q, k, **options) for own in (cache, whole))
        torch.testing.assert_close(found, expected)


def test_all_that_new_queries_see():
    cache, k = fnn.RingKVCache(1, 1, 5, 2, window=3), torch.randn(2, 1, 1, 20, 2)
    for start, end in ((0, 2), (2, 4), (4, 5), (5, 14), (14, 15)):
        keys, values = cache.update(*k[:, :, :, start:end])
        first = max(0, start - 3)
        assert same_bits(keys, k[0, :, :, first:end])
        assert same_bits(values, k[1, :, :, first:end])


WINDOWS = [
    ("MistralForCausalLM", [64, 64]),
    ("Gemma2ForCausalLM", [64, 90]),
    ("GptOssForCausalLM", [64, 90]),
]


@pytest.mark.parametrize(("name", "capacities"), WINDOWS)
def test_windows_of_models_are_rings(name: str, capacities: list[int]):
    """Prompts of different lengths, whole and in parts, and tokens over the end of the ring."""
    model = small(name, sliding_window=5, max_position_embeddings=128)
    caches = model.make_cache(3, 90)
    assert [cache.capacity for cache in caches] == capacities
    assert isinstance(caches[0], fnn.RingKVCache)
    assert all(cache.capacity == 60 for cache in model.make_cache(3, 60))
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(model.config.vocab_size, (3, 70), generator=generator)
    lengths = torch.tensor([70, 3, 41])
    for chunk in (None, 32):
        made = fastattn.generate(model, prompts, lengths, max_new_tokens=20, prefill_chunk=chunk)
        for tokens, length in zip(made.tokens, lengths.tolist(), strict=True):
            with torch.no_grad():
                logits = model(tokens[None, : length + 19]).logits[0, length - 1 :]
            assert torch.equal(tokens[length : length + 20], logits.argmax(-1))


def test_a_stack_goes_back_with_all_its_layers_or_none():
    options: dict[str, Any] = {"dtype": torch.float64}
    stack = fnn.CacheStack(
        [fnn.KVCache(2, 1, 30, 4, **options), fnn.RingKVCache(2, 1, 6, 4, window=3, **options)]
    )
    for new in (4, 12, 2):
        for cache in stack:
            cache.append(*torch.zeros(2, 2, 1, new, 4).double())
    with pytest.raises(ValueError, match="of 18 tokens the first 14 cannot be kept alone"):
        stack.crop(torch.tensor([17, 14]))
    assert stack.lengths.tolist() == [18, 18]
    stack.crop(15)
    stack.crop(0)
    assert [cache.tokens for cache in stack] == [0, 0]


def test_what_has_been_written_over_is_nan_where_it_is_not_looked_at(monkeypatch):
    """As of numbers on a GPU: the sequence that went back too far alone."""
    monkeypatch.setattr(fnn.RingKVCache, "_check_crop", lambda cache, lengths: None)
    cache, whole = fnn.RingKVCache(2, 1, 6, 4, window=3), fnn.KVCache(2, 1, 30, 4)
    k, v = torch.randn(2, 2, 1, 7, 4)
    for own in (cache, whole):
        for start, end in ((0, 5), (5, 7)):
            own.append(k[:, :, start:end], v[:, :, start:end])
        own.crop(torch.tensor([3, 6]))
    q, k, v = torch.randn(3, 2, 1, 1, 4)
    found, expected = (own.attend(q, k, v, window=3) for own in (cache, whole))
    assert found[0].isnan().all()
    torch.testing.assert_close(found[1], expected[1])


def test_what_does_not_fit_is_refused():
    for window in (-1, 4):
        with pytest.raises(ValueError, match=r"window must be in \[0, 4\)"):
            fnn.RingKVCache(1, 1, 4, 8, window=window)
    cache, x = fnn.RingKVCache(1, 1, 4, 8, window=2), torch.zeros(3, 1, 1, 1, 8)
    for window in (None, 3, (None, 0), (3, 0)):
        with pytest.raises(ValueError, match="window must be 2 or less"):
            cache.attend(*x, window=window)
    with pytest.raises(ValueError, match="score_mods would get other places"):
        cache.attend(*x, window=2, score_mods=[object()])
    for new in (1, 4):
        with pytest.raises(ValueError, match="k and k_cache must fit"):
            cache.append(*torch.zeros(2, 1, 2, new, 8))
    assert cache.tokens == 0
    assert cache._unwritten is None
