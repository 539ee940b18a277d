"""Appending to caches: contiguous and in pages, with positions, in 8 bits, and where room ends."""

import sys

import pytest
import torch

import fastattn
from fastattn.ops.append_kv import _write
from support import same_bits


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def append_one_by_one(cache, x, lengths, table=None):
    """What append_kv means, token by token."""
    cache = cache.clone()
    for sequence, length in enumerate(lengths.tolist()):
        for token in range(x.shape[2]):
            element, row = sequence, length + token
            if table is not None:
                page = cache.shape[2]
                element, row = int(table[sequence, row // page]), row % page
            cache[element, :, row] = x[sequence, :, token]
    return cache


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_tokens_go_behind_what_is_there(dtype):
    k_cache, v_cache = normal(3, 2, 12, 4), normal(3, 2, 12, 6)
    k, v, lengths = normal(3, 2, 3, 4), normal(3, 2, 3, 6), torch.tensor([0, 9, 4], dtype=dtype)
    expected = [append_one_by_one(cache, x, lengths) for cache, x in ((k_cache, k), (v_cache, v))]
    assert fastattn.append_kv(k_cache, v_cache, k, v, lengths=lengths) is None
    assert same_bits(k_cache, expected[0])
    assert same_bits(v_cache, expected[1])


def test_tokens_go_to_their_pages():
    cache, table = normal(7, 2, 4, 8), torch.tensor([[3, 0, 6], [2, 5, 1]])
    k, lengths = normal(2, 2, 5, 8), torch.tensor([3, 7])
    expected = append_one_by_one(cache, k, lengths, table)
    # Pages (P, page, Hkv, D), as flash-attn has them, are written through a view.
    stored = cache.transpose(1, 2).contiguous()
    fastattn.append_kv(
        stored.transpose(1, 2), None, k, None, lengths=lengths, block_table=table.int()
    )
    assert same_bits(stored.transpose(1, 2), expected)


def test_keys_are_turned_to_their_places():
    cos, sin = normal(20, 4).cos(), normal(20, 4).sin()
    cache, k, lengths = torch.zeros(2, 1, 16, 8), normal(2, 1, 2, 8), torch.tensor([3, 14])
    fastattn.append_kv(cache, None, k, None, lengths=lengths, cos=cos, sin=sin)
    turned = fastattn.apply_rotary(k, cos, sin, positions=torch.tensor([[3, 4], [14, 15]]))
    assert same_bits(cache, append_one_by_one(torch.zeros(2, 1, 16, 8), turned, lengths))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_eight_bits_are_the_nearest(dtype):
    cache, scale = torch.zeros(1, 2, 4, 8).to(dtype), torch.tensor([0.02, 0.03])
    k = normal(1, 2, 4, 8)
    k[..., 0] = torch.tensor([1e6, -1e6])[:, None]
    fastattn.append_kv(cache, None, k, None, lengths=torch.tensor([0]), k_scale=scale)
    largest = 127.0 if dtype is torch.int8 else 448.0
    scaled = (k / scale[:, None, None]).clamp(-largest, largest)
    expected = scaled.round().to(dtype) if dtype is torch.int8 else scaled.to(dtype)
    assert same_bits(cache.float(), expected.float())


def test_without_room_a_cpu_says_so_and_a_gpu_writes_what_fits():
    cache, k = normal(3, 1, 6, 2), normal(3, 1, 4, 2)
    before, lengths = cache.clone(), torch.tensor([4, 6, 1])
    with pytest.raises(ValueError, match="room for 6 keys, and 10 are needed"):
        fastattn.append_kv(cache, None, k, None, lengths=lengths)
    assert same_bits(cache, before)
    places = lengths[:, None] + torch.arange(4)
    with pytest.MonkeyPatch.context() as patched:
        # As on a GPU, where nobody looks at the numbers.
        patched.setattr(sys.modules[_write.__module__], "is_plain", lambda tensors: False)
        _write("append_kv", cache, k, places, None, 1.0)
    before[0, :, 4:], before[2, :, 1:5] = k[0, :, :2], k[2]
    assert same_bits(cache, before)


def test_generation_step_by_step_is_causal_attention():
    q, k, v = normal(2, 4, 9, 8), normal(2, 2, 9, 8), normal(2, 2, 9, 8, seed=1)
    k_cache, v_cache = torch.full((2, 2, 2, 16, 8), float("nan"))
    lengths, found = torch.tensor([0, 0]), []
    for tokens in (4, 1, 1, 3):
        part = slice(int(lengths[0]), int(lengths[0]) + tokens)
        fastattn.append_kv(k_cache, v_cache, k[:, :, part], v[:, :, part], lengths=lengths)
        lengths = lengths + tokens
        found.append(fastattn.decode_attention(q[:, :, part], k_cache, v_cache, lengths=lengths))
    expected = fastattn.attention(q, k, v, causal=True)
    torch.testing.assert_close(torch.cat(found, 2), expected)


def test_one_graph():
    def step(cache, k, lengths):
        fastattn.append_kv(cache, None, k, None, lengths=lengths)
        return fastattn.decode_attention(k, cache, lengths=lengths + 1, value_dim=4)

    cache, k, lengths = torch.zeros(2, 1, 8, 4), normal(2, 1, 1, 4), torch.tensor([3, 7])
    expected_cache = cache.clone()
    expected = step(expected_cache, k, lengths)
    found = torch.compile(step, fullgraph=True, backend="aot_eager")(cache, k, lengths)
    assert same_bits(cache, expected_cache)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lengths": torch.tensor([0.0, 0.0])}, "lengths must be int32 or int64"),
        ({"lengths": torch.tensor([0])}, r"lengths \(B,\)"),
        ({"v": None}, "values need a cache"),
        ({"k": torch.zeros(2, 3, 1, 4)}, "must fit each other"),
        ({"v": torch.zeros(2, 2, 1, 5)}, "must fit each other"),
        ({"block_table": torch.zeros(3, 1).int()}, r"block_table must be \(2, pages\)"),
        ({"k_cache": torch.zeros(2, 2, 8, 4, requires_grad=True)}, "written in place"),
    ],
)
def test_what_does_not_fit_is_refused(wrong, message):
    given = {
        "k_cache": torch.zeros(2, 2, 8, 4),
        "v_cache": torch.zeros(2, 2, 8, 4),
        "k": torch.zeros(2, 2, 1, 4),
        "v": torch.zeros(2, 2, 1, 4),
        "lengths": torch.tensor([0, 0]),
    }
    with pytest.raises((TypeError, ValueError), match=message):
        fastattn.append_kv(**{**given, **wrong})
