"""Pages of one pool: by random steps beside plain lists, in models, and where there are too few."""

from typing import Any

import pytest
import torch
from small_models import small

import fastattn
import fastattn.nn as fnn
from support import DEVICE, same_bits

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import Phase, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule  # noqa: E402

BACKENDS = ["reference", pytest.param("triton", marks=pytest.mark.kernels)]
PAGES, PAGE, BATCH, DIM = 7, 3, 3, 4
SEQUENCES = st.integers(0, BATCH - 1)


def state(cache: fnn.PagedKVCache) -> tuple[Any, ...]:
    """All that a step changes, on the device and on the host."""
    tensors = [cache.k, cache.v, cache.lengths, cache.block_table]
    table = cache._table
    own = [list(pages) for pages in table.pages]
    counted = [x.nan_to_num(9e9).tolist() for x in tensors if x is not None]
    return (counted, list(cache.counts), own, list(table.free), list(table.owners), cache.tokens)


def poison(cache: fnn.PagedKVCache) -> None:
    """Make NaN of every place that no token has."""
    used = torch.zeros(cache.k.shape[0], cache.page_size, dtype=torch.bool)
    for count, pages in zip(cache.counts, cache._table.pages, strict=True):
        for place in range(count):
            used[pages[place // cache.page_size], place % cache.page_size] = True
    for pool in (cache.k, cache.v):
        if pool is not None:
            pool.masked_fill_(~used[:, None, :, None], float("nan"))


class Steps(RuleBasedStateMachine):
    """What a cache holds and attends to, beside a list of tokens for each sequence."""

    def __init__(self) -> None:
        super().__init__()
        options: dict[str, Any] = {"max_pages": 5, "dtype": torch.float64}
        self.cache = fnn.PagedKVCache(PAGES, PAGE, 1, DIM, batch=BATCH, **options)
        self.generator = torch.Generator().manual_seed(0)
        # Of each sequence (n, 2, DIM): keys and values.
        self.held = [torch.zeros(0, 2, DIM, dtype=torch.float64)] * BATCH

    def pages_without_sharing(self, new: int) -> int:
        return sum(-(-(len(tokens) + new) // PAGE) for tokens in self.held)

    def refused(self, new: int, call: Any) -> bool:
        """Whether a step ends in an error, which must be due and change nothing."""
        before = state(self.cache)
        try:
            call()
        except fnn.OutOfPages:
            assert self.pages_without_sharing(new) > PAGES
        except ValueError:
            assert max(map(len, self.held)) + new > self.cache.capacity
        else:
            return False
        assert state(self.cache) == before
        return True

    @rule(new=st.integers(0, 4))
    def attend(self, new: int) -> None:
        q, k, v = torch.randn(
            3, BATCH, 1, new, DIM, generator=self.generator, dtype=torch.float64
        ).unbind()
        outputs = []
        if self.refused(new, lambda: outputs.append(self.cache.attend(q, k, v))):
            return
        added = torch.stack((k, v), 3)[:, 0]
        self.held = [torch.cat(pair) for pair in zip(self.held, added, strict=True)]
        for sequence, tokens in enumerate(self.held):
            keys, values = tokens.unbind(1)
            hidden = torch.ones(new, len(keys)).triu(len(keys) - new + 1).bool()
            scores = (q[sequence, 0] @ keys.T / DIM**0.5).masked_fill(hidden, float("-inf"))
            torch.testing.assert_close(outputs[0][sequence, 0], scores.softmax(-1) @ values)

    @rule(new=st.integers(0, 4))
    def reserve(self, new: int) -> None:
        if not self.refused(new, lambda: self.cache.reserve(new)):
            free = self.cache.free_pages
            self.cache.reserve(new)
            assert self.cache.free_pages == free

    @rule(sequence=SEQUENCES)
    def free(self, sequence: int) -> None:
        self.cache.free(sequence)
        self.held[sequence] = self.held[sequence][:0]

    @rule(sequence=SEQUENCES, into=st.lists(SEQUENCES, min_size=1, max_size=2))
    def fork(self, sequence: int, into: list[int]) -> None:
        free = self.cache.free_pages
        self.cache.fork(sequence, into if len(into) > 1 else into[0])
        assert self.cache.free_pages >= free
        for other in into:
            self.held[other] = self.held[sequence]

    @rule(lengths=st.lists(st.integers(0, 9), min_size=BATCH, max_size=BATCH), one=st.booleans())
    def crop(self, lengths: list[int], one: bool) -> None:
        lengths = [lengths[0]] * BATCH if one else lengths
        self.cache.crop(lengths[0] if one else torch.tensor(lengths))
        self.held = [tokens[:most] for tokens, most in zip(self.held, lengths, strict=True)]

    @rule(order=st.lists(SEQUENCES, min_size=BATCH, max_size=BATCH))
    def reorder(self, order: list[int]) -> None:
        self.cache.reorder(torch.tensor(order))
        self.held = [self.held[sequence] for sequence in order]

    @invariant()
    def holds_what_lists_hold(self) -> None:
        cache = self.cache
        poison(cache)
        counts = [len(tokens) for tokens in self.held]
        assert counts == cache.counts == cache.lengths.tolist()
        assert cache.tokens == max(counts)
        keys, values = cache.update(*torch.zeros(2, BATCH, 1, 0, DIM, dtype=torch.float64))
        for sequence, tokens in enumerate(self.held):
            found = torch.stack((keys[sequence, 0], values[sequence, 0]), 1)[: len(tokens)]
            assert same_bits(found, tokens)

    @invariant()
    def every_page_is_counted(self) -> None:
        table = self.cache._table
        owned = [page for pages in table.pages for page in pages]
        assert table.owners == [owned.count(page) for page in range(PAGES)]
        assert sorted({*owned, *table.free}) == list(range(PAGES))
        assert len(set(owned)) + len(table.free) == PAGES


class StepsOfLayers(Steps):
    """The same of the first of two layers with one table; the second holds other numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.second = self.cache.beside()
        self.caches = fnn.CacheStack([self.cache, self.second])

    @rule(new=st.integers(0, 4))
    def attend(self, new: int) -> None:
        before = self.cache.counts
        super().attend(new)
        if self.cache.counts != before:
            added = torch.stack([held[len(held) - new :] for held in self.held])
            k, v = added.transpose(1, 2).unbind(1)
            self.second.append(-k[:, None], -v[:, None])

    @rule(order=st.lists(SEQUENCES, min_size=BATCH, max_size=BATCH))
    def reorder(self, order: list[int]) -> None:
        self.caches.reorder(torch.tensor(order))
        self.held = [self.held[sequence] for sequence in order]

    @rule(lengths=st.lists(st.integers(0, 9), min_size=BATCH, max_size=BATCH))
    def crop_all(self, lengths: list[int]) -> None:
        self.caches.crop(torch.tensor(lengths))
        self.held = [tokens[:most] for tokens, most in zip(self.held, lengths, strict=True)]

    @invariant()
    def the_second_layer_has_as_much(self) -> None:
        poison(self.second)
        assert self.second.block_table is self.cache.block_table
        assert self.second.counts == self.cache.counts == self.second.lengths.tolist()
        keys, values = self.second.update(*torch.zeros(2, BATCH, 1, 0, DIM, dtype=torch.float64))
        for sequence, tokens in enumerate(self.held):
            found = torch.stack((keys[sequence, 0], values[sequence, 0]), 1)[: len(tokens)]
            assert same_bits(found, -tokens)


def walks(examples: int) -> settings:
    return settings(
        max_examples=examples,
        stateful_step_count=20,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate, Phase.shrink],
    )


Steps.TestCase.settings = walks(25)
StepsOfLayers.TestCase.settings = walks(20)
TestSteps = Steps.TestCase
TestStepsOfLayers = StepsOfLayers.TestCase


def paged(model: Any, together: bool, **options: Any) -> fnn.CacheStack:
    """Caches of a model, of the shape of its own, with one table or with one each."""
    caches: list[fnn.PagedKVCache] = []
    for own in model.make_cache(1, 1):
        sizes = {"value_dim": own.value_dim, "latent": own.latent}
        where = {"device": own.k.device, "dtype": own.k.dtype}
        heads, dim = own.k.shape[1], own.k.shape[3]
        if together and caches:
            caches.append(caches[0].beside())
            continue
        cache = fnn.PagedKVCache(9, 2, heads, dim, **sizes, **where, **options)
        caches.append(cache)
    return fnn.CacheStack(caches)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "DeepseekV3ForCausalLM"])
@pytest.mark.parametrize("together", [False, True], ids=["apart", "together"])
def test_models_take_pages(name, backend, together):
    """A prompt that two sequences share and go on from, each with its own tokens."""
    device = "cpu" if backend == "reference" else DEVICE
    model = small(name).to(device)
    prompt = torch.tensor([[5, 7, 9]], device=device)
    more = torch.tensor([[3, 8], [1, 4]], device=device)
    with fastattn.backend(backend), torch.no_grad():
        caches = paged(model, together, batch=1)
        model(prompt, cache=caches)
        caches.reorder(torch.tensor([0, 0], device=device))
        assert caches[0].free_pages == 7
        found = model(more, cache=caches).logits
        # Of pages of two one is shared, and each has two.
        assert caches[0].free_pages == 4
        whole = model(torch.cat((prompt.expand(2, -1), more), 1)).logits
    torch.testing.assert_close(found, whole[:, 3:])


def test_a_step_that_broke_off_between_layers_is_taken_back():
    first = fnn.PagedKVCache(6, 2, 1, 4, batch=2)
    layers = [first, first.beside(), first.beside()]
    caches = fnn.CacheStack(layers)
    new = torch.randn(2, 1, 3, 4)
    for layer in layers:
        layer.append(new, new)
    for layer in layers[:2]:
        layer.append(new[:, :, :2], new[:, :, :2])
    assert [layer.tokens for layer in layers] == [5, 5, 3]
    caches.crop(3)
    assert [layer.counts for layer in layers] == [[3, 3]] * 3
    assert first.free_pages == 2
    for layer in layers:
        keys, _ = layer.update(new[:, :, :1], new[:, :, :1])
        assert same_bits(keys, torch.cat((new, new[:, :, :1]), 2))
    with pytest.raises(ValueError, match="no tokens yet for a layer beside it"):
        first.beside()


def test_no_page_is_lost_by_an_error():
    attention = fnn.Attention(8, 2, causal=True).double().eval()
    cache = fnn.PagedKVCache(4, 2, 2, 4, batch=3, dtype=torch.float64)
    x = torch.randn(3, 3, 8, dtype=torch.float64)
    with pytest.raises(fnn.OutOfPages, match="6 pages are needed for 3 more tokens of 3 sequences"):
        attention(x, cache=cache)
    assert cache.free_pages == 4
    first = attention(x[:, :1], cache=cache)
    cache.free(2)
    cache.fork(0, into=2)
    # One page is free and one is shared.
    assert cache.free_pages == 2
    before = state(cache)
    with pytest.raises(fnn.OutOfPages, match="4 pages are needed"):
        cache.append(*torch.zeros(2, 3, 2, 2, 4).double())
    assert state(cache) == before
    torch.testing.assert_close(first, attention(x[:, :1]))
    with pytest.raises(ValueError, match="PagedKVCache: 1 of 8 places may be taken, and 8 more"):
        cache.reserve(8)


def test_what_does_not_fit_is_refused():
    for name in ("pages", "page_size", "max_pages"):
        sizes = {"pages": 4, "page_size": 2, "max_pages": 2, name: 0}
        with pytest.raises(ValueError, match=f"{name} must be positive"):
            fnn.PagedKVCache(kv_heads=1, head_dim=4, batch=1, **sizes)
    cache = fnn.PagedKVCache(4, 2, 1, 4, batch=2)
    for call in (
        lambda: cache.free(2),
        lambda: cache.fork(-1, into=0),
        lambda: cache.fork(0, into=[1, 5]),
        lambda: cache.reorder(torch.tensor([0, 2])),
    ):
        with pytest.raises(ValueError, match=r"sequences must be in \[0, 2\)"):
            call()
