"""Caches of attention modules: what they hold, how they end, and how they are cut and reordered."""

import pytest
import torch

import fastattn
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


def make_latent(**options):
    torch.manual_seed(0)
    sizes = {"qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 10}
    rotary = fnn.RotaryEmbedding(4, 32, interleaved=True)
    attention = fnn.LatentAttention(32, 3, kv_lora_rank=16, rotary=rotary, **sizes, **options)
    return attention.double().eval()


def test_latents_are_all_that_is_kept():
    """In steps, of sequences that are cut to different lengths, beside places that are NaN."""
    attention, x = make_latent(), torch.randn(2, 9, 32, dtype=torch.float64)
    cache = attention.make_cache(2, 16)
    cache.k.fill_(float("nan"))
    assert cache.v is None
    assert cache.k.shape == (2, 1, 16, 20)
    first = attention(x[:, :5], positions=0, cache=cache)
    cache.crop(torch.tensor([3, 5]))
    rest = []
    for start, end in ((0, 1), (1, 4)):
        places = torch.arange(start, end) + torch.tensor([[3], [5]])
        tokens = torch.stack([x[0, places[0]], x[1, places[1]]])
        rest.append(attention(tokens, positions=places, cache=cache))
    rest, whole = torch.cat(rest, 1), attention(x)
    torch.testing.assert_close(first, whole[:, :5])
    torch.testing.assert_close(rest[0], whole[0, 3:7])
    torch.testing.assert_close(rest[1], whole[1, 5:])
    cache.reorder(torch.tensor([1]))
    keys, values = cache.update(torch.zeros(1, 1, 1, 20).double())
    assert same_bits(values, keys[..., :16])
    assert keys.shape[2] == 10


def test_latents_are_columns_of_keys():
    with pytest.raises(ValueError, match="columns of its 8, got 9"):
        fnn.KVCache(1, 1, 4, 8, value_dim=9, latent=True)
    cache = fnn.KVCache(1, 1, 4, 8, value_dim=6, latent=True)
    with pytest.raises(ValueError, match="values need a cache"):
        cache.append(torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 1, 6))


@pytest.mark.parametrize("maker", [make, make_latent])
def test_dropout_in_training_is_refused(maker):
    attention = maker(dropout=0.1).train()
    with pytest.raises(ValueError, match="no dropout"):
        attention(torch.randn(1, 1, 32).double(), cache=attention.make_cache(1, 4))


def test_an_empty_stack_is_refused():
    with pytest.raises(ValueError, match="one layer"):
        fnn.CacheStack([])


def test_a_stack_answers_as_hugging_faces_caches():
    stack = fnn.CacheStack([fnn.KVCache(1, 1, 9, 4), fnn.RingKVCache(1, 1, 5, 4, window=2)])
    k = torch.randn(2, 1, 1, 7, 4)
    for start, end, sizes in ((0, 4, [(4, 0), (4, 0)]), (4, 7, [(7, 0), (5, 2)])):
        assert [stack.get_mask_sizes(end - start, layer) for layer in (0, 1)] == sizes
        assert stack.get_seq_length() == stack.get_query_offset(1) == start
        for layer, (keys, first) in enumerate(sizes):
            found = stack.update(*k[..., start:end, :], layer, kwargs={})
            assert same_bits(found[0], k[0, :, :, first : first + keys])
            assert same_bits(found[1], k[1, :, :, first : first + keys])


