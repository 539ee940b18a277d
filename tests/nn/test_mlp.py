"""GatedMLP and MLP beside Hugging Face's layers, and with other modules in place of parts."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastattn
from fastattn.nn import MLP, GatedMLP
from fastattn.nn.mlp import FUNCTIONS, GATED_FUNCTIONS
from fastattn.ops.core.backends import Backend
from fastattn.ops.gated_linear import ACTIVATIONS as GATED_ACTIVATIONS
from fastattn.ops.linear import ACTIVATIONS
from support import DEVICE, WIDEST, assert_close, same_bits

kernels = pytest.mark.kernels

IN, HIDDEN = 24, 40


def place(module: nn.Module) -> Any:
    """A module where the tests' numbers are."""
    return module.to(DEVICE or "cpu", WIDEST)


def batch(columns: int = IN) -> torch.Tensor:
    return torch.randn(2, 9, columns, dtype=WIDEST, device=DEVICE or "cpu", requires_grad=True)


def outcome(module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The output, and the gradients of x and of the parameters in their order."""
    y = module(x)
    dy = torch.linspace(-1.0, 2.0, y.numel(), dtype=y.dtype, device=y.device).reshape(y.shape)
    return [y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], dy)]


def llama(activation: str, bias: bool) -> nn.Module:
    pytest.importorskip("transformers")
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    names = {"gelu_tanh": "gelu_pytorch_tanh"}
    config = LlamaConfig(
        hidden_size=IN,
        intermediate_size=HIDDEN,
        num_attention_heads=4,
        hidden_act=names.get(activation, activation),
        mlp_bias=bias,
    )
    return place(LlamaMLP(config))


def gpt2(activation: str) -> nn.Module:
    pytest.importorskip("transformers")
    from transformers import GPT2Config
    from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

    names = {"gelu_tanh": "gelu_new"}
    config = GPT2Config(
        n_embd=IN, activation_function=names.get(activation, activation), resid_pdrop=0.0
    )
    theirs = GPT2MLP(HIDDEN, config)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    return place(theirs)


@kernels
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu", "sigmoid"])
def test_kernels_agree_with_llama(activation, bias):
    check_llama("triton", activation, bias)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu", "sigmoid"])
def test_reference_agrees_with_llama(activation):
    check_llama("reference", activation, bias=True)


def check_llama(backend: Backend, activation: Any, bias: bool) -> None:
    theirs = llama(activation, bias)
    ours = place(GatedMLP(IN, HIDDEN, activation=activation, bias=bias))
    ours.load_state_dict(theirs.state_dict())
    x = batch()
    with fastattn.backend(backend):
        found = outcome(ours, x)
    expected = outcome(theirs, x)
    names = ["y", "dx", *dict(theirs.named_parameters())]
    assert names[2:] == [name for name, _ in ours.named_parameters()]
    for name, a, b in zip(names, found, expected, strict=True):
        assert_close(a, b, name)


@kernels
@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu", "relu", "silu"])
def test_kernels_agree_with_gpt2(activation):
    check_gpt2("triton", activation)


@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu", "relu", "silu"])
def test_reference_agrees_with_gpt2(activation):
    check_gpt2("reference", activation)


def check_gpt2(backend: Backend, activation: Any) -> None:
    theirs = gpt2(activation)
    ours = place(MLP(IN, HIDDEN, activation=activation))
    state = theirs.state_dict()
    kept = dict(state)
    ours.load_state_dict(state)
    assert state.keys() == kept.keys()
    x = batch()
    with fastattn.backend(backend):
        found = outcome(ours, x)
    # Conv1D's weights are (in, out).
    expected = [g if g.dim() != 2 else g.t() for g in outcome(theirs, x)]
    names = ["y", "dx", "fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]
    for name, a, b in zip(names, found, expected, strict=True):
        assert_close(a, b, name)


def test_gpt2_layout_loads_inside_a_model_and_beside_other_keys():
    theirs = nn.ModuleDict({"mlp": gpt2("gelu_tanh"), "norm": place(nn.LayerNorm(IN))})
    ours = nn.ModuleDict({"mlp": place(MLP(IN, HIDDEN)), "norm": place(nn.LayerNorm(IN))})
    assert ours.load_state_dict(theirs.state_dict()) == ([], [])
    weight = theirs.state_dict()["mlp.c_fc.weight"]
    assert torch.equal(ours.state_dict()["mlp.fc1.weight"], weight.t())
    empty = MLP(IN, HIDDEN, device="meta")
    empty.load_state_dict(theirs["mlp"].state_dict(), assign=True)
    assert all(p.device == weight.device and p.is_contiguous() for p in empty.parameters())


def test_weights_by_gpt2s_names_that_are_not_conv1ds_are_refused():
    ours = MLP(IN, HIDDEN)
    state = {name.replace("fc1", "c_fc"): tensor for name, tensor in ours.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"size mismatch for fc1\.weight"):
        ours.load_state_dict(state)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "GatedMLP": lambda: GatedMLP(IN, HIDDEN, 12, activation="gelu", bias=True),
    "MLP": lambda: MLP(IN, HIDDEN, 12, activation="relu_squared"),
    "MLP without biases": lambda: MLP(IN, HIDDEN, activation="silu", bias=False, dropout=0.5),
}
every_module = pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)


@every_module
def test_copies_and_round_trips_give_the_same(make):
    module = place(make()).eval()
    x = batch()
    y = module(x)
    loaded = place(make()).eval()
    assert loaded.load_state_dict(module.state_dict()) == ([], [])
    for copied in (loaded, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert same_bits(copied(x), y)
        assert repr(copied) == repr(module)
    # A copy still reads GPT-2's layout.
    if isinstance(module, MLP):
        state = copy.deepcopy(module).state_dict()
        state["c_fc.weight"] = state.pop("fc1.weight").t()
        copy.deepcopy(loaded).load_state_dict(state)


@pytest.mark.parametrize("module", [GatedMLP, MLP])
def test_dtype_and_device_reach_every_parameter(module):
    parameters = list(module(4, 8, bias=True, dtype=torch.bfloat16, device="meta").parameters())
    assert len(parameters) == (6 if module is GatedMLP else 4)
    assert all(p.dtype is torch.bfloat16 and p.is_meta for p in parameters)


@pytest.mark.parametrize("activation", GATED_ACTIVATIONS)
def test_gated_mlp_without_the_fused_kernel(activation):
    module = place(GatedMLP(IN, HIDDEN, activation=activation))
    x = batch()
    expected = outcome(module, x)
    called = []
    handle = module.up_proj.register_forward_hook(lambda *_: called.append(True))
    for a, b in zip(outcome(module, x), expected, strict=True):
        assert_close(a, b)
    assert called == [True]
    handle.remove()
    outcome(module, x)
    assert called == [True]
    assert set(GATED_FUNCTIONS) == set(GATED_ACTIVATIONS)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mlp_without_the_fused_kernel(activation):
    module = place(MLP(IN, HIDDEN, activation=activation))
    x = batch()
    expected = outcome(module, x)
    called = []
    module.fc1.register_forward_pre_hook(lambda *_: called.append(True))
    for a, b in zip(outcome(module, x), expected, strict=True):
        assert_close(a, b)
    assert called == [True]
    assert set(FUNCTIONS) == set(ACTIVATIONS)


class Adapter(nn.Module):
    """A layer around a layer, which offers the inner one's parameters, as low-rank adapters do."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner

    @property
    def weight(self) -> torch.Tensor:
        return self.inner.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return self.inner.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + 1.0


@pytest.mark.parametrize("name", ["gate_proj", "up_proj"])
def test_an_adapter_in_the_place_of_a_layer_is_called(name):
    module = place(GatedMLP(IN, HIDDEN))
    x = batch()
    projected = {"gate_proj": module.gate_proj(x), "up_proj": module.up_proj(x)}
    projected[name] = projected[name] + 1.0
    expected = module.down_proj(F.silu(projected["gate_proj"]) * projected["up_proj"])
    setattr(module, name, Adapter(getattr(module, name)))
    assert_close(module(x), expected)


def test_a_replaced_forward_of_a_layer_is_called():
    module = place(MLP(IN, HIDDEN, activation="relu"))
    x = batch()
    expected = module.fc2(F.relu(module.fc1(x) + 1.0))
    plain = module.fc1.forward
    module.fc1.forward = lambda x: plain(x) + 1.0
    assert_close(module(x), expected)


def test_dropout_is_of_the_output_and_in_training_alone():
    module = MLP(IN, HIDDEN, dropout=0.5)
    x = torch.randn(50, IN)
    kept = module.eval()(x)
    dropped = module.train()(x)
    zero = dropped == 0.0
    assert 0.4 < zero.float().mean() < 0.6
    torch.testing.assert_close(dropped[~zero], 2.0 * kept[~zero])


@kernels
@pytest.mark.parametrize("make", [lambda: GatedMLP(IN, HIDDEN), lambda: MLP(IN, HIDDEN)])
@pytest.mark.slow
def test_compiles_without_graph_breaks(make):
    torch.compiler.reset()
    module = place(make())
    x = batch()
    expected = outcome(module, x)
    module.compile(fullgraph=True, backend="aot_eager")
    for a, b in zip(outcome(module, x), expected, strict=True):
        assert same_bits(a, b)


def test_bad_activations_are_named():
    with pytest.raises(ValueError, match=r"GatedMLP: activation must be one of silu.*got 'tanh'"):
        GatedMLP(4, 8, activation="tanh")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"MLP: activation must be one of relu.*got 'gelu_new'"):
        MLP(4, 8, activation="gelu_new")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="w_gate must have shape"):
        GatedMLP(4, 8)(torch.randn(2, 5))
