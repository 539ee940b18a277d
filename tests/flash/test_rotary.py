"""Rotary positions by flash-attn's names: values, gradients, and what is written in place."""

from typing import Any

import pytest
import torch
from flash_formula import BACKENDS, assert_accurate, device_of

import fastattn
from fastattn.integrations.flash_attn.layers.rotary import (
    RotaryEmbedding,
    apply_rotary_emb,
    apply_rotary_emb_kv_,
    apply_rotary_emb_qkv_,
)
from support import WIDEST

Tables = tuple[torch.Tensor, torch.Tensor]


def tables(backend: str, rows: int = 16) -> Tables:
    angles = torch.randn(rows, 4, device=device_of(backend), dtype=torch.float64)
    return angles.cos(), angles.sin()


def turn(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool = False
) -> torch.Tensor:
    """Pairs of the first columns of (..., S, H, D) by the angles (..., S, R/2) of its tokens."""
    cos, sin = (table.to(x.dtype).unsqueeze(-2) for table in (cos, sin))
    width = 2 * cos.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    if interleaved:
        a, b = turned[..., ::2], turned[..., 1::2]
        pair = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    else:
        a, b = turned.chunk(2, -1)
        pair = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    return torch.cat((pair, rest), -1)


def leaf(backend: str, *shape: int) -> torch.Tensor:
    return torch.randn(shape, device=device_of(backend), dtype=WIDEST).requires_grad_()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("offsets", [0, 3, (2, 5)])
