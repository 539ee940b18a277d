"""Selective checkpointing, and scores by relative positions."""

import pytest
import torch
from attention_support import check, incoming, qkv
from torch.utils.checkpoint import checkpoint

import fastattn
from support import DEVICE, WIDEST, count_launches


@pytest.mark.kernels
def test_attention_is_kept_and_all_else_computed_again():
    (x,) = (y.detach().requires_grad_() for y in qkv(1, 2, 20)[:1])

    def block(x: torch.Tensor) -> torch.Tensor:
        y = fastattn.rms_norm(x)
        return fastattn.attention(y, y, y, causal=True) + x

    def run(**options) -> tuple[torch.Tensor, list[str]]:
        o = checkpoint(block, x, use_reentrant=False, **options)
        with count_launches() as launched:
            (gradient,) = torch.autograd.grad(o, x, incoming(o))
        return gradient, launched

    expected, all_again = run()
    found, launched = run(context_fn=fastattn.save_attention)
    assert torch.equal(found, expected)
    assert all_again.count("attention_forward_kernel") == 1
    assert launched.count("attention_forward_kernel") == 0
    assert [name for name in launched if "norm" in name] == [
        name for name in all_again if "norm" in name
    ]


def shifted_by_index(scores: torch.Tensor, keys: int) -> torch.Tensor:
    """What the shift is by definition."""
    queries = scores.shape[2]
    m, n = torch.arange(queries)[:, None], torch.arange(keys)
    return scores[:, :, m, n - m + queries - 1]


@pytest.mark.kernels
@pytest.mark.parametrize(("queries", "keys", "heads"), [(9, 9, 2), (7, 20, 1), (1, 5, 2)])
def test_the_shift_is_one_of_indices(queries, keys, heads):
    inputs = qkv(2, 2, queries, keys)
    shape = (2, heads, queries, queries + keys - 1)
    scores = torch.randn(shape, dtype=WIDEST, device=DEVICE, requires_grad=True)

    def run(**options) -> list[torch.Tensor]:
        o = fastattn.attention(*inputs, **options)
        return [o, *torch.autograd.grad(o, [scores, *inputs], incoming(o))]

    found = run(score_mods=[fastattn.RelativeShift(scores)])
    expected = run(bias=shifted_by_index(scores, keys))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    check(inputs, score_mods=[fastattn.RelativeShift(scores.detach())])


def test_the_shift_is_the_one_of_transformer_xl():
    length = 6
    scores = torch.randn(2, 3, length, 2 * length - 1)
    # Of Dai et al.: a column of zeros, another shape, and the first row away.
    padded = torch.nn.functional.pad(scores, (1, 0)).view(2, 3, 2 * length, length)
    theirs = padded[:, :, 1:].reshape(2, 3, length, 2 * length - 1)[..., :length]
    term = fastattn.RelativeShift(scores)
    assert torch.equal(term.tensors[0], theirs)
    assert term.tensors[0].data_ptr() - scores.data_ptr() == (length - 1) * scores.element_size()


def test_scores_that_do_not_fit():
    x = torch.ones(1, 2, 4, 8)
    with pytest.raises(ValueError, match=r"scores \(1 or 1, 2 or 1, 4, 7\), got \(1, 2, 4, 4\)"):
        fastattn.attention(x, x, x, score_mods=[fastattn.RelativeShift(torch.ones(1, 2, 4, 4))])
    with pytest.raises(ValueError, match="must be a tensor"):
        fastattn.RelativeShift(torch.ones(2, 4, 7))


def test_numerical_derivatives():
    q, k, v = (torch.randn(1, 1, 3, 4, dtype=torch.float64) for _ in range(3))
    scores = torch.randn(1, 1, 3, 5, dtype=torch.float64, requires_grad=True)
    with fastattn.backend("reference"):
        torch.autograd.gradcheck(
            lambda s: fastattn.attention(q, k, v, score_mods=[fastattn.RelativeShift(s)]), scores
        )
