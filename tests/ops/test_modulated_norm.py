"""Modulated norms: what diffusion transformers compute, slices in place, and bad inputs."""

import pytest
import torch
import torch.nn.functional as F

import fastattn
from support import DEVICE, WIDEST, assert_close, count_launches


@pytest.mark.kernels
def test_they_are_what_diffusion_transformers_compute():
    x = torch.randn(3, 21, 48, dtype=WIDEST, device=DEVICE, requires_grad=True)
    condition = torch.randn(3, 6 * 48, dtype=WIDEST, device=DEVICE, requires_grad=True)
    shift, scale, *_ = condition.chunk(6, dim=1)
    for ours, norm in (
        (fastattn.modulated_layer_norm, F.layer_norm),
        (fastattn.modulated_rms_norm, F.rms_norm),
    ):
        y = ours(x, shift, scale)
        expected = norm(x, (48,), eps=1e-6) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)
        incoming = torch.linspace(-1.0, 2.0, y.numel(), dtype=WIDEST, device=DEVICE).view(y.shape)
        found = torch.autograd.grad(y, [x, condition], incoming, retain_graph=True)
        theirs = torch.autograd.grad(expected, [x, condition], incoming, retain_graph=True)
        assert_close(y, expected, "y")
        for name, a, b in zip(("dx", "dcondition"), found, theirs, strict=True):
            assert_close(a, b, name)


@pytest.mark.kernels
@pytest.mark.parametrize("function", [fastattn.modulated_layer_norm, fastattn.modulated_rms_norm])
def test_one_launch_each_way_without_a_copy(function):
    x = torch.randn(2, 40, 64, device=DEVICE, requires_grad=True)
    condition = torch.randn(2, 128, device=DEVICE)
    shift, scale = condition.chunk(2, dim=1)
    with count_launches() as launched:
        y = function(x, shift[:, None], scale[:, None])
        y.sum().backward()
    assert launched == ["modulated_norm_forward_kernel", "modulated_norm_backward_kernel"]


@pytest.mark.kernels
def test_samples_are_sums_of_their_own_in_many_programs():
    """More tiles than a sample has programs, of more samples than there are programs."""
    for samples, tokens in ((1, 700), (40, 3)):
        x = torch.randn(samples, tokens, 33, dtype=WIDEST, device=DEVICE)
        shift, scale = (
            torch.randn(samples, 33, dtype=WIDEST, device=DEVICE, requires_grad=True)
            for _ in range(2)
        )
        y = fastattn.modulated_layer_norm(x, shift, scale)
        dshift, dscale = torch.autograd.grad(y, [shift, scale], torch.ones_like(y))
        assert_close(dshift, torch.full_like(dshift, tokens), "dshift")
        assert_close(dscale, F.layer_norm(x, (33,), eps=1e-6).sum(1), "dscale")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": torch.ones(8)}, ValueError, r"x must be \(B, ..., cols\)"),
        ({"shift": torch.ones(3, 8)}, ValueError, r"shift must be \(2, 8\), or with ones between"),
        ({"scale": torch.ones(2, 4, 8)}, ValueError, r"scale must be \(2, 8\), or with ones"),
        ({"scale": torch.ones(8)}, ValueError, r"scale must be \(2, 8\), or with ones"),
        ({"scale": torch.ones(2, 8).long()}, TypeError, "modulated_layer_norm: scale"),
        ({"eps": -1.0}, ValueError, "eps must be non-negative"),
    ],
)
def test_bad_inputs(arguments, error, message):
    given = {"x": torch.ones(2, 4, 8), "shift": torch.ones(2, 8), "scale": torch.ones(2, 8)}
    with pytest.raises(error, match=message):
        fastattn.modulated_layer_norm(**{**given, **arguments})