def test_a_context_is_projected_once():
    """By attention and in a block, whose steps are the whole; beams of a prompt share a context."""
    torch.manual_seed(0)
    options = {"context_dim": 10, "softcap": 3.0, "sinks": True, "qk_norm": fnn.RMSNorm}
    cross = fnn.Attention(32, 4, 2, **options).double().eval()
    torch.nn.init.normal_(cross.sinks)
    x, context = torch.randn(2, 6, 32).double(), torch.randn(2, 7, 10).double()
    lengths = torch.tensor([7, 4])
    seen = []
    cross.k_proj.register_forward_hook(lambda *_: seen.append("k"))
    cross.v_proj.register_forward_hook(lambda *_: seen.append("v"))

    cache = fnn.ContextCache()
    first = cross(x[:, :4], context, cache=cache, kv_lengths=lengths)
    rest = [cross(x[:, place : place + 1], cache=cache) for place in (4, 5)]
    assert seen == ["k", "v"]
    whole = cross(x, context, kv_lengths=lengths)
    torch.testing.assert_close(torch.cat((first, *rest), 1), whole)
    beams = cross(x.repeat_interleave(3, 0), cache=cache)
    torch.testing.assert_close(beams, whole.repeat_interleave(3, 0))

    attention = fnn.Attention(32, 4, causal=True)
    block = fnn.TransformerBlock(
        attention, fnn.MLP(32, 48), lambda: fnn.RMSNorm(32), cross_attn=cross
    )
    block = block.double().eval()
    whole = block(x, context, cross={"kv_lengths": lengths})
    own, cache = attention.make_cache(2, 8), fnn.ContextCache()
    given = {"cache": cache, "kv_lengths": lengths}
    steps = [block(x[:, :2], context, cross=given, cache=own)]
    steps += [block(part, cross={"cache": cache}, cache=own) for part in x[:, 2:].split([1, 3], 1)]
    torch.testing.assert_close(torch.cat(steps, 1), whole)


def test_gradients_reach_what_a_context_was_made_of():
    torch.manual_seed(0)
    cross = fnn.Attention(32, 4).double()
    x, context = torch.randn(2, 3, 32).double(), torch.randn(2, 5, 32).double().requires_grad_()
    cache = fnn.ContextCache()
    steps = [cross(x[:, :2], context, cache=cache), cross(x[:, 2:], cache=cache)]
    leaves = (context, *cross.parameters())
    found = torch.autograd.grad(torch.cat(steps, 1).square().sum(), leaves)
    wanted = torch.autograd.grad(cross(x, context).square().sum(), leaves)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_what_a_context_cannot_have_is_said():
    x, cache = torch.randn(2, 3, 32), fnn.ContextCache()
    with pytest.raises(ValueError, match="no context has been read; give one in the first call"):
        fnn.Attention(32, 4)(x, cache=cache)
    for options in ({"causal": True}, {"window": 3}, {"relative": fnn.AlibiPositions(4)}):
        with pytest.raises(ValueError, match="there is no causal, window or relative attention"):
            fnn.Attention(32, 4, **options)(x, x, cache=cache)
    with pytest.raises(ValueError, match="rotary positions are those of one sequence"):
        fnn.Attention(32, 4, rotary=fnn.RotaryEmbedding(8))(x, cache=cache)
    with pytest.raises(ValueError, match="there is no dropout of attention to a cache"):
        fnn.Attention(32, 4, dropout=0.1)(x, x, cache=cache)


@pytest.mark.parametrize("kind", ["row", "pages"])
def test_caches_of_eight_bits_hold_the_nearest_numbers(kind):
    attention, x = make(), torch.randn(2, 9, 32, dtype=torch.float64)
    q, k, v = attention._project(x, x)
    k, v = (tensor.to(torch.float8_e4m3fn).double() for tensor in (k, v))
    o = fastattn.attention(q, k, v, causal=True)
    expected = attention.o_proj(o.transpose(1, 2).flatten(2))
    for dtype in (torch.float64, torch.bfloat16):
        if kind == "row":
            cache = fnn.KVCache(2, 2, 16, 8, dtype=torch.float8_e4m3fn)
        else:
            cache = fnn.PagedKVCache(6, 4, 2, 8, batch=2, dtype=torch.float8_e4m3fn)
        with torch.no_grad():
            parts = x.to(dtype).split([5, 1, 3], 1)
            found = torch.cat([attention.to(dtype)(part, cache=cache) for part in parts], 1)
        assert found.dtype is dtype
        if dtype is torch.float64:
            torch.testing.assert_close(found, expected)
