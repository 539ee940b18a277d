"""fastattn.nn.CrossEntropyLoss in the place of torch's own."""

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