def test_one_tensor(offsets: int | tuple[int, int], inplace: bool, interleaved: bool, backend: str):
    cos, sin = tables(backend)
    starts = torch.tensor(offsets, device=cos.device).expand(2)
    rows = starts[:, None] + torch.arange(7, device=cos.device)
    given = offsets if isinstance(offsets, int) else starts

    def function(x: torch.Tensor) -> torch.Tensor:
        # What a leaf is multiplied by is no leaf, so that it may be written over.
        before = x * 1.0
        after = apply_rotary_emb(before, cos, sin, interleaved, inplace, given)
        assert (after is before) == inplace
        return after

    assert_accurate(
        function,
        lambda x: turn(x, cos[rows], sin[rows], interleaved=interleaved),
        {"x": leaf(backend, 2, 7, 3, 12)},
        backend,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("offsets", [2, (0, 4, 1)])
def test_packed_sequences(offsets: int | tuple[int, ...], backend: str):
    cos, sin = tables(backend)
    ends = torch.tensor([0, 4, 4, 9], dtype=torch.int32, device=cos.device)
    starts = torch.tensor(offsets, device=cos.device).expand(3)
    rows = torch.cat([torch.arange(4), torch.arange(5)]).to(cos.device)
    rows = rows + starts[torch.tensor([0] * 4 + [2] * 5, device=cos.device)]
    given = offsets if isinstance(offsets, int) else starts
    assert_accurate(
        lambda x: apply_rotary_emb(x, cos, sin, seqlen_offsets=given, cu_seqlens=ends),
        lambda x: turn(x, cos[rows], sin[rows]),
        {"x": leaf(backend, 9, 3, 8)},
        backend,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("own_tables", [False, True])
@pytest.mark.parametrize("heads", [None, 4])
def test_queries_and_keys_in_one_tensor(heads: int | None, own_tables: bool, backend: str):
    cos, sin = tables(backend)
    cos_k, sin_k = tables(backend) if own_tables else (cos, sin)
    shape = (2, 5, 3, 2, 8) if heads is None else (2, 5, 8, 8)

    def function(qkv: torch.Tensor) -> torch.Tensor:
        before = qkv * 1.0
        own = (cos_k, sin_k) if own_tables else (None, None)
        assert apply_rotary_emb_qkv_(before, cos, sin, *own, num_heads_q=heads) is before
        # Autograd knows of it also where the result is dropped.
        return before

    def formula(qkv: torch.Tensor) -> torch.Tensor:
        q, k, v = qkv.unbind(2) if heads is None else qkv.split([4, 2, 2], 2)
        parts = (turn(q, cos[:5], sin[:5]), turn(k, cos_k[:5], sin_k[:5]), v)
        return torch.stack(parts, 2) if heads is None else torch.cat(parts, 2)

    assert_accurate(function, formula, {"qkv": leaf(backend, *shape)}, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_in_one_tensor(backend: str):
    cos, sin = tables(backend)

    def function(kv: torch.Tensor) -> torch.Tensor:
        before = kv * 1.0
        assert apply_rotary_emb_kv_(before, cos, sin, seqlen_offsets=1) is before
        return before

    assert_accurate(
        function,
        lambda kv: torch.stack((turn(kv[:, :, 0], cos[1:6], sin[1:6]), kv[:, :, 1]), 2),
        {"kv": leaf(backend, 2, 5, 2, 3, 8)},
        backend,
    )


@pytest.mark.parametrize("scale_base", [None, 512.0])
def test_the_module_turns_in_place(scale_base: float | None):
    module = RotaryEmbedding(8, base=100.0, scale_base=scale_base)
    assert not module.state_dict()
    angles = torch.outer(torch.arange(6.0), 100.0 ** (-torch.arange(0, 8, 2) / 8))
    scale = torch.ones(6, 4)
    if scale_base is not None:
        zeta = (torch.arange(0, 8, 2) + 0.4 * 8) / (1.4 * 8)
        scale = zeta ** ((torch.arange(6.0) - 3) / scale_base)[:, None]
    q_tables = (angles.cos() * scale, angles.sin() * scale)
    k_tables = (angles.cos() / scale, angles.sin() / scale)
    qkv = torch.randn(2, 6, 3, 2, 8)
    q, k, v = qkv.clone().unbind(2)
    expected = torch.stack((turn(q, *q_tables), turn(k, *k_tables), v), 2)
    assert module(qkv) is qkv
    torch.testing.assert_close(qkv, expected)
    kv = torch.stack((k, v), 2)
    turned_q, turned_kv = module(q, kv)
    assert turned_q is q
    assert turned_kv is kv
    torch.testing.assert_close(q, expected[:, :, 0])
    torch.testing.assert_close(kv, expected[:, :, 1:])


def test_the_module_makes_tables_when_it_needs_them():
    module: Any = RotaryEmbedding(8)
    with pytest.raises(ValueError, match="a seqlen_offset in a tensor needs max_seqlen"):
        module(torch.randn(2, 3, 3, 2, 8), seqlen_offset=torch.tensor([1, 2]))
    module(torch.randn(2, 3, 3, 2, 8), seqlen_offset=torch.tensor([1, 2]), max_seqlen=9)
    tables = module._cos_cached
    assert tables is not None
    assert tables.shape == (9, 4)
    module(torch.randn(2, 5, 3, 2, 8))
    assert module._cos_cached is tables
    module(torch.randn(2, 11, 3, 2, 8).bfloat16())
    assert module._cos_cached.shape == (11, 4)
    assert module._cos_cached.dtype is torch.bfloat16
    # Frequencies of a model moved to 16 bits are made anew.
    module.bfloat16()
    module._seq_len_cached = 0
    module(torch.randn(2, 11, 3, 2, 8))
    assert torch.equal(module._cos_cached[:9], tables)


def test_what_may_not_be_written_over_is_refused():
    cos, sin = tables("reference")
    leaf = torch.randn(1, 4, 2, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        apply_rotary_emb(leaf, cos.float(), sin.float(), inplace=True)
    with pytest.raises(ValueError, match=r"with num_heads_q = H, got .* and num_heads_q=None"):
        apply_rotary_emb_qkv_(leaf.detach(), cos, sin)
    with pytest.raises(ValueError, match=r"kv must be \(batch, length, 2, heads, head dim"):
        apply_rotary_emb_kv_(leaf.detach(), cos, sin)


def test_the_result_is_that_of_apply_rotary():
    cos, sin = tables("reference")
    x = torch.randn(2, 5, 3, 8)
    expected = fastattn.apply_rotary(x.transpose(1, 2), cos, sin).transpose(1, 2)
    assert torch.equal(apply_rotary_emb(x, cos, sin), expected)
