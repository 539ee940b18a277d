"""Nested tensors: what torch's functions and modules take, ours and patched ones do."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fastattn
import fastattn.functional as ours
import fastattn.nn as nn
from support import DEVICE

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")

BACKENDS = [pytest.param("triton", marks=pytest.mark.kernels), "reference"]
LAYOUTS = {"jagged": torch.jagged, "strided": torch.strided}


def nested(layout: str, backend: str) -> torch.Tensor:
    device = str(DEVICE) if backend == "triton" else "cpu"
    rows = [torch.randn(length, 16, device=device) for length in (3, 5)]
    return torch.nested.nested_tensor(rows, layout=LAYOUTS[layout])


def heads(x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(-1, (2, 8)).transpose(1, 2)


def ones(x: torch.Tensor, *shape: int) -> torch.Tensor:
    return torch.ones(shape, device=x.device)


def classes(x: torch.Tensor) -> torch.Tensor:
    return torch.zeros(8, dtype=torch.int64, device=x.device)


FUNCTIONS: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "cross_entropy": lambda f, x: f.cross_entropy(x, classes(x)),
    "dropout": lambda f, x: f.dropout(x, 0.5),
    "dropout in evaluation": lambda f, x: f.dropout(x, 0.5, False),
    "dropout in place": lambda f, x: f.dropout(x.clone(), 0.5, True, True),
    "layer_norm": lambda f, x: f.layer_norm(x, (16,), ones(x, 16), ones(x, 16)),
    "linear": lambda f, x: f.linear(x, ones(x, 4, 16), ones(x, 4)),
    "log_softmax": lambda f, x: f.log_softmax(x, -1),
    "rms_norm": lambda f, x: f.rms_norm(x, (16,), ones(x, 16)),
    "scaled_dot_product_attention": (
        lambda f, x: f.scaled_dot_product_attention(heads(x), heads(x), heads(x))
    ),
    "softmax": lambda f, x: f.softmax(x, -1),
}


def outcome(call: Callable[[], Any], x: torch.Tensor) -> Any:
    """What comes out and, where torch has one, the gradient; or the error's type and text."""
    torch.manual_seed(0)
    try:
        y = call()
        y = y[0] if isinstance(y, tuple) else y
        parts = list(y.unbind()) if y.is_nested else [y]
        if y.requires_grad and x.requires_grad:
            torch.stack([part.sin().sum() for part in parts]).sum().backward()
            assert x.grad is not None
            parts += x.grad.unbind()
            x.grad = None
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AssertionError) as error:
        return type(error)
    return parts


def assert_same(found: Any, expected: Any) -> None:
    if isinstance(expected, type) or isinstance(found, type):
        assert found is expected
        return
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("wants_gradient", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_do_what_torchs_do(name, backend, layout, wants_gradient):
    x = nested(layout, backend).requires_grad_(wants_gradient)
    expected = outcome(lambda: FUNCTIONS[name](F, x), x)
    with fastattn.backend(backend):
        assert_same(outcome(lambda: FUNCTIONS[name](ours, x), x), expected)


def test_the_functions_above_are_all_but_one_that_torch_has_none_of():
    covered = {name.split()[0] for name in FUNCTIONS}
    assert covered == set(ours.__all__) - {"linear_cross_entropy"}
    x = nested("jagged", "reference")
    with pytest.raises(TypeError, match="linear_cross_entropy: x is a nested tensor"):
        ours.linear_cross_entropy(x, torch.ones(4, 16), classes(x))


MODULES: dict[str, tuple[Callable[[Any], Any], Callable[..., Any]]] = {
    "Dropout": (lambda m: m.Dropout(0.5), lambda m, x: m(x)),
    "LayerNorm": (lambda m: m.LayerNorm(16), lambda m, x: m(x)),
    "Linear": (lambda m: m.Linear(16, 4), lambda m, x: m(x)),
    "LogSoftmax": (lambda m: m.LogSoftmax(-1), lambda m, x: m(x)),
    "MultiheadAttention": (
        lambda m: m.MultiheadAttention(16, 2, batch_first=True),
        lambda m, x: m(x, x, x),
    ),
    "MultiheadAttention in evaluation": (
        lambda m: m.MultiheadAttention(16, 2, batch_first=True).eval().requires_grad_(False),
        lambda m, x: m(x, x, x, need_weights=False),
    ),
    "RMSNorm": (lambda m: m.RMSNorm(16), lambda m, x: m(x)),
    "Softmax": (lambda m: m.Softmax(-1), lambda m, x: m(x)),
    "TransformerDecoderLayer": (
        lambda m: m.TransformerDecoderLayer(16, 2, 24, batch_first=True),
        lambda m, x: m(x, x),
    ),
    "TransformerEncoder in evaluation": (
        lambda m: m.TransformerEncoder(
            m.TransformerEncoderLayer(16, 2, 24, batch_first=True), 2
        ).eval(),
        lambda m, x: m(x),
    ),
    "TransformerEncoderLayer in evaluation": (
        lambda m: m.TransformerEncoderLayer(16, 2, 24, batch_first=True).eval(),
        lambda m, x: m(x),
    ),
}


@pytest.mark.parametrize("wants_gradient", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MODULES)
def test_modules_and_patched_ones_do_what_torchs_do(name, backend, layout, wants_gradient):
    make, call = MODULES[name]
    x = nested(layout, backend)
    theirs, patched, own = (make(m).to(x.device) for m in (torch.nn, torch.nn, nn))
    for module in (patched, own):
        module.load_state_dict(theirs.state_dict())
    fastattn.patch(patched, linear=True)
    with torch.set_grad_enabled(wants_gradient):
        expected = outcome(lambda: call(theirs, x), x)
        with fastattn.backend(backend):
            assert_same(outcome(lambda: call(patched, x), x), expected)
            assert_same(outcome(lambda: call(own, x), x), expected)


WITHOUT_COUNTERPART: dict[str, Callable[[], Any]] = {
    "Attention": lambda: nn.Attention(16, 2),
    "GatedMLP": lambda: nn.GatedMLP(16, 24),
    "LatentAttention": lambda: nn.LatentAttention(
        16, 2, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=8
    ),
    "LearnedPositions": lambda: nn.LearnedPositions(9, 16),
    "MLP": lambda: nn.MLP(16, 24),
    "PatchEmbedding": lambda: nn.PatchEmbedding(2, 3, 16),
    "SinusoidalPositions": lambda: nn.SinusoidalPositions(16),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", WITHOUT_COUNTERPART)
def test_modules_that_torch_has_none_of_refuse_by_name(name, backend, layout):
    x = nested(layout, backend)
    module = WITHOUT_COUNTERPART[name]().to(x.device)
    with fastattn.backend(backend), pytest.raises(TypeError, match="is a nested tensor"):
        module(x)
