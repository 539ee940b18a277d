"""What a mask hides and what dropout drops reaches nothing, be it NaN or infinite."""

from typing import Any

import pytest
import torch

import fastattn
from support import DEVICE

pytestmark = [
    pytest.mark.parametrize(
        "device", ["cpu", pytest.param(DEVICE, marks=pytest.mark.kernels, id="kernels")]
    ),
    pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")]),
]


def results(function: Any, x: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A result, and its gradient with a weight of its own for every element."""
    leaf = x.clone().requires_grad_()
    y = function(leaf, **options)
    weights = torch.linspace(-1.0, 1.0, y.numel(), device=x.device).reshape(y.shape)
    return y.detach(), torch.autograd.grad(y, leaf, weights)[0]


@pytest.mark.parametrize("width", [9, 20_001], ids=["narrow", "wide"])
@pytest.mark.parametrize("causal", [False, True])
def test_softmax_of_hidden_columns(causal, width, bad, device):
    x = torch.randn(2, 6, width, device=device)
    mask = torch.ones(x.shape, dtype=torch.bool, device=device)
    mask[:, :, 4] = False
    mask[1, 2] = False
    seen = mask.tril(width - 6) if causal else mask
    options = {"causal": causal, "mask": mask}
    expected = results(fastattn.softmax, x.masked_fill(~seen, 0.0), **options)
    found = results(fastattn.softmax, x.masked_fill(~seen, bad), **options)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
        assert a.isfinite().all()
        assert a[~seen].abs().max() == 0.0


def test_dropped_elements(bad, device):
    seed = torch.tensor([5], device=device)
    kept = fastattn.dropout_mask(seed, (40, 33), 0.5)
    x = torch.randn(40, 33, device=device)
    found = results(fastattn.dropout, x.masked_fill(~kept, bad), p=0.5, seed=seed)
    expected = results(fastattn.dropout, x, p=0.5, seed=seed)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
        assert a[~kept].abs().max() == 0.0
