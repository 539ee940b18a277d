"""Dropout, documents and block masks: what is kept, and what costs nothing."""

import pytest
import torch
from attention_support import (
    check,
    ids,
    normal,
    qkv,
    random_blocks,
    random_mask,
    results,
    seed,
)

import fastattn
from fastattn import BlockMask
from fastattn.kernels.attention import config as rules
from fastattn.kernels.attention.config import AttentionConfig
from fastattn.kernels.tuning import forget_tables
from fastattn.ops.attention import block_terms
from fastattn.ops.core.backends import INTERPRETED
from support import DEVICE, assert_close, same_bits

pytestmark = pytest.mark.kernels

interpreted = pytest.mark.skipif(not INTERPRETED, reason="changes the interpreter's tiles")


def test_dropout_keeps_what_dropout_mask_says():
    p = 0.4
    q, k, v = qkv(2, 2, 20, 33, 8, value_dim=33)
    # With the unit matrix for values the output is the weights themselves.
    v = torch.eye(33, dtype=v.dtype, device=DEVICE).expand(2, 2, 33, 33)
    o, lse = fastattn.attention(
        q, k, v, dropout_p=p, dropout_seed=seed(9), causal=True, return_lse=True
    )
    keep = fastattn.dropout_mask(seed(9), (2, 2, 20, 33), p)
    weights = fastattn.attention_weights(q, k, lse, causal=True)
    assert torch.equal(o != 0.0, keep & (weights != 0.0))
    scale = 1.0 / (1.0 - int(p * 2**31) / 2**31)
    assert torch.allclose(o, torch.where(keep, weights * scale, 0.0))
    assert torch.equal(lse, fastattn.attention(q, k, v, causal=True, return_lse=True)[1])


@interpreted
@pytest.mark.parametrize("tile", [(16, 16), (16, 64), (64, 32)])
def test_what_is_kept_does_not_depend_on_tiles(tile, monkeypatch):
    tensors = qkv(1, 2, 70, 70, 8)
    options = {"dropout_p": 0.5, "dropout_seed": seed(1), "causal": True}
    expected = results(fastattn.attention, tensors, **options)
    changed = dict.fromkeys(rules.INTERPRETED, AttentionConfig(*tile, 4, 1))
    monkeypatch.setattr(rules, "INTERPRETED", changed)
    forget_tables()
    try:
        found = results(fastattn.attention, tensors, **options)
    finally:
        monkeypatch.undo()
        forget_tables()
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-9, atol=1e-9), name


def test_dropout_draws_its_seed_from_torch():
    tensors = qkv(1, 2, 40)
    torch.manual_seed(3)
    first = results(fastattn.attention, tensors, dropout_p=0.2)
    again = results(fastattn.attention, tensors, dropout_p=0.2)
    torch.manual_seed(3)
    replayed = results(fastattn.attention, tensors, dropout_p=0.2)
    assert not torch.equal(first["o"], again["o"])
    for name, value in first.items():
        assert same_bits(replayed[name], value), name


def test_dropout_is_replayed_in_a_checkpoint():
    from torch.utils.checkpoint import checkpoint

    tensors = qkv(1, 2, 40)
    torch.manual_seed(3)
    expected = results(fastattn.attention, tensors, dropout_p=0.2)
    torch.manual_seed(3)
    found = results(
        lambda *inputs: checkpoint(fastattn.attention, *inputs, dropout_p=0.2, use_reentrant=False),
        tensors,
    )
    for name, value in expected.items():
        assert same_bits(found[name], value), name


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (40, 3)}], ids=str)
@pytest.mark.parametrize("order", ["one after another", "any"])
def test_documents_of_several_blocks(options, order, monkeypatch):
    monkeypatch.setattr(block_terms, "DOCUMENT_BLOCK", 16)
    place = torch.arange(100, device=DEVICE)
    documents = place // 23 if order == "one after another" else place * 7919 % 3
    check(qkv(2, 1, 100, dim=8), document_ids=documents.expand(2, 100), **options)


def test_documents_beside_a_block_mask():
    check(
        qkv(2, 2, 40, 50, 8),
        document_ids=(ids(2, 40), ids(1, 50)),
        block_mask=random_blocks(2, 2, 40, 50, (16, 16)),
    )


def test_a_block_mask_may_be_kept_for_several_calls():
    block_mask = random_blocks(1, 2, 40, 50, (16, 32))
    for _ in range(2):
        check(qkv(2, 2, 40, 50, 8), block_mask=block_mask, causal=True, bias=normal(2, 40, 50))


@pytest.mark.parametrize("kept", [True, False])
def test_a_block_mask_of_all_or_nothing(kept):
    table = torch.full((3, 4), kept, device=DEVICE)
    check(qkv(1, 2, 40, 50, 8), block_mask=BlockMask(table, 16), sinks=normal(2))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("term", ["block mask", "documents"])
def test_keys_that_nobody_sees_may_be_anything(term):
    q, k, v = qkv(1, 2, 64, 64, 8)
    options = {}
    hidden = torch.zeros(64, dtype=torch.bool, device=DEVICE)
    if term == "block mask":
        table = random_mask(4, 4)
        table[:, 2] = False
        hidden[32:48] = True
        options["block_mask"] = BlockMask(table, 16)
    else:
        of_keys = torch.arange(64, device=DEVICE) % 5
        hidden = of_keys == 3
        options["document_ids"] = ((torch.arange(64, device=DEVICE) % 3)[None], of_keys[None])
        hidden |= of_keys == 4
    clean = [q, *(x.detach().masked_fill(hidden[:, None], 0.0).requires_grad_() for x in (k, v))]
    dirty = [
        q,
        *(x.detach().masked_fill(hidden[:, None], float("nan")).requires_grad_() for x in (k, v)),
    ]
    bias = normal(2, 64, 64)
    expected = results(fastattn.attention, clean, bias=bias, **options)
    found = results(fastattn.attention, dirty, bias=bias, **options)
    for name, value in expected.items():
        assert same_bits(found[name], value), name


@pytest.mark.parametrize(
    "options",
    [
        {"causal": True},
        {"window": (9, 4), "softcap": 2.0},
        {"bias": (2, 40, 50), "alibi_slopes": (2,)},
        {"sinks": (2,)},
        {"block_mask": (16, 16)},
        {"document_ids": None},
    ],
    ids=str,
)
def test_weights_are_those_that_attention_used(options):
    made = {
        name: random_blocks(2, 1, 40, 50, value)
        if name == "block_mask"
        else (ids(1, 40), ids(2, 50))
        if name == "document_ids"
        else normal(*value)
        if name in ("bias", "alibi_slopes", "sinks")
        else value
        for name, value in options.items()
    }
    q, k, v = qkv(2, 2, 40, 50, 8, key_heads=1)
    o, lse = fastattn.attention(q, k, v, return_lse=True, **made)
    sinks = made.pop("sinks", None)
    weights = fastattn.attention_weights(q, k, lse, **made)
    assert_close(weights @ v, o, "o")
    total = weights.sum(-1)
    if sinks is None:
        assert_close(total, (lse != float("-inf")).to(total.dtype), "sum of weights")
    else:
        assert (total < 1.0).all()
