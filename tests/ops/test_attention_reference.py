"""The reference of attention, and the function with torch's signature, against torch's own."""

import inspect
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_support import (
    assert_results_close,
    incoming,
    normal,
    qkv,
    random_mask,
    results,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastattn
from fastattn.functional import scaled_dot_product_attention
from support import DEVICE, WIDEST, assert_close

each_backend = pytest.mark.parametrize(
    "backend", [pytest.param("triton", marks=pytest.mark.kernels), "reference"]
)


def of_reference(*tensors: torch.Tensor, **options: Any) -> Any:
    with fastattn.backend("reference"):
        return fastattn.attention(*tensors, **options)


def compare(
    function: Callable, tensors: list[torch.Tensor], expected: Callable, **options: Any
) -> None:
    assert_results_close(results(function, tensors, **options), results(expected, tensors))


@pytest.mark.parametrize(
    ("shape", "options", "torchs"),
    [
        ({"queries": 20, "keys": 33}, {}, {}),
        ({"queries": 20}, {"causal": True}, {"is_causal": True}),
        ({"queries": 20, "keys": 33}, {"scale": 0.3}, {"scale": 0.3}),
        ({"heads": 4, "key_heads": 2}, {"causal": True}, {"is_causal": True, "enable_gqa": True}),
        ({"queries": 20, "dim": 24, "value_dim": 16}, {}, {}),
    ],
    ids=["plain", "causal", "scale", "heads share keys", "wider keys"],
)
def test_reference_is_what_torch_computes(shape, options, torchs):
    tensors = qkv(2, **shape)
    # With the lse the reference composes the scores itself, without it torch's own does.
    for return_lse in (False, True):

        def outputs(*tensors: torch.Tensor, return_lse: bool = return_lse) -> Any:
            found = of_reference(*tensors, return_lse=return_lse, **options)
            return found[0] if return_lse else found

        compare(outputs, tensors, lambda *x: F.scaled_dot_product_attention(*x, **torchs))


@pytest.mark.parametrize("shape", [(2, 2, 20, 33), (2, 1, 1, 33), (1, 2, 20, 1), (20, 33)], ids=str)
def test_reference_takes_masks_as_torch_does(shape):
    tensors, mask = qkv(2, 2, 20, 33), random_mask(*shape)
    compare(
        of_reference,
        tensors,
        lambda *x: F.scaled_dot_product_attention(*x, mask.expand(2, 2, 20, 33)),
        mask=mask,
    )


def test_lse_of_the_reference_is_that_of_the_scores():
    q, k, v = qkv(2, 2, 20, 33)

    def explicit(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        scores = q @ k.mT * 0.25
        places = torch.arange(20, device=DEVICE)[:, None] + 13
        hidden = torch.arange(33, device=DEVICE) > places
        scores = scores.masked_fill(hidden, float("-inf"))
        return scores.softmax(-1) @ v, scores.logsumexp(-1)

    compare(of_reference, [q, k, v], explicit, causal=True, return_lse=True)


@pytest.mark.parametrize("masked", [False, True])
def test_reference_is_what_a_module_of_torch_computes(masked):
    module = nn.MultiheadAttention(16, 4, batch_first=True, dtype=WIDEST, device=DEVICE)
    x = torch.randn(2, 20, 16, dtype=WIDEST, device=DEVICE, requires_grad=True)
    lengths = torch.tensor([20, 13], device=DEVICE)
    # The module's masks are True where nothing is attended.
    padding = torch.arange(20, device=DEVICE) >= lengths[:, None]
    later = torch.ones(20, 20, dtype=torch.bool, device=DEVICE).triu(1)
    masks = {"key_padding_mask": padding, "attn_mask": later} if masked else {}
    expected, _ = module(x, x, x, need_weights=False, **masks)

    projected = F.linear(x, module.in_proj_weight, module.in_proj_bias)
    q, k, v = projected.unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
    options = {"causal": True, "kv_lengths": lengths} if masked else {}
    found = module.out_proj(of_reference(q, k, v, **options).transpose(1, 2).flatten(2))
    variables = [x, *module.parameters()]
    assert_results_close(
        {"y": found, **gradients_by_place(found, variables)},
        {"y": expected, **gradients_by_place(expected, variables)},
    )


def gradients_by_place(output: torch.Tensor, variables: list[Any]) -> dict[str, torch.Tensor]:
    found = torch.autograd.grad(output, variables, incoming(output))
    return {str(place): gradient for place, gradient in enumerate(found)}


def test_the_signature_is_that_of_torch():
    ours = list(inspect.signature(scaled_dot_product_attention).parameters.values())
    # torch's is written in C++, and described in its docstring alone.
    described = str(F.scaled_dot_product_attention.__doc__).split("(", 1)[1].split(") ->", 1)[0]
    names = [part.split("=")[0].strip() for part in described.split(",")]
    defaults = [part.split("=")[1].strip() for part in described.split(",") if "=" in part]
    assert [parameter.name for parameter in ours] == [name for name in names if name != "*"]
    assert [str(p.default) for p in ours if p.default is not inspect.Parameter.empty] == defaults


@each_backend
@pytest.mark.parametrize(
    ("shapes", "options"),
    [
        ([(20, 16), (33, 16), (33, 8)], {}),
        ([(20, 16), (33, 16), (33, 8)], {"is_causal": True}),
        ([(3, 20, 16), (3, 33, 16), (3, 33, 16)], {"is_causal": True}),
        ([(2, 3, 20, 16), (2, 3, 33, 16), (2, 3, 33, 16)], {"is_causal": True, "scale": 0.5}),
        ([(2, 3, 33, 16), (2, 3, 20, 16), (2, 3, 20, 16)], {"is_causal": True}),
        ([(2, 2, 3, 20, 16), (2, 2, 3, 33, 16), (2, 2, 3, 33, 16)], {"is_causal": True}),
        ([(2, 4, 20, 16), (2, 2, 33, 16), (2, 2, 33, 16)], {"enable_gqa": True}),
        ([(4, 20, 16), (2, 33, 16), (2, 33, 16)], {"enable_gqa": True}),
        ([(2, 4, 20, 16), (1, 4, 33, 16), (4, 33, 16)], {}),
        ([(2, 1, 20, 16), (2, 4, 33, 16), (33, 16)], {}),
    ],
    ids=str,
)
def test_function_computes_what_torchs_does(backend, shapes, options):
    tensors = [torch.randn(s, dtype=WIDEST, device=DEVICE).requires_grad_() for s in shapes]
    with fastattn.backend(backend):
        found = results(scaled_dot_product_attention, tensors, **options)
    assert_results_close(found, results(F.scaled_dot_product_attention, tensors, **options))


@pytest.mark.parametrize(
    "backend",
    [pytest.param("triton", marks=[pytest.mark.kernels, pytest.mark.slow]), "reference"],
)
@pytest.mark.parametrize("kind", [torch.bool, WIDEST], ids=["booleans", "floats"])
@pytest.mark.parametrize(
    ("dims", "shape"),
    [
        (2, (20, 40)),
        (2, (1, 40)),
        (3, (20, 40)),
        (3, (3, 1, 40)),
        (4, (20, 40)),
        (4, (3, 20, 1)),
        (4, (2, 1, 1, 40)),
        (4, (2, 3, 20, 40)),
        (5, (20, 40)),
        (5, (2, 1, 3, 20, 40)),
    ],
    ids=str,
)
def test_masks_broadcast_as_in_torch(backend, kind, dims, shape):
    leading = (2, 2, 3)[-max(dims - 2, 0) :] if dims > 2 else ()
    tensors = [
        torch.randn(*leading, length, 16, dtype=WIDEST, device=DEVICE).requires_grad_()
        for length in (20, 40, 40)
    ]
    mask = random_mask(*shape)
    if kind is not torch.bool:
        mask = torch.randn(shape, dtype=kind, device=DEVICE).masked_fill(~mask, float("-inf"))
    with fastattn.backend(backend):
        found = results(scaled_dot_product_attention, tensors, attn_mask=mask)
    assert_results_close(found, results(F.scaled_dot_product_attention, tensors, attn_mask=mask))


@each_backend
def test_a_float_mask_may_hide_whole_blocks_and_rows(backend):
    # Causal as many write it; the second query sees nothing, the last one the last key alone.
    mask = torch.full((100, 100), float("-inf"), dtype=WIDEST, device=DEVICE).triu(1)
    mask[1] = float("-inf")
    mask[99, :99] = float("-inf")
    tensors = qkv(1, 2, 100)
    with fastattn.backend(backend):
        found = results(scaled_dot_product_attention, tensors, attn_mask=mask)
    assert (found["o"][:, :, 1] == 0).all()
    assert_results_close(found, results(F.scaled_dot_product_attention, tensors, attn_mask=mask))


class TorchsAttention(TorchDispatchMode):
    """Notes whether torch's own attention ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.namespace)
        return func(*args, **(kwargs or {}))


@pytest.mark.kernels
@pytest.mark.parametrize("shape", [(20, 20), (2, 1, 20), (1, 2, 1, 20), (3, 1, 2, 20, 20)])
def test_a_learned_mask_gets_its_gradient(shape):
    q, k, v = (normal(3, 2, 2, 20, 8) if len(shape) == 5 else x for x in qkv(1, 2, 20))
    mask = normal(*shape)
    found = scaled_dot_product_attention(q, k, v, mask)
    expected = F.scaled_dot_product_attention(q, k, v, mask)
    assert_close(found, expected, "o")
    variables = [q, k, v, mask]
    for name, ours, theirs in zip(
        ("dq", "dk", "dv", "dmask"),
        torch.autograd.grad(found, variables, incoming(found)),
        torch.autograd.grad(expected, variables, incoming(found)),
        strict=True,
    ):
        assert_close(ours, theirs, name)


@pytest.mark.kernels
def test_dropout_follows_the_seed_of_torch():
    q, k, v = qkv(1, 2, 64)
    ones = torch.ones_like(v)
    torch.manual_seed(1)
    with TorchsAttention() as ours:
        dropped = scaled_dot_product_attention(q, k, ones, dropout_p=0.5)
    assert "fastattn" in ours.names
    torch.manual_seed(1)
    assert torch.equal(dropped, scaled_dot_product_attention(q, k, ones, dropout_p=0.5))
    torch.manual_seed(2)
    assert not torch.equal(dropped, scaled_dot_product_attention(q, k, ones, dropout_p=0.5))
    # The mean of a row's weights that are kept and doubled.
    assert abs(dropped.mean().item() - 1.0) < 0.1
    assert scaled_dot_product_attention(q, k, v, dropout_p=1.0).abs().max() == 0.0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": torch.randn(8)}, ValueError, "query, key and value must have 2 dimensions"),
        ({"key": torch.randn(3, 2, 6, 8)}, ValueError, "shapes must broadcast"),
        ({"key": torch.randn(2, 4, 6, 8)}, ValueError, "shapes must broadcast"),
        (
            {"attn_mask": torch.ones(5, 7, dtype=torch.bool)},
            ValueError,
            r"shapes must broadcast, got \(2, 2, 5, 6\), \(5, 7\)",
        ),
        (
            {"attn_mask": torch.ones(3, 1, 1, 5, 6)},
            ValueError,
            r"attn_mask must broadcast to \(2, 2, 5, 6\), got \(3, 1, 1, 5, 6\)",
        ),
        (
            {"attn_mask": torch.ones(5, 6, dtype=torch.int32)},
            TypeError,
            "attn_mask must be boolean or float, got torch.int32",
        ),
        (
            {"attn_mask": torch.ones(5, 6), "is_causal": True},
            ValueError,
            "attn_mask and is_causal exclude each other",
        ),
        ({"dropout_p": -0.5}, ValueError, r"dropout_p must be in \[0, 1\], got -0.5"),
        ({"dropout_p": 1.5}, ValueError, r"dropout_p must be in \[0, 1\], got 1.5"),
    ],
)
def test_bad_arguments_of_the_function_are_named(change, error, message):
    arguments: dict[str, Any] = {
        "query": torch.randn(2, 2, 5, 8),
        "key": torch.randn(2, 2, 6, 8),
        "value": torch.randn(2, 2, 6, 8),
    }
    with pytest.raises(error, match=message):
        scaled_dot_product_attention(**{**arguments, **change})


@pytest.mark.parametrize(
    ("change", "is_torchs"),
    [
        ({}, True),
        ({"is_causal": True, "query": torch.randn(2, 4, 6, 8)}, True),
        ({"dropout_p": 0.5}, True),
        ({"is_causal": True}, False),
        ({"attn_mask": torch.ones(5, 6, dtype=torch.bool)}, False),
        ({"query": torch.randn(2, 4, 5, 8, requires_grad=True)}, False),
        ({"key": torch.randn(1, 4, 6, 8), "value": torch.randn(4, 6, 8)}, False),
        ({"key": torch.randn(2, 4, 0, 8), "value": torch.randn(2, 4, 0, 8)}, False),
    ],
    ids=[
        "plain",
        "causal",
        "dropout",
        "causal, with keys that nobody sees",
        "mask",
        "recorded",
        "broadcasting",
        "no keys",
    ],
)
def test_without_kernels_it_is_torchs_own_function(change, is_torchs, monkeypatch):
    calls = []

    def own(*args: Any, **options: Any) -> torch.Tensor:
        calls.append(args)
        return original(*args, **options)

    original = F.scaled_dot_product_attention
    # The reference calls it too, from its own module.
    functions = types.SimpleNamespace(scaled_dot_product_attention=own)
    monkeypatch.setattr(fastattn.functional.dot_product_attention, "F", functions)
    arguments: dict[str, Any] = {
        "query": torch.randn(2, 4, 5, 8),
        "key": torch.randn(2, 4, 6, 8),
        "value": torch.randn(2, 4, 6, 8),
    }
    arguments |= change
    with fastattn.backend("reference"):
        found = scaled_dot_product_attention(**arguments)
    assert len(calls) == is_torchs
    assert found.shape == arguments["query"].shape
