"""torch.export with a length left open, and torch.jit.trace: graphs for other lengths too."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fastattn
import fastattn.nn
from support import DEVICE, OPERATIONS, WIDEST, assert_close, outputs_of, same_bits, tensors_of

both_backends = pytest.mark.parametrize(
    "backend", ["reference", pytest.param("triton", marks=pytest.mark.kernels)]
)

COLUMNS = 16


def heads(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """x (B, L, C) as q, k and v of two heads."""
    return (x.unflatten(-1, (2, -1)).transpose(1, 2),) * 3


def scores(x: torch.Tensor) -> torch.Tensor:
    """(B, 1, L, L), whose strides are made of lengths."""
    return (x @ x.mT)[:, None]


def packed(x: torch.Tensor) -> torch.Tensor:
    tokens = x.flatten(0, 1).unflatten(-1, (2, -1))
    length = x.shape[1]
    ends = torch.arange(x.shape[0] + 1, dtype=torch.int32, device=x.device) * length
    return fastattn.attention_varlen(tokens, tokens, tokens, ends, ends, length, length)


def seed(x: torch.Tensor) -> torch.Tensor:
    return torch.ones(1, dtype=torch.int64, device=x.device)


CASES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "causal": lambda x: fastattn.attention(*heads(x), causal=True),
    "window and lse": lambda x: fastattn.attention(*heads(x), window=3, return_lse=True)[1],
    "mask": lambda x: fastattn.attention(*heads(x), mask=scores(x) > 0),
    "bias": lambda x: fastattn.attention(*heads(x), bias=scores(x)),
    "packed": packed,
    "dropout": lambda x: fastattn.dropout(x, 0.5, seed=seed(x)),
    "softmax": lambda x: fastattn.softmax(scores(x), mask=scores(x) > 0),
}


class Model(nn.Module):
    """A function of something that has a gradient."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(COLUMNS, COLUMNS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x @ self.weight)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=WIDEST, device=DEVICE or "cpu")


@both_backends
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
@pytest.mark.parametrize("name", CASES)
def test_an_exported_length_is_any_length(name, strict, backend):
    model = Model(CASES[name]).to(DEVICE or "cpu", WIDEST)
    length = torch.export.Dim("length", min=3, max=64)
    with fastattn.backend(backend):
        program = torch.export.export(
            model, (random(2, 7, COLUMNS),), dynamic_shapes=({1: length},), strict=strict
        )
        for other in (3, 32, 33):
            x = random(2, other, COLUMNS)
            assert_close(program.module()(x), model(x), str(other))


TRACED: dict[str, Callable[[], nn.Module]] = {
    "attention": lambda: fastattn.nn.Attention(COLUMNS, 2),
    "encoder layer": lambda: fastattn.nn.TransformerEncoderLayer(COLUMNS, 2, 24, batch_first=True),
    "gated": lambda: fastattn.nn.GatedMLP(COLUMNS, 24),
    "layer norm": lambda: fastattn.nn.LayerNorm(COLUMNS),
    "softmax": lambda: fastattn.nn.Softmax(-1),
}


@both_backends
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", TRACED)
def test_a_module_traced_without_gradients_is_the_module(name, backend):
    # In float32: a trace computes with sizes in no more than that.
    model = TRACED[name]().to(DEVICE or "cpu").eval()
    with fastattn.backend(backend), torch.no_grad():
        traced = torch.jit.trace(model, (random(2, 7, COLUMNS).float(),))
        stored = io.BytesIO()
        torch.jit.save(traced, stored)
        stored.seek(0)
        loaded: Any = torch.jit.load(stored)
        for shape in ((2, 7), (3, 12)):
            x = random(*shape, COLUMNS).float()
            torch.testing.assert_close(traced(x), model(x))
            torch.testing.assert_close(loaded(x), model(x))


@pytest.mark.kernels
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_every_traced_op_computes_what_it_is_given(operation):
    # A launch that the trace did not see would stay in it as its result.
    samples = [operation.samples[0].make(WIDEST, str(DEVICE), seed) for seed in (0, 1)]
    names = list(tensors_of(samples[0]))

    def function(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        changed = dict(zip(names, tensors, strict=True))
        return tuple(outputs_of(operation.function, {**samples[0], **changed}))

    first, second = ([sample[name].detach() for name in names] for sample in samples)
    with torch.no_grad():
        traced = torch.jit.trace(function, tuple(first))
        for a, b in zip(traced(*second), function(*second), strict=True):
            assert same_bits(a, b)
