"""fastattn.nn.Dropout in the place of torch's own."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastattn.nn
from support import DEVICE, same_bits

DEVICES = ["cpu", pytest.param(DEVICE, marks=pytest.mark.kernels, id="kernels")]
both_backends = pytest.mark.parametrize("device", DEVICES)


@pytest.mark.parametrize("arguments", [{}, {"p": 0.1}, {"p": 0.3, "inplace": True}], ids=str)
def test_constructor_repr_and_state_dict(arguments: dict[str, Any]):
    ours, theirs = fastattn.nn.Dropout(**arguments), nn.Dropout(**arguments)
    assert isinstance(ours, nn.Dropout)
    assert repr(ours) == repr(theirs)
    assert ours.state_dict() == theirs.state_dict() == {}
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(copied) is fastattn.nn.Dropout
        assert repr(copied) == repr(ours)


@pytest.mark.parametrize("p", [-0.1, 1.1])
def test_a_wrong_probability_is_refused(p):
    with pytest.raises(ValueError, match="between 0 and 1"):
        fastattn.nn.Dropout(p)


@both_backends
def test_evaluation_is_the_identity(device):
    x = torch.randn(4, 8, device=device)
    assert fastattn.nn.Dropout(0.5).eval()(x) is x


@both_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_training_drops_and_scales(dtype, device):
    x = torch.ones(64, 128, device=device, dtype=dtype, requires_grad=True)
    y = fastattn.nn.Dropout(0.75)(x)
    assert y.dtype is dtype
    assert set(y.unique().tolist()) == {0.0, 4.0}
    assert abs((y != 0).float().mean().item() - 0.25) < 0.025
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert same_bits(dx, y)


@both_backends
def test_in_place(device):
    x = torch.ones(8, 16, device=device)
    module = fastattn.nn.Dropout(0.5, inplace=True)
    assert module(x) is x
    assert set(x.unique().tolist()) == {0.0, 2.0}


@both_backends
def test_p_of_one_drops_everything(device):
    x = torch.randn(8, 16, device=device)
    assert not fastattn.nn.Dropout(1.0)(x).any()


@both_backends
def test_seed_of_torch_reproduces_a_model(device):
    model = nn.Sequential(fastattn.nn.Dropout(0.2), nn.Linear(16, 16), fastattn.nn.Dropout(0.5)).to(
        device
    )
    x = torch.randn(8, 16, device=device)
    torch.manual_seed(1)
    first = model(x)
    torch.manual_seed(1)
    assert same_bits(model(x), first)
    assert not torch.equal(model(x), first)


@pytest.mark.kernels
def test_checkpoint_of_a_model_gives_the_same_gradients():
    model = nn.Sequential(fastattn.nn.Dropout(0.2), nn.Linear(16, 16), fastattn.nn.Dropout(0.5)).to(
        DEVICE
    )
    x = torch.randn(8, 16, device=DEVICE, requires_grad=True)
    gradients = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
        torch.manual_seed(1)
        gradients.append(torch.autograd.grad(run(x).square().sum(), [x, *model.parameters()]))
    for a, b in zip(*gradients, strict=True):
        assert same_bits(a, b)


@pytest.mark.kernels
@pytest.mark.parametrize("inplace", [False, True])
def test_fullgraph_compile(inplace):
    torch.compiler.reset()
    module = fastattn.nn.Dropout(0.5, inplace=inplace)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    leaf = torch.randn(9, 40, device=DEVICE, requires_grad=True)
    y = compiled(leaf * 1.0)
    (gradient,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
    assert torch.equal(gradient * leaf.detach(), y)
    assert 0 < y.count_nonzero() < y.numel()


@pytest.mark.kernels
def test_autocast_keeps_the_dtype_of_the_input():
    with torch.autocast(str(DEVICE), dtype=torch.bfloat16):
        y = fastattn.nn.Dropout(0.5)(torch.ones(4, 16, device=DEVICE))
    assert y.dtype is torch.float32
