"""torch.fx traces models with our modules and ops in them, as it does those with torch's."""

import copy
import inspect
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import fx, nn

import fastattn
import fastattn.nn
from support import DEVICE, OPERATIONS, WIDEST, assert_close, outputs_of, same_bits, tensors_of

both_backends = pytest.mark.parametrize(
    "backend", ["reference", pytest.param("triton", marks=pytest.mark.kernels)]
)
# torch says so of its own layers too, where they cannot go through nested tensors.
pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")

C = 8

# Modules that are no more than one function, which then is the node.
FUNCTIONS = {
    "CrossEntropyLoss",
    "LayerNorm",
    "Linear",
    "LinearCrossEntropyLoss",
    "LogSoftmax",
    "RMSNorm",
    "Softmax",
}


class Residual(nn.Module):
    """A user's own module, which torch.fx sees through."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.parts:
            x = x + part(x)
        return x


def torchs() -> nn.Module:
    layer = nn.TransformerEncoderLayer(C, 2, 12, batch_first=True)
    return nn.Sequential(
        Residual(nn.LayerNorm(C), nn.Dropout(0.5), nn.RMSNorm(C), nn.Linear(C, C)),
        nn.TransformerEncoder(layer, 1),
        nn.Softmax(-1),
        nn.LogSoftmax(1),
    )


def patched() -> nn.Module:
    model = torchs()
    fastattn.patch(model, linear=True)
    return model


def ours() -> nn.Module:
    layers = fastattn.nn.Attention(C, 2), fastattn.nn.GatedMLP(C, 12)
    blocks = [fastattn.nn.TransformerBlock(*layers, partial(fastattn.nn.RMSNorm, C))]
    return nn.Sequential(
        fastattn.nn.LearnedPositions(9, C),
        Residual(fastattn.nn.MLP(C, 12, dropout=0.5), fastattn.nn.LoRALinear(C, C, rank=2)),
        fastattn.nn.TransformerStack(blocks, fastattn.nn.LayerNorm(C)),
        fastattn.nn.Linear(C, 3, activation="gelu"),
    )


MODELS = {"torch's": torchs, "patched": patched, "ours": ours}


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=WIDEST, device=DEVICE or "cpu", requires_grad=True)


def made(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().to(DEVICE or "cpu", WIDEST).eval()


def gradients(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    wanted = [p for _, p in sorted(model.named_parameters()) if p.requires_grad]
    return list(torch.autograd.grad(model(x).sin().sum(), [x, *wanted]))


@both_backends
@pytest.mark.parametrize("name", MODELS)
def test_a_traced_model_is_the_model(name, backend):
    model, x = made(MODELS[name]), random(2, 5, C)
    with fastattn.backend(backend):
        graph = fx.symbolic_trace(model)
        assert same_bits(graph(x), model(x))
        for a, b in zip(gradients(graph, x), gradients(model, x), strict=True):
            assert same_bits(a, b)
        for again in (copy.deepcopy(graph), pickle.loads(pickle.dumps(graph))):
            assert same_bits(again(x), model(x))
        assert same_bits(fx.symbolic_trace(graph)(x), model(x))


@both_backends
@pytest.mark.parametrize("name", MODELS)
def test_dropout_of_a_traced_model_follows_its_mode(name, backend):
    model, x = made(MODELS[name]).train(), random(2, 5, C)
    with fastattn.backend(backend):
        graph = fx.symbolic_trace(model)
        assert not torch.equal(graph(x), graph(x))
        assert same_bits(graph.eval()(x), model.eval()(x))


@both_backends
def test_a_model_traced_before_it_is_patched_is_patched_through_its_graph(backend):
    x = random(2, 5, C)
    model = made(torchs)
    graph = fx.symbolic_trace(model)
    expected = graph(x)
    fastattn.patch(graph, linear=True)
    with fastattn.backend(backend):
        assert_close(graph(x), expected)
        assert_close(fx.symbolic_trace(graph)(x), expected)


class Twice(nn.Module):
    """Calls a module with what some want two of."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.part(x, x)


def modules_of_one_node() -> list[str]:
    classes = {name: getattr(fastattn.nn, name) for name in fastattn.nn.__all__}
    return [
        name
        for name, kind in classes.items()
        if inspect.isclass(kind)
        and issubclass(kind, nn.Module)
        and kind.forward is not nn.Module.forward
        and name not in FUNCTIONS
    ]


@pytest.mark.parametrize("name", modules_of_one_node())
def test_every_other_module_is_a_node(name):
    kind = getattr(fastattn.nn, name)
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    graph = fx.symbolic_trace(Twice(module)).graph
    assert [node.op for node in graph.nodes] == ["placeholder", "call_module", "output"]


@pytest.mark.kernels
@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
@pytest.mark.parametrize("library", [fastattn, fastattn.ops], ids=["fastattn", "ops"])
def test_every_op_is_a_node(operation, library):
    arguments = operation.samples[0].make(WIDEST, str(DEVICE))
    given = tensors_of(arguments)

    def function(tensors: dict[str, Any]) -> Any:
        changed = {name: tensors[name] for name in given}
        return getattr(library, operation.name)(**{**arguments, **changed})

    graph = fx.symbolic_trace(function)
    assert operation.function in [node.target for node in graph.graph.nodes]
    found, expected = graph(given), operation.function(**arguments)
    for a, b in zip(outputs_of(lambda: found, {}), outputs_of(lambda: expected, {}), strict=True):
        assert same_bits(a, b)
