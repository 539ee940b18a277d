"""Plain functions that a call is given directly, and block masks that are made of them."""

import doctest

import pytest
import torch
from attention_support import check, qkv
from torch.nn.attention.flex_attention import create_block_mask as torchs_block_mask

import fastattn
from fastattn.ops.attention.python_terms import block_masks
from fastattn.ops.attention.python_terms.terms import PythonMask
from support import DEVICE

DOCUMENTS = torch.tensor([[0] * 30 + [1] * 40, [0] * 55 + [1] * 15], device=DEVICE)
REACH, FACTOR = 12, 0.5


def near(b, h, q_idx, kv_idx):
    return (q_idx - kv_idx).abs() <= REACH


def documents(b, h, q_idx, kv_idx):
    return (DOCUMENTS[b, q_idx] == DOCUMENTS[b, kv_idx]) & (q_idx >= kv_idx)


def of_each_head(b, h, q_idx, kv_idx):
    return q_idx - kv_idx <= REACH * (h - b)


def scattered(b, h, q_idx, kv_idx):
    return (q_idx // 16 + kv_idx // 16) % 3 == 1


def halved(score, b, h, q_idx, kv_idx):
    return score * FACTOR


@pytest.mark.kernels
def test_functions_are_given_directly():
    check(qkv(2, 2, 40, 70), score_mods=[halved], mask_mod=near, causal=True)


@pytest.mark.kernels
def test_packed_sequences_and_weights_take_functions_too():
    cumulative = torch.tensor([0, 30, 55], dtype=torch.int32, device=DEVICE)
    q, k, v = (x[0].transpose(0, 1).detach().requires_grad_() for x in qkv(1, 2, 55))
    given = {"score_mods": [halved], "mask_mod": documents}
    check(
        (q, k, v),
        lambda *x, **more: fastattn.attention_varlen(*x, cumulative, cumulative, 30, 30, **more),
        **given,
    )
    q, k, v = qkv(2, 2, 40)
    _, lse = fastattn.attention(q, k, v, **given, return_lse=True)
    sums = fastattn.attention_weights(q, k, lse, **given).sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums))


@pytest.mark.kernels
@pytest.mark.parametrize(
    ("function", "sizes", "block"),
    [
        (near, (None, None), 16),
        (documents, (2, None), (32, 16)),
        (of_each_head, (2, 2), 16),
        (scattered, (None, None), 16),
    ],
)
def test_a_block_mask_of_a_function_is_its_mask(function, sizes, block, monkeypatch):
    monkeypatch.setattr(block_masks, "MOST_SCORES", 2000)
    blocks = fastattn.create_block_mask(function, *sizes, 50, 70, DEVICE, block)
    inputs = qkv(2, 2, 50, 70)
    check(inputs, block_mask=blocks)
    found = fastattn.attention(*inputs, block_mask=blocks)
    torch.testing.assert_close(found, fastattn.attention(*inputs, mask_mod=function))


@pytest.mark.parametrize("function", [near, documents, of_each_head, scattered])
@pytest.mark.parametrize("most", [1, 5000, 2**22])
def test_the_blocks_are_flex_attentions(function, most, monkeypatch):
    monkeypatch.setattr(block_masks, "MOST_SCORES", most)
    monkeypatch.setitem(globals(), "DOCUMENTS", DOCUMENTS.to("cpu"))
    # Whole blocks: of a part of one FlexAttention does not say that it is full.
    lengths = (48, 64)
    found = fastattn.create_block_mask(function, 2, 2, *lengths, BLOCK_SIZE=(16, 32))
    theirs = torchs_block_mask(function, 2, 2, *lengths, "cpu", (16, 32))
    assert torch.equal(found.tensors[4], theirs.to_dense() > 0)
    assert (found.within is None) == (theirs.kv_num_blocks.sum() == 0)


def test_blocks_are_judged_a_few_at_a_time(monkeypatch):
    monkeypatch.setattr(block_masks, "MOST_SCORES", 1000)
    asked = []
    keep_of = PythonMask.keep_of

    def counted(*arguments):
        kept = keep_of(*arguments)
        asked.append(kept.numel())
        return kept

    monkeypatch.setattr(PythonMask, "keep_of", counted)
    fastattn.create_block_mask(of_each_head, 3, 4, 70, 200, "cpu", 16)
    assert max(asked) <= 1000
    assert sum(asked) == 3 * 4 * 70 * 200


def test_only_blocks_that_are_not_full_ask_the_function():
    assert fastattn.create_block_mask(scattered, None, None, 70, 70, "cpu", 16).within is None
    assert fastattn.create_block_mask(near, None, None, 70, 70, "cpu", 16).within is not None


def test_no_scores_are_no_blocks():
    blocks = fastattn.create_block_mask(near, None, None, 0, 20)
    x, y = torch.ones(1, 1, 0, 4), torch.ones(1, 1, 20, 4)
    assert fastattn.attention(x, y, y, block_mask=blocks).shape == x.shape


def test_numbers_that_a_block_mask_hangs_on_must_be_those_of_the_call():
    with pytest.raises(ValueError, match="B is None, and the function depends on b"):
        fastattn.create_block_mask(of_each_head, None, 2, 40, 40)
    blocks = fastattn.create_block_mask(of_each_head, 1, 2, 40, 40)
    x = torch.ones(2, 2, 40, 4)
    with pytest.raises(ValueError, match="B = 1, and its function depends on b, of which there"):
        fastattn.attention(x, x, x, block_mask=blocks)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"BLOCK_SIZE": 20}, ValueError, "multiples of 16"),
        ({"H": -1}, ValueError, "H must not be negative"),
        ({"KV_LEN": None}, TypeError, "KV_LEN must be an integer"),
        ({"mask_mod": 3}, TypeError, "a function is wanted"),
    ],
)
def test_bad_block_masks(options, error, message):
    given = {"mask_mod": near, "B": None, "H": None, "Q_LEN": 20, "KV_LEN": 20}
    with pytest.raises(error, match=message):
        fastattn.create_block_mask(**{**given, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score_mods": halved}, "score_mods must be a sequence"),
        ({"score_mods": [3]}, "score_mods must hold functions, ScoreTerm and MaskTerm, got 3"),
        ({"mask_mod": [near]}, "mask_mod must be a function or a MaskTerm"),
    ],
)
def test_what_is_no_function_says_so(options, message):
    x = torch.ones(1, 1, 4, 4)
    with pytest.raises(TypeError, match=message):
        fastattn.attention(x, x, x, **options)


def test_an_error_has_the_line_of_what_is_not_known():
    def f(score, b, h, q_idx, kv_idx):
        return score + torch.special.i0(score)

    line = f.__code__.co_firstlineno + 1
    with pytest.raises(TypeError, match=f"abs, add.*in .*plain_functions.py:{line}"):
        fastattn.score_mod(f)


def test_a_compiler_asks_for_terms():
    x = torch.ones(1, 1, 4, 4)

    def call(x):
        return fastattn.attention(x, x, x, mask_mod=near)

    with pytest.raises(Exception, match="make a term of it beforehand"):
        torch.compile(call, backend="eager", fullgraph=True)(x)
    assert torch.equal(torch.compile(call, backend="eager")(x), call(x))


def test_the_example_runs():
    assert doctest.testmod(block_masks).failed == 0
