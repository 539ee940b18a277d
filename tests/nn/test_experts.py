"""Mixtures of experts as modules: beside what they are made of, in blocks, and their parts."""

from functools import partial
from typing import Any

import pytest
import torch

import fastattn
import fastattn.nn as nn
from support import DEVICE, WIDEST, assert_close, count_launches

BACKENDS = ["reference", pytest.param("triton", marks=pytest.mark.kernels)]
H, E, K, INSIDE = 8, 4, 2, 6


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=WIDEST, device=DEVICE or "cpu")


def placed(module: Any) -> Any:
    return module.to(DEVICE or "cpu", WIDEST)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shared_gate", [False, True])
def test_a_layer_is_the_sum_of_its_parts(backend, shared_gate):
    router, experts = nn.TopKRouter(H, E, K), nn.Experts(E, H, INSIDE)
    layer = placed(nn.MixtureOfExperts(router, experts, nn.GatedMLP(H, 5), shared_gate))
    x = random(2, 5, H)
    with fastattn.backend(backend):
        found = layer(x)
    probabilities, ids = (x @ router.weight.t()).softmax(-1).topk(K)
    weights = probabilities / probabilities.sum(-1, keepdim=True)
    expected = torch.zeros_like(x)
    for token in range(10):
        for weight, expert in zip(weights.view(10, K)[token], ids.view(10, K)[token], strict=True):
            gate, up = (experts.gate_up_proj[expert] @ x.view(10, H)[token]).chunk(2)
            y = experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)
            expected.view(10, H)[token] += weight * y
    shared = layer.shared_experts(x)
    if shared_gate:
        shared = (x @ layer.shared_expert_gate.weight.t()).sigmoid() * shared
    assert_close(found.detach(), (expected + shared).detach())


@pytest.mark.kernels
def test_it_is_the_feed_forward_layer_of_a_block():
    experts = nn.MixtureOfExperts(nn.TopKRouter(H, E, K), nn.Experts(E, H, INSIDE, recompute=True))
    block = placed(nn.TransformerBlock(nn.Attention(H, 2), experts, partial(nn.RMSNorm, H)))
    x = random(2, 5, H).requires_grad_()
    results = []
    for backend in ("triton", "reference"):
        with fastattn.backend(backend), count_launches() as launches:
            y = block(x)
            gradients = torch.autograd.grad(y.square().sum(), [x, *block.parameters()])
        assert ("experts_forward_kernel" in launches) == (backend == "triton")
        results.append([y, *gradients])
    for found, expected in zip(*results, strict=True):
        assert_close(found, expected)


def test_the_names_of_parameters_are_hugging_faces():
    router = nn.TopKRouter(H, E, K, bias=True, correction=True)
    experts = nn.Experts(E, H, INSIDE, bias=True, transposed=True)
    layer = nn.MixtureOfExperts(router, experts, nn.GatedMLP(H, 5), shared_gate=True)
    shapes = {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
    assert shapes == {
        "gate.weight": (E, H),
        "gate.bias": (E,),
        "gate.e_score_correction_bias": (E,),
        "experts.gate_up_proj": (E, H, 2 * INSIDE),
        "experts.gate_up_proj_bias": (E, 2 * INSIDE),
        "experts.down_proj": (E, INSIDE, H),
        "experts.down_proj_bias": (E, H),
        "shared_experts.gate_proj.weight": (5, H),
        "shared_experts.up_proj.weight": (5, H),
        "shared_experts.down_proj.weight": (H, 5),
        "shared_expert_gate.weight": (1, H),
    }
    assert not layer.gate.e_score_correction_bias.any()


def test_a_wide_router_multiplies_in_float32_under_autocast():
    router = nn.TopKRouter(H, E, K, wide=True)
    x = torch.randn(5, H)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weights, ids, logits = router(x)
    assert logits.dtype is weights.dtype is torch.float32
    assert torch.equal(logits, x @ router.weight.t())
    assert ids.shape == (5, K)


def test_a_shared_gate_needs_shared_experts():
    with pytest.raises(ValueError, match="shared_gate is of shared experts"):
        nn.MixtureOfExperts(nn.TopKRouter(H, E, K), nn.Experts(E, H, INSIDE), shared_gate=True)
    with pytest.raises(ValueError, match="TopKRouter: score must be one of"):
        nn.TopKRouter(H, E, K, score="tanh")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Experts: activation must be one of"):
        nn.Experts(E, H, INSIDE, activation="tanh")  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", [False, True])
def test_plain_experts_are_the_layers_that_they_are_made_of(backend, bias):
    experts = placed(nn.PlainExperts(E, H, INSIDE, activation="gelu", bias=bias))
    x, weights = random(2, 5, H).requires_grad_(), random(2, 5, K).requires_grad_()
    # The last pair has no expert.
    ids = torch.arange(20, device=x.device).remainder(E).view(2, 5, K)
    ids[1, 4, 1] = E
    dy = random(2, 5, H)
    given = [x, weights, *experts.parameters()]
    with fastattn.backend(backend), count_launches() as launches:
        y = experts(x, ids, weights)
        found = torch.autograd.grad(y, given, dy)
    assert ("grouped_linear_kernel" in launches) == (backend == "triton")
    expected = torch.zeros_like(x)
    for expert in range(E):
        up_bias = experts.up_proj_bias[expert] if bias else None
        down_bias = experts.down_proj_bias[expert] if bias else None
        inside = torch.nn.functional.linear(x, experts.up_proj[expert], up_bias)
        inside = torch.nn.functional.gelu(inside)
        own = torch.nn.functional.linear(inside, experts.down_proj[expert], down_bias)
        expected = expected + own * torch.where(ids == expert, weights, 0.0).sum(-1, keepdim=True)
    assert_close(y, expected)
    for gradient, right in zip(found, torch.autograd.grad(expected, given, dy), strict=True):
        assert_close(gradient, right)


def test_plain_experts_drop_out_between_their_products():
    experts = placed(nn.PlainExperts(2, H, INSIDE, dropout=0.999999))
    x, ids, weights = random(4, H), torch.zeros(4, 1, dtype=torch.int64), random(4, 1)
    assert experts(x, ids.to(x.device), weights).count_nonzero() == 0
    assert experts.eval()(x, ids.to(x.device), weights).count_nonzero() > 0
