"""flash_attn_varlen_func with a block_table: packed queries, and keys in pages."""

from typing import Any

import pytest
import torch
from flash_formula import BACKENDS, attend, device_of

import fastattn
from fastattn.integrations.flash_attn import flash_attn_varlen_func, pages
from fastattn.integrations.flash_attn.flash_attn_interface import _flash_attn_varlen_forward
from support import WIDEST

PAGE, ROOM = 4, 3
QUERIES, KEYS = [7, 1, 0, 4, 3], [9, 12, 5, 2, 0]
TOKENS, BEYOND = sum(QUERIES), 2

CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True, "softmax_scale": 0.3},
    "window": {"causal": True, "window_size": (3, 0), "softcap": 2.0},
    "both sides": {"window_size": (2, 1)},
    "slopes": {"causal": True, "alibi_slopes": torch.rand(4, dtype=torch.float64)},
    "slopes of each": {"alibi_slopes": torch.rand(5, 4, dtype=torch.float64)},
}


def cumulative(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def make(dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Queries with some beyond the last sequence, and pages that are NaN where there is no key."""
    generator = torch.Generator().manual_seed(0)
    batch = len(KEYS)
    table = torch.randperm(batch * ROOM + 2, generator=generator)[: batch * ROOM]
    table = table.reshape(batch, ROOM).int()
    pools = []
    for _ in "kv":
        pool = torch.randn(batch * ROOM + 2, PAGE, 2, 8, generator=generator, dtype=dtype)
        used = torch.zeros(pool.shape[:2], dtype=torch.bool)
        for row, length in zip(table, KEYS, strict=True):
            for place in range(length):
                used[row[place // PAGE], place % PAGE] = True
        pools.append(pool.masked_fill(~used[..., None, None], float("nan")))
    q = torch.randn(TOKENS + BEYOND, 4, 8, generator=generator, dtype=dtype)
    ends = {"cu_seqlens_q": cumulative(QUERIES), "cu_seqlens_k": cumulative(KEYS)}
    longest = {"max_seqlen_q": max(QUERIES), "max_seqlen_k": max(KEYS)}
    return {"q": q, "k": pools[0], "v": pools[1], "block_table": table, **ends, **longest}


def alone(given: dict[str, Any], call: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of each sequence by the formula, one after another."""
    outputs = []
    for place, (queries, keys) in enumerate(zip(QUERIES, KEYS, strict=True)):
        start = sum(QUERIES[:place])
        own = given["q"][None, start : start + queries]
        k, v = (
            given[name][given["block_table"][place].long()].flatten(0, 1)[None, :keys]
            for name in "kv"
        )
        options = dict(call)
        slopes = options.get("alibi_slopes")
        if slopes is not None and slopes.ndim == 2:
            options["alibi_slopes"] = slopes[place]
        if keys == 0:
            out, lse = torch.zeros_like(own), torch.full((1, 4, queries), float("-inf")).to(own)
        else:
            out, lse = attend(own, k, v, **options)
        outputs.append((out[0], lse[0]))
    out, lse = zip(*outputs, strict=True)
    return torch.cat(out), torch.cat(lse, 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("tile", [3, 64])
def test_pages_are_as_keys_one_after_another(tile, call, backend, monkeypatch):
    monkeypatch.setattr(pages, "TILE", tile)
    device, given = device_of(backend), make()
    expected = alone(given, CALLS[call])
    dtype = torch.float64 if backend == "reference" else WIDEST
    moved = {
        name: x.to(device, dtype if x.is_floating_point() else x.dtype)
        if isinstance(x, torch.Tensor)
        else x
        for name, x in {**given, **CALLS[call]}.items()
    }
    with fastattn.backend(backend):
        out, lse, _ = flash_attn_varlen_func(**moved, return_attn_probs=True)
    torch.testing.assert_close(out[:TOKENS].cpu(), expected[0].to(dtype))
    torch.testing.assert_close(lse[:, :TOKENS].cpu(), expected[1].to(dtype))
    assert out[TOKENS:].eq(0).all()
    assert lse[:, TOKENS:].eq(float("-inf")).all()


def test_gradients_are_those_of_the_keys():
    given, call = make(), CALLS["window"]
    leaves = {name: given[name].requires_grad_() for name in "qkv"}
    out = flash_attn_varlen_func(**given, **call)
    expected, _ = alone(given, call)
    weights = torch.randn(expected.shape, dtype=torch.float64)
    for found, truth in zip(
        torch.autograd.grad((out[:TOKENS] * weights).sum(), list(leaves.values())),
        torch.autograd.grad((expected * weights).sum(), list(leaves.values())),
        strict=True,
    ):
        torch.testing.assert_close(found, truth)


def test_the_forward_pass_by_itself():
    given = make()
    names = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    arguments = [given[name] for name in names]
    out, lse, *_ = _flash_attn_varlen_forward(
        *arguments, 0.0, None, True, block_table=given["block_table"]
    )
    expected = flash_attn_varlen_func(**given, causal=True, return_attn_probs=True)
    torch.testing.assert_close((out, lse), expected[:2])


def test_nothing_for_no_queries():
    given = make() | {"q": torch.zeros(0, 4, 8).double(), "max_seqlen_q": 0}
    given["cu_seqlens_q"] = torch.zeros(6, dtype=torch.int32)
    out, lse, _ = flash_attn_varlen_func(**given, return_attn_probs=True)
    assert out.shape == (0, 4, 8)
    assert lse.shape == (4, 0)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"dropout_p": 0.1}, "dropout_p must be 0 with a block_table"),
        ({"block_table": torch.zeros(4, 3, dtype=torch.int32)}, "for 5 sequences, got"),
        ({"cu_seqlens_k": torch.zeros(4, dtype=torch.int32)}, "for 5 sequences, got"),
        ({"max_seqlen_q": 6}, "a sequence of 7, more than the 6 of max_seqlen_q"),
        ({"cu_seqlens_k": cumulative([13, 1, 1, 1, 1])}, "lengths"),
    ],
)
def test_what_does_not_fit_is_refused(changed: dict[str, Any], says: str):
    with pytest.raises(ValueError, match=says):
        flash_attn_varlen_func(**{**make(), **changed})
