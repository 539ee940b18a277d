"""Queries, keys and values in one tensor are attended to as those apart, and so are gradients."""

from typing import Any

import pytest
import torch
from flash_formula import BACKENDS, assert_accurate, attend, device_of

from fastattn.integrations.flash_attn import (
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from support import WIDEST

OPTIONS: dict[str, Any] = {"causal": True, "window_size": (3, 0), "softcap": 2.0}


def leaf(backend: str, *shape: int) -> torch.Tensor:
    return torch.randn(shape, device=device_of(backend), dtype=WIDEST).requires_grad_()


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_one_tensor(backend: str):
    assert_accurate(
        lambda qkv: flash_attn_qkvpacked_func(qkv, return_attn_probs=True, **OPTIONS)[:2],
        lambda qkv: attend(*qkv.unbind(2), **OPTIONS),
        {"qkv": leaf(backend, 2, 7, 3, 2, 16)},
        backend,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_and_values_in_one_tensor(backend: str):
    assert_accurate(
        lambda q, kv: flash_attn_kvpacked_func(q, kv, return_attn_probs=True, **OPTIONS)[:2],
        lambda q, kv: attend(q, *kv.unbind(2), **OPTIONS),
        {"q": leaf(backend, 2, 5, 4, 16), "kv": leaf(backend, 2, 7, 2, 2, 16)},
        backend,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_sequences(backend: str):
    ends = torch.tensor([0, 4, 4, 9], dtype=torch.int32, device=device_of(backend))

    def by_sequence(q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        parts = [(q[None, :4], kv[None, :4]), (q[None, 4:], kv[None, 4:])]
        return torch.cat([attend(q, *kv.unbind(2), **OPTIONS)[0][0] for q, kv in parts])

    assert_accurate(
        lambda qkv: flash_attn_varlen_qkvpacked_func(qkv, ends, 5, **OPTIONS),
        lambda qkv: by_sequence(qkv[:, 0], qkv[:, 1:]),
        {"qkv": leaf(backend, 9, 3, 2, 16)},
        backend,
    )
    assert_accurate(
        lambda q, kv: flash_attn_varlen_kvpacked_func(q, kv, ends, ends, 5, 5, **OPTIONS),
        by_sequence,
        {"q": leaf(backend, 9, 4, 16), "kv": leaf(backend, 9, 2, 2, 16)},
        backend,
    )


def test_another_layout_is_refused():
    with pytest.raises(ValueError, match=r"qkv must be \(batch, length, 3, heads, head dim"):
        flash_attn_qkvpacked_func(torch.randn(2, 5, 2, 4, 8))
    with pytest.raises(ValueError, match=r"kv must be \(batch, length, 2, heads, head dim"):
        flash_attn_kvpacked_func(torch.randn(2, 5, 4, 8), torch.randn(2, 5, 4, 8))
    ends = torch.tensor([0, 5], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"qkv must be \(tokens, 3, heads, head dimension\)"):
        flash_attn_varlen_qkvpacked_func(torch.randn(5, 4, 8), ends, 5)
