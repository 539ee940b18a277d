"""fastattn.nn.CrossEntropyLoss and LinearCrossEntropyLoss in the place of torch's own."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import fastattn.nn
from support import DEVICE

DEVICES = ["cpu", pytest.param(DEVICE, marks=pytest.mark.kernels, id="kernels")]

ARGUMENTS: list[dict[str, Any]] = [
    {},
    {"weight": torch.linspace(0.5, 2.0, 6), "ignore_index": 2},
    {"reduction": "sum", "label_smoothing": 0.1},
    {"reduction": "none"},
]


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=lambda arguments: ", ".join(arguments))
def test_constructor_repr_and_state_dict(arguments):
    ours, theirs = fastattn.nn.CrossEntropyLoss(**arguments), nn.CrossEntropyLoss(**arguments)
    assert isinstance(ours, nn.CrossEntropyLoss)
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(copied) is fastattn.nn.CrossEntropyLoss
        assert copied.reduction == ours.reduction


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("arguments", ARGUMENTS, ids=lambda arguments: ", ".join(arguments))
@pytest.mark.parametrize("inner", [(), (5,)], ids=["matrix", "sequence"])
def test_loss_and_gradient_are_torchs(device, arguments, inner):
    logits = torch.randn(3, 6, *inner, device=device, requires_grad=True)
    target = torch.randint(6, (3, *inner), device=device)
    results = []
    for module in (fastattn.nn.CrossEntropyLoss, nn.CrossEntropyLoss):
        loss = module(**arguments).to(device)(logits, target)
        results.append((loss, *torch.autograd.grad(loss.sum(), logits)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


LINEAR_ARGUMENTS: list[dict[str, Any]] = [
    {},
    {"bias": True, "weight": torch.linspace(0.5, 2.0, 6), "ignore_index": 2},
    {"reduction": "sum", "label_smoothing": 0.1},
    {"reduction": "none", "bias": True},
    {"out_features": (3,), "bias": True},
]


def linear_target(arguments: dict[str, Any], device: Any) -> torch.Tensor:
    return torch.randint(6, (5, *arguments.get("out_features", ())), device=device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("arguments", LINEAR_ARGUMENTS, ids=lambda arguments: ", ".join(arguments))
def test_linear_loss_and_gradients_are_those_of_two_modules(device, arguments):
    ours = fastattn.nn.LinearCrossEntropyLoss(4, 6, **arguments).to(device)
    shape = (6, *arguments.get("out_features", ()))
    of_loss = {k: v for k, v in arguments.items() if k not in ("bias", "out_features")}
    theirs = nn.CrossEntropyLoss(**of_loss).to(device)
    x = torch.randn(5, 4, device=device, requires_grad=True)
    target = linear_target(arguments, device)
    parameters = list(ours.parameters())
    losses = (ours(x, target), theirs(ours.linear(x).unflatten(1, shape), target))
    results = [(loss, *torch.autograd.grad(loss.sum(), [x, *parameters])) for loss in losses]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.skipif(not hasattr(nn, "LinearCrossEntropyLoss"), reason="torch has none yet")
@pytest.mark.parametrize("arguments", LINEAR_ARGUMENTS, ids=lambda arguments: ", ".join(arguments))
def test_linear_loss_takes_the_place_of_torchs(arguments):
    ours = fastattn.nn.LinearCrossEntropyLoss(4, 6, **arguments)
    theirs = nn.LinearCrossEntropyLoss(4, 6, **arguments)
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    x, target = torch.randn(5, 4), linear_target(arguments, "cpu")
    torch.testing.assert_close(ours(x, target), theirs(x, target))
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(copied(x, target), ours(x, target))


def test_linear_loss_with_what_is_ours_and_a_tied_weight():
    embedding = fastattn.nn.Embedding(6, 4)
    ours = {"z_loss": 0.1, "logit_scale": 0.5, "softcap": 5.0}
    module = fastattn.nn.LinearCrossEntropyLoss(4, 6, **ours)
    module.linear.weight = embedding.weight
    assert "z_loss=0.1, logit_scale=0.5, softcap=5.0" in repr(module)
    x, target = torch.randn(5, 4), torch.randint(6, (5,))
    expected = fastattn.linear_cross_entropy(x, embedding.weight, target, **ours)
    loss = module(x, target)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert embedding.weight.grad is not None


@pytest.mark.parametrize("bias", [False, True])
def test_linear_log_prob_is_the_op_with_the_layer_of_a_head(bias):
    options: dict[str, Any] = {"temperature": 0.5, "softcap": 3.0, "logit_scale": 0.7}
    options |= {"ignore_index": 2, "return_entropy": True, "return_correct": True}
    module = fastattn.nn.LinearLogProb(4, 6, bias=bias, dtype=torch.float64, **options)
    assert module.state_dict().keys() == {"linear.weight", *(["linear.bias"] if bias else [])}
    x, target = torch.randn(3, 5, 4, dtype=torch.float64), torch.randint(6, (3, 5))
    layer = module.linear
    expected = fastattn.linear_log_prob(x, layer.weight, target, layer.bias, **options)
    for a, b in zip(module(x, target), expected, strict=True):
        assert torch.equal(a, b)
    # A layer with a hook is called.
    seen = []
    layer.register_forward_hook(lambda *_: seen.append(True))
    for a, b in zip(module(x, target), expected, strict=True):
        torch.testing.assert_close(a, b)
    assert seen
    for name, value in options.items():
        assert f"{name}={value}" in repr(module)
