"""Several batch dimensions, over which masks and biases broadcast, and triangle attention."""

import doctest
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_support import check, incoming
from torch.utils._python_dispatch import TorchDispatchMode

import fastattn
from fastattn.ops.attention import triangle
from support import DEVICE, WIDEST

LEADING = (2, 3, 2)


def normal(*shape: int, dtype: torch.dtype = WIDEST) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype, device=DEVICE).requires_grad_()


def qkv(leading: tuple[int, ...] = LEADING, queries: int = 9, keys: int = 20):
    return [
        normal(*leading, 2, queries, 16),
        normal(*leading, 1, keys, 16),
        normal(*leading, 1, keys, 8),
    ]


def documents(length: int, each: int) -> torch.Tensor:
    return (torch.arange(length, device=DEVICE) // each).expand(*LEADING, length)


def formula(q, k, v, bias=None, mask=None):
    """By the definition, everything expanded."""
    score = q @ k.mT * q.shape[-1] ** -0.5
    score = score if bias is None else score + bias
    score = score if mask is None else score.masked_fill(~mask, -torch.inf)
    return score.softmax(-1).nan_to_num(0.0) @ v


@pytest.mark.kernels
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 2, 9, 20),
        (2, 1, 1, 2, 9, 20),
        (1, 3, 1, 1, 9, 20),
        (1, 3, 2, 2, 1, 20),
        (2, 3, 2, 1, 1, 20),
        (2, 1, 2, 2, 9, 1),
        (2, 2, 9, 20),
    ],
)
def test_a_bias_and_a_mask_broadcast_over_any_of_them(shape):
    inputs, bias = qkv(), normal(*shape)
    mask = torch.rand(shape, device=DEVICE) < 0.7
    o = fastattn.attention(*inputs, bias=bias, mask=mask)
    expected = formula(*inputs, bias, mask)
    variables = [*inputs, bias]
    found = torch.autograd.grad(o, variables, incoming(o))
    theirs = torch.autograd.grad(expected, variables, incoming(o))
    for ours, right in zip((o, *found), (expected, *theirs), strict=True):
        torch.testing.assert_close(ours, right)


@pytest.mark.kernels
def test_all_else_goes_with_several_batch_dimensions():
    lengths = torch.arange(12, device=DEVICE).reshape(LEADING) + 5
    check(
        qkv(),
        causal=True,
        kv_lengths=lengths,
        alibi_slopes=normal(*LEADING, 2),
        document_ids=(documents(9, 5), documents(20, 11)),
        bias=normal(3, 1, 2, 9, 20),
        score_mods=[lambda s, b, h, m, n: s * (b + 1)],
        return_lse=True,
    )


class Largest(TorchDispatchMode):
    """The most elements that any operation gave, views included."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        outputs = result if isinstance(result, tuple | list) else (result,)
        for x in outputs:
            if isinstance(x, torch.Tensor) and x.dim() > 0:
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.itemsize)
        return result


@pytest.mark.kernels
@pytest.mark.parametrize("batch", [1, 2])
def test_nothing_is_allocated_that_is_larger_than_q(batch):
    tokens, heads, dim = 12, 2, 16
    q, k, v = (normal(batch, tokens, heads, tokens, dim) for _ in range(3))
    bias = normal(batch, 1, heads, tokens, tokens)
    mask = torch.rand(batch, tokens, 1, 1, tokens, device=DEVICE) < 0.8
    with Largest() as largest:
        o = fastattn.triangle_attention(q, k, v, bias, mask)
        found = torch.autograd.grad(o, [q, k, v, bias], incoming(o))
    assert largest.elements <= q.numel()
    expected = formula(q, k, v, bias, mask)
    theirs = torch.autograd.grad(expected, [q, k, v, bias], incoming(o))
    for ours, right in zip((o, *found), (expected, *theirs), strict=True):
        torch.testing.assert_close(ours, right)


@pytest.mark.kernels
def test_functional_copies_no_mask_either():
    q, k, v = (normal(2, 8, 2, 8, 16) for _ in range(3))
    bias = normal(2, 1, 2, 8, 8)
    with Largest() as largest:
        o = fastattn.functional.scaled_dot_product_attention(q, k, v, bias)
        torch.autograd.grad(o, [q, bias], incoming(o))
    assert largest.elements <= q.numel()
    torch.testing.assert_close(o, F.scaled_dot_product_attention(q, k, v, bias))


@pytest.mark.parametrize("columns", [16, 20])
@pytest.mark.kernels
def test_a_shared_bias_of_16_bits_far_apart(columns):
    """Each way in which a kernel reads it."""
    q, k, v = (normal(2, 3, 1, n, 16, dtype=torch.float32) for n in (16, columns, columns))
    wide = torch.randn(2, 1, 1, 16, columns, dtype=torch.bfloat16, device=DEVICE)
    for bias in (wide, wide.mT.contiguous().mT):
        torch.testing.assert_close(
            fastattn.attention(q, k, v, bias=bias), formula(q, k, v, bias.float())
        )
    # A stride of 2^23 elements, in memory that nobody touches.
    far = torch.empty(2**23 * 15 + columns, dtype=torch.bfloat16, device=DEVICE)
    far = far.as_strided((1, 1, 1, 16, columns), (0, 0, 0, 2**23, 1)).copy_(wide[:1])
    two = torch.randn(2, 2, 1, 16, 16, device=DEVICE)
    keys = torch.randn(2, 2, 1, columns, 16, device=DEVICE)
    torch.testing.assert_close(
        fastattn.attention(two, keys, keys, bias=far), formula(two, keys, keys, far.float())
    )


def test_numerical_derivatives():
    inputs = [normal(2, 2, 1, n, 4, dtype=torch.float64) for n in (3, 5, 5)]
    bias = normal(2, 1, 1, 3, 5, dtype=torch.float64)
    with fastattn.backend("reference"):
        torch.autograd.gradcheck(fastattn.triangle_attention, (*inputs, bias))
        torch.autograd.gradgradcheck(fastattn.triangle_attention, (*inputs, bias), fast_mode=True)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(2, 3, 1, 4, 8), (2, 1, 1, 4, 8), (2, 3, 1, 4, 8), (1, 4, 4)], "same leading dimensions"),
        ([(2, 3, 1, 4, 8)] * 3 + [(2, 2, 1, 4, 4)], r"broadcast to \(2, 3, 1, 4, 4\), got"),
        ([(2, 3, 1, 4, 8)] * 3 + [(1, 2, 3, 1, 4, 4)], "bias must broadcast to"),
        ([(1, 4, 8)] * 3 + [(4, 4)], r"q must be \(B, N, H, Q, D\)"),
    ],
)
def test_shapes_that_do_not_fit(shapes, message):
    with pytest.raises(ValueError, match=message):
        fastattn.triangle_attention(*(torch.ones(shape) for shape in shapes))


def test_a_mask_is_boolean():
    x = torch.ones(1, 2, 1, 4, 8)
    with pytest.raises(TypeError, match="must be boolean"):
        fastattn.triangle_attention(x, x, x, torch.ones(4, 4), torch.ones(2, 1, 1, 4))


def test_no_rows():
    x = torch.ones(2, 0, 1, 4, 8)
    assert fastattn.triangle_attention(x, x, x, torch.ones(2, 1, 1, 4, 4)).shape == x.shape


def test_the_example_runs():
    assert doctest.testmod(triangle).failed == 0
