"""fastattn.nn.Linear in the place of torch's own."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import fastattn.nn
from fastattn.ops.core.backends import use_triton
from fastattn.reference.linear import ACTIVATIONS
from support import DEVICE, same_bits

DEVICES = ["cpu", pytest.param(DEVICE, marks=pytest.mark.kernels, id="kernels")]
both_backends = pytest.mark.parametrize("device", DEVICES)

ARGUMENTS: list[dict[str, Any]] = [{}, {"bias": False}, {"dtype": torch.float64}]
every_constructor = pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)


@every_constructor
def test_constructor_initialisation_repr_and_state_dict(arguments):
    torch.manual_seed(1)
    ours = fastattn.nn.Linear(6, 5, **arguments)
    torch.manual_seed(1)
    theirs = nn.Linear(6, 5, **arguments)
    assert isinstance(ours, nn.Linear)
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        assert same_bits(ours.state_dict()[name], value)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert fastattn.nn.Linear(6, 5, False).bias is None


@both_backends
@every_constructor
@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (0,)], ids=str)
def test_outputs_and_gradients_are_torchs(device, arguments, leading):
    ours = fastattn.nn.Linear(6, 5, **arguments).to(device)
    theirs = nn.Linear(6, 5, **arguments).to(device)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(*leading, 6, dtype=ours.weight.dtype, device=device)
    results = []
    for module in (ours, theirs):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        results.append([y, *torch.autograd.grad(y.sum(), [leaf, *module.parameters()])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@both_backends
def test_an_activation_is_applied_and_shown(device):
    module = fastattn.nn.Linear(6, 5, activation="silu").to(device)
    x = torch.randn(3, 6, device=device)
    torch.testing.assert_close(module(x), ACTIVATIONS["silu"](nn.Linear.forward(module, x)))
    assert repr(module).endswith("bias=True, activation='silu')")
    assert list(module.state_dict()) == ["weight", "bias"]


def test_a_wrong_activation_is_named():
    with pytest.raises(ValueError, match="Linear: activation must be one of relu"):
        fastattn.nn.Linear(6, 5, activation="swish")  # type: ignore[arg-type]


def test_deepcopy_and_pickle():
    module = fastattn.nn.Linear(6, 5, activation="relu")
    x = torch.randn(3, 6)
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(copied) is fastattn.nn.Linear
        assert same_bits(copied(x), module(x))


@both_backends
def test_autocast_computes_in_its_dtype(device):
    module = fastattn.nn.Linear(6, 5, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = module(torch.randn(3, 6, device=device))
    assert y.dtype is torch.bfloat16
    y.float().sum().backward()
    assert module.weight.grad is not None
    assert module.weight.grad.dtype is torch.float32


@both_backends
def test_a_wrong_width_is_refused(device):
    x = torch.randn(3, 7, device=device)
    by_kernels: Any = (ValueError, r"weight must have the shape \(N, 7\)")
    error, message = by_kernels if use_triton(x) else (RuntimeError, "3x7 and 6x5")
    with pytest.raises(error, match=message):
        fastattn.nn.Linear(6, 5, device=device)(x)
