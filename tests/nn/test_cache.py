"""Caches of attention modules: what they hold, how they end, and how they are cut and reordered."""

import pytest
import torch

import fastattn.nn as fnn
from support import same_bits


def make(**options):
    torch.manual_seed(0)
    return fnn.Attention(32, 4, 2, causal=True, **options).double().eval()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": 3, "softcap": 5.0, "sinks": True},
        {"relative": fnn.AlibiPositions(4)},
        {"rotary": fnn.RotaryEmbedding(8)},
    ],
    ids=["plain", "window", "alibi", "rotary"],
)
def test_steps_are_the_whole(options):
    attention, x = make(**options), torch.randn(2, 9, 32, dtype=torch.float64)
    cache, found = attention.make_cache(2, 16), []
    for part in x.split([4, 1, 1, 3], 1):
        given = {"positions": cache.lengths[:, None] + torch.arange(part.shape[1])}
        found.append(attention(part, cache=cache, **(given if "rotary" in options else {})))
    torch.testing.assert_close(torch.cat(found, 1), attention(x))
    assert cache.lengths.tolist() == [9, 9]
    assert cache.tokens == 9


def test_a_full_cache_loses_nothing():
    attention, x = make(), torch.randn(2, 5, 32, dtype=torch.float64)
    cache = attention.make_cache(2, 6)
    attention(x, cache=cache)
    held = cache.k.clone()
    with pytest.raises(ValueError, match="5 of 6 places may be taken, and 5 more"):
        attention(x, cache=cache)
    assert same_bits(cache.k[:, :, :5], held[:, :, :5])
    assert cache.lengths.tolist() == [5, 5]


def test_cut_and_reordered():
    k, v = torch.randn(2, 2, 1, 4, 8)
    cache = fnn.KVCache(2, 1, 8, 8)
    cache.append(k, v)
    cache.crop(torch.tensor([1, 3]))
    assert cache.tokens == 3
    more = torch.randn(2, 1, 1, 8)
    keys, _ = cache.update(more, more)
    assert same_bits(keys[0, :, :2], torch.cat((k[0, :, :1], more[0]), 1))
    assert same_bits(keys[1], torch.cat((k[1, :, :3], more[1]), 1))
    cache.reorder(torch.tensor([1, 1]))
    assert cache.lengths.tolist() == [4, 4]
    assert same_bits(cache.k[0, :, :4], cache.k[1, :, :4])
    cache.crop(9)
    assert cache.lengths.tolist() == [4, 4]
    cache.crop(0)
    assert cache.tokens == 0


def test_dropout_in_training_is_refused():
    attention = make(dropout=0.1).train()
    with pytest.raises(ValueError, match="no dropout"):
        attention(torch.randn(1, 1, 32).double(), cache=attention.make_cache(1, 4))


def test_an_empty_stack_is_refused():
    with pytest.raises(ValueError, match="one layer"):
        fnn.CacheStack([])
