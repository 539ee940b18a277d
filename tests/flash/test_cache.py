"""flash_attn_with_kvcache: every argument against attention to the keys of each sequence alone."""

from typing import Any

import pytest
import torch
from flash_formula import BACKENDS, attend, device_of

from fastattn import backend as choose_backend
from fastattn.integrations.flash_attn import flash_attn_with_kvcache
from fastattn.integrations.flash_attn.layers.rotary import apply_rotary_emb

ROOM, LENGTHS = 24, (0, 7, 20)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window_size": (5, 0), "softcap": 2.0},
    "slopes": {"alibi_slopes": normal(4).abs(), "causal": True, "softmax_scale": 0.3},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rotary", [None, True, False], ids=["none", "interleaved", "halves"])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("storage", ["whole", "indices", "pages"])
def test_appends_and_attends(storage, call, rotary, backend):
    device, options = device_of(backend), CALLS[call]
    q, k, v = (normal(3, 2, heads, 8, seed=heads) for heads in (4, 2, 2))
    caches = [normal(3, ROOM, 2, 8, seed=seed) for seed in (5, 6)]
    given: dict[str, Any] = {}
    stored = [cache.clone() for cache in caches]
    if storage == "indices":
        # In five elements, of which these are the sequences'.
        order = torch.tensor([4, 1, 2])
        stored = [torch.full((5, ROOM, 2, 8), float("nan"), dtype=torch.float64) for _ in "kv"]
        for place, cache in zip(stored, caches, strict=True):
            place[order] = cache
        given["cache_batch_idx"] = order
    elif storage == "pages":
        table = torch.tensor([[5, 0, 3], [1, 8, 2], [7, 4, 6]])
        stored = [torch.empty(9, ROOM // 3, 2, 8, dtype=torch.float64) for _ in "kv"]
        for place, cache in zip(stored, caches, strict=True):
            place[table] = cache.unflatten(1, (3, -1))
        given["block_table"] = table.int()
    tables = (normal(ROOM + 4, 3).cos(), normal(ROOM + 4, 3).sin())
    if rotary is not None:
        given |= {"rotary_cos": tables[0], "rotary_sin": tables[1], "rotary_interleaved": rotary}
    given = {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in given.items()}
    moved = {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in options.items()}
    with choose_backend(backend):
        out, lse = flash_attn_with_kvcache(
            q.to(device),
            *(place.to(device) for place in stored),
            k.to(device),
            v.to(device),
            cache_seqlens=torch.tensor(LENGTHS, dtype=torch.int32, device=device),
            return_softmax_lse=True,
            **given,
            **moved,
        )
    for place, length in enumerate(LENGTHS):
        own = slice(place, place + 1)
        own_q, own_k = q[own], k[own]
        if rotary is not None:
            turn = {"interleaved": rotary, "seqlen_offsets": length}
            own_k = apply_rotary_emb(own_k, *tables, **turn)
            if options.get("causal"):
                own_q = apply_rotary_emb(own_q, *tables, **turn)
            else:
                # All queries at the first new position.
                own_q = torch.cat(
                    [apply_rotary_emb(one, *tables, **turn) for one in own_q.split(1, 1)], 1
                )
        keys, values = (
            torch.cat((cache[own, :length], new), 1)
            for cache, new in zip(caches, (own_k, v[own]), strict=True)
        )
        expected, expected_lse = attend(own_q, keys, values, **options)
        torch.testing.assert_close(out[own].cpu(), expected)
        torch.testing.assert_close(lse[own].cpu(), expected_lse)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_on_the_left(backend):
    device = device_of(backend)
    q, k, v = normal(2, 1, 4, 8), normal(2, ROOM, 2, 8), normal(2, ROOM, 2, 8, seed=1)
    pads, lengths = (3, 0), (11, 5)
    for place, pad in enumerate(pads):
        k[place, :pad], v[place, :pad] = float("nan"), float("nan")
    with choose_backend(backend):
        out = flash_attn_with_kvcache(
            *(x.to(device) for x in (q, k, v)),
            cache_seqlens=torch.tensor(lengths, device=device),
            cache_leftpad=torch.tensor(pads, device=device),
            causal=True,
        )
    for place, (pad, length) in enumerate(zip(pads, lengths, strict=True)):
        own = slice(place, place + 1)
        expected, _ = attend(q[own], k[own, pad:length], v[own, pad:length])
        torch.testing.assert_close(out[own].cpu(), expected)


def test_the_cache_is_written_in_place():
    k_cache, v_cache = torch.zeros(2, 1, 8, 2, 4)
    q, k, v = torch.randn(1, 1, 2, 4), torch.randn(1, 1, 2, 4), torch.randn(1, 1, 2, 4)
    flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=5)
    assert torch.equal(k_cache[:, 5:6], k)
    assert torch.equal(v_cache[:, 5:6], v)
    assert k_cache[:, :5].eq(0).all()
    assert k_cache[:, 6:].eq(0).all()


def test_what_does_not_fit_is_refused():
    q, cache = torch.zeros(2, 1, 2, 4), torch.zeros(2, 8, 2, 4)
    index = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="exclude each other"):
        flash_attn_with_kvcache(q, cache, cache, cache_batch_idx=index, block_table=index[:, None])
    with pytest.raises(TypeError, match="v must be a tensor"):
        flash_attn_with_kvcache(q, cache, cache, k=q, cache_seqlens=0)
