"""The two passes by themselves, as ring attention calls them: block by block, by the merged lse."""

from typing import Any

import pytest
import torch
from flash_formula import BACKENDS, device_of

import fastattn
from fastattn.integrations.flash_attn import flash_attn_func, flash_attn_varlen_func
from fastattn.integrations.flash_attn.flash_attn_interface import (
    _flash_attn_backward,
    _flash_attn_forward,
    _flash_attn_varlen_backward,
    _flash_attn_varlen_forward,
)
from support import WIDEST, assert_close

# softmax_scale, causal, the window's sides, softcap; slopes and a bool come after them.
SETTINGS = (0.3, True, 4, -1, 3.0)
NAMED: dict[str, Any] = {
    "softmax_scale": 0.3, "causal": True, "window_size": (4, -1), "softcap": 3.0,
}  # fmt: skip


def tensors(backend: str, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.randn(shape, device=device_of(backend), dtype=WIDEST) for shape in shapes]


def gradients_of(
    output: torch.Tensor, dout: torch.Tensor, leaves: list[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(output, leaves, dout)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("slopes", [None, (2, 4)])
def test_both_passes_are_those_of_attention(
    slopes: tuple[int, int] | None, dropout_p: float, backend: str
):
    q, k, v = tensors(backend, (2, 6, 4, 16), (2, 9, 2, 16), (2, 9, 2, 24))
    given = None if slopes is None else torch.rand(slopes, device=q.device)
    settings = (dropout_p, *SETTINGS, given, False)
    with fastattn.backend(backend):
        torch.manual_seed(5)
        out, lse, _, seed = _flash_attn_forward(q, k, v, *settings)
        (dout,) = tensors(backend, out.shape)
        found = [torch.full_like(x, 7.0) for x in (q, k, v)]
        _flash_attn_backward(dout, q, k, v, out, lse, *found, *settings, rng_state=seed)
        torch.manual_seed(5)
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        expected, expected_lse, _ = flash_attn_func(
            *leaves, dropout_p, alibi_slopes=given, return_attn_probs=True, **NAMED
        )
        assert torch.equal(out, expected)
        assert torch.equal(lse, expected_lse)
        for gradient, wanted in zip(found, gradients_of(expected, dout, leaves), strict=True):
            assert_close(gradient, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_both_passes_of_packed_sequences(dropout_p: float, backend: str):
    q, k, v = tensors(backend, (10, 4, 16), (12, 2, 16), (12, 2, 16))
    ends_q, ends_k = (
        torch.tensor(ends, dtype=torch.int32, device=q.device)
        for ends in ([0, 3, 3, 9], [0, 5, 6, 12])
    )
    slopes = torch.rand(3, 4, device=q.device)
    lengths = (ends_q, ends_k, 6, torch.tensor(6))
    settings = (dropout_p, *SETTINGS, slopes)
    with fastattn.backend(backend):
        torch.manual_seed(5)
        out, lse, _, seed = _flash_attn_varlen_forward(q, k, v, *lengths, *settings)
        (dout,) = tensors(backend, out.shape)
        found = [torch.full_like(x, 7.0) for x in (q, k, v)]
        passed = (dout, q, k, v, out, lse, *found, *lengths, *settings, False)
        _flash_attn_varlen_backward(*passed, rng_state=seed)
        torch.manual_seed(5)
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        expected = flash_attn_varlen_func(
            *leaves, *lengths, dropout_p, alibi_slopes=slopes, **NAMED
        )
        assert torch.equal(out, expected)
        for gradient, wanted in zip(found, gradients_of(expected, dout, leaves), strict=True):
            assert_close(gradient, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_ring_of_two_merges_to_attention_of_all_keys(backend: str):
    """Each half of the keys forward; then both halves backward with what they were merged to."""
    q, k, v, dout = tensors(backend, *3 * [(1, 8, 2, 16)], (1, 8, 2, 16))
    settings = (0.0, 0.25, False, -1, -1, 0.0, None, False)
    halves = [(k[:, part], v[:, part]) for part in (slice(0, 5), slice(5, 8))]
    with fastattn.backend(backend):
        parts = [_flash_attn_forward(q, *half, *settings)[:2] for half in halves]
        lse = torch.logaddexp(parts[0][1], parts[1][1])
        out: Any = sum(out * (own - lse).exp().transpose(1, 2)[..., None] for out, own in parts)
        dq, dk, dv = torch.zeros_like(q), torch.empty_like(k), torch.empty_like(v)
        for (key, value), part in zip(halves, (slice(0, 5), slice(5, 8)), strict=True):
            own = torch.empty_like(q)
            _flash_attn_backward(
                dout, q, key, value, out, lse, own, dk[:, part], dv[:, part], *settings
            )
            dq += own
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        expected = flash_attn_func(*leaves, softmax_scale=0.25)
    assert_close(out, expected)
    for gradient, wanted in zip((dq, dk, dv), gradients_of(expected, dout, leaves), strict=True):
        assert_close(gradient, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_written_in_the_dtype_of_their_place_and_left_out(backend: str):
    q, k, v = (x.bfloat16() for x in tensors(backend, *3 * [(1, 4, 2, 16)]))
    settings = (0.0, 0.25, False, -1, -1, 0.0, None, False)
    with fastattn.backend(backend):
        out, lse, *_ = _flash_attn_forward(q, k, v, *settings)
        wide, narrow = torch.empty_like(q, dtype=torch.float32), torch.empty_like(q)
        for place in (wide, narrow):
            passed = (out, q, k, v, out, lse, place, None, None)
            assert _flash_attn_backward(*passed, *settings) is None
    assert wide.any()
    assert torch.equal(wide.bfloat16(), narrow)


def test_bad_arguments():
    q, k, v = torch.randn(3, 1, 4, 2, 8)
    settings = (0.5, 0.25, False, -1, -1, 0.0, None, False)
    out, lse, *_ = _flash_attn_forward(q, k, v, *settings)
    passed = (out, q, k, v, out, lse, *(torch.empty_like(x) for x in (q, k, v)))
    with pytest.raises(ValueError, match="rng_state must be what the forward returned, got None"):
        _flash_attn_backward(*passed, *settings)
    with pytest.raises(ValueError, match=r"softmax_lse must have shape \(1, 2, 4\)"):
        _flash_attn_backward(*passed[:5], lse[..., :3], *passed[6:], 0.0, *settings[1:])
    ends = torch.tensor([0, 4], dtype=torch.int32)
    packed = (*torch.randn(3, 4, 2, 8), ends, ends, 4, 4, 0.0, 0.25, False)
    with pytest.raises(NotImplementedError, match="seqused_k is not supported by fastattn"):
        _flash_attn_varlen_forward(*packed, seqused_k=torch.tensor([4]))
