"""Attention under what wraps it: derivatives of gradients, functorch, checkpoints, compilation."""

from typing import Any

import pytest
import torch
from attention_support import (
    FEATURES,
    Options,
    assert_results_close,
    combined,
    incoming,
    qkv,
    random_mask,
    results,
    second_derivatives,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import fastattn
from support import DEVICE, WIDEST, same_bits

pytestmark = pytest.mark.kernels


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("causal", "softcap") else pytest.mark.slow)
        for name in FEATURES
    ],
)
def test_derivatives_of_gradients(name):
    tensors, options = combined([name], queries=20, key_heads=1)
    found = second_derivatives(fastattn.attention, tensors, **options, return_lse=True)
    with fastattn.backend("reference"):
        expected = second_derivatives(fastattn.attention, tensors, **options, return_lse=True)
    assert_results_close(found, expected)


@pytest.mark.skipif(WIDEST is not torch.float64, reason="compiled kernels have no float64")
def test_numerical_derivatives_of_attention_to_itself():
    x = qkv(1, 1, 3, dim=2)[0]

    def attention(x: torch.Tensor) -> torch.Tensor:
        return fastattn.attention(x, x, x, causal=True, softcap=2.0)

    torch.autograd.gradcheck(attention, x, fast_mode=True)
    torch.autograd.gradgradcheck(attention, x, fast_mode=True)


def everything() -> Options:
    return {
        "causal": True,
        "window": (30, 2),
        "softcap": 3.0,
        "alibi_slopes": fastattn.alibi_slopes(2).to(DEVICE),
        "mask": random_mask(2, 1, 20, 40),
        "kv_lengths": torch.tensor([35, 40], device=DEVICE),
    }


def test_functorch_gives_the_same_gradients():
    tensors, options = qkv(2, 2, 20, 40), everything()
    expected = results(fastattn.attention, tensors, **options)

    def loss(tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
        o = fastattn.attention(*tensors, **options)
        return (o * incoming(o)).sum()

    found = torch.func.grad(loss)(tuple(x.detach() for x in tensors))
    for name, gradient in zip(("dq", "dk", "dv"), found, strict=True):
        assert same_bits(gradient, expected[name]), name


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_give_the_same_gradients(reentrant):
    tensors, options = qkv(2, 2, 20, 40), everything()
    expected = results(fastattn.attention, tensors, **options)
    x = [tensor.detach().requires_grad_() for tensor in tensors]
    o = checkpoint(lambda *x: fastattn.attention(*x, **options), *x, use_reentrant=reentrant)
    assert isinstance(o, torch.Tensor)
    o.backward(incoming(o))
    for name, tensor in zip(("dq", "dk", "dv"), x, strict=True):
        assert tensor.grad is not None
        assert same_bits(tensor.grad, expected[name]), name


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
def test_autocast_gives_its_dtype_to_mixed_inputs(cast, backend):
    q, k, v = qkv(1, 2, 20, 40, dtype=torch.float32)
    # What rotary leaves in float32 meets what a product has cast.
    v = v.detach().to(cast).requires_grad_()

    def under_autocast(*tensors: torch.Tensor) -> Any:
        with torch.autocast(str(DEVICE), dtype=cast), fastattn.backend(backend):
            return fastattn.attention(*tensors, causal=True, return_lse=True)

    found = results(under_autocast, (q, k, v))
    rounded = [x.detach().to(cast).requires_grad_() for x in (q, k, v)]
    with fastattn.backend(backend):
        expected = results(fastattn.attention, rounded, causal=True, return_lse=True)
    assert found["o"].dtype is cast
    assert found["lse"].dtype is torch.float32
    assert (found["dq"].dtype, found["dv"].dtype) == (torch.float32, cast)
    for name, value in expected.items():
        assert same_bits(found[name].to(value.dtype), value), name


COMPILED: dict[str, Options] = {
    "plain": {},
    "causal": {"causal": True},
    "window and lse": {"window": (9, 4), "return_lse": True},
    "softcap": {"softcap": 3.0},
    "everything": {},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("needs_gradient", [False, True], ids=["no gradient", "gradient"])
def test_compiles(name, needs_gradient):
    torch.compiler.reset()
    options = everything() if name == "everything" else COMPILED[name]
    tensors = [x.requires_grad_(needs_gradient) for x in qkv(2, 2, 20, 40)]
    compiled = torch.compile(fastattn.attention, fullgraph=True, backend="aot_eager")
    if not needs_gradient:
        found, expected = (f(*tensors, **options) for f in (compiled, fastattn.attention))
        if not isinstance(found, tuple):
            found, expected = (found,), (expected,)
        assert all(map(same_bits, found, expected))
        return
    expected = results(fastattn.attention, tensors, **options)
    for part, value in results(compiled, tensors, **options).items():
        assert same_bits(value, expected[part]), part


@pytest.mark.slow
def test_lengths_and_windows_are_compiled_for_at_most_twice():
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fastattn.attention, fullgraph=True, backend=counter)
    for queries, keys, window in ((5, 9, 3), (7, 12, 4), (11, 20, 9), (20, 37, 2)):
        tensors = qkv(2, 2, queries, keys)
        options = {
            "causal": True,
            "window": window,
            "mask": random_mask(2, 1, queries, keys),
            "kv_lengths": torch.tensor([keys, keys // 2], device=DEVICE),
        }
        found = compiled(*tensors, **options)
        assert same_bits(found, fastattn.attention(*tensors, **options))
    # Once for the first sizes, and once more for sizes in general.
    assert counter.frame_count <= 2
