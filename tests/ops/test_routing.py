"""Routers as the models have them, written out; their losses; what is refused."""

import pytest
import torch

import fastattn

GENERATOR = torch.Generator().manual_seed(3)
LOGITS = torch.randn(2, 7, 8, generator=GENERATOR, dtype=torch.float64)


def test_mixtral_and_qwen():
    probabilities = LOGITS.softmax(-1)
    top, chosen = probabilities.topk(2, dim=-1)
    weights, ids = fastattn.route_top_k(LOGITS, 2)
    assert torch.equal(ids, chosen)
    torch.testing.assert_close(weights, top / top.sum(-1, keepdim=True))
    plain, _ = fastattn.route_top_k(LOGITS, 2, normalize=False)
    torch.testing.assert_close(plain, top)


def test_gpt_oss():
    top, chosen = LOGITS.topk(3, dim=-1)
    weights, ids = fastattn.route_top_k(LOGITS, 3, score="softmax_top_k")
    assert torch.equal(ids, chosen)
    torch.testing.assert_close(weights, top.softmax(-1))


def test_deepseek():
    bias = torch.linspace(-0.3, 0.3, 8, dtype=torch.float64)
    scores = LOGITS.sigmoid()
    expected = torch.zeros(2, 7, 8, dtype=torch.float64)
    for row in range(14):
        own = scores.view(14, 8)[row]
        corrected = (own + bias).tolist()
        groups = sorted(
            range(4), key=lambda g: -sum(sorted(corrected[2 * g : 2 * g + 2], reverse=True))
        )[:2]
        allowed = [2 * g + i for g in groups for i in range(2)]
        best = sorted(allowed, key=lambda e: -corrected[e])[:3]
        total = sum(own[e] for e in best)
        for e in best:
            expected.view(14, 8)[row, e] = 2.5 * own[e] / total
    options = {"score": "sigmoid", "bias": bias, "groups": 4, "top_groups": 2, "scale": 2.5}
    weights, ids = fastattn.route_top_k(LOGITS, 3, **options)
    found = torch.zeros_like(expected).scatter(-1, ids, weights)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "softmax_top_k"])
def test_derivatives(score):
    logits = LOGITS[0, :3].clone().requires_grad_()

    def weights(x):
        return fastattn.route_top_k(x, 2, score=score)[0]

    assert torch.autograd.gradcheck(weights, logits)
    assert torch.autograd.gradgradcheck(weights, logits)


def test_it_computes_in_float32_and_compiles_whole():
    logits = LOGITS.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weights, ids = fastattn.route_top_k(logits, 2)
    assert weights.dtype is torch.float32
    compiled = torch.compile(fastattn.route_top_k, fullgraph=True, backend="aot_eager")
    again, ids_again = compiled(logits, 2)
    assert torch.equal(weights, again)
    assert torch.equal(ids, ids_again)


def test_losses_are_those_of_all_layers_together():
    layers = [LOGITS, LOGITS.flip(-1) * 2]
    mask = torch.rand(2, 7, generator=torch.Generator().manual_seed(5)) > 0.3
    ids = [fastattn.route_top_k(layer, 2)[1] for layer in layers]
    kept = torch.cat([layer[mask] for layer in layers])
    chosen = torch.cat([i[mask] for i in ids])
    share = torch.nn.functional.one_hot(chosen, 8).double().mean(0).sum(0)
    expected = 8 * (share * kept.softmax(-1).mean(0)).sum()
    torch.testing.assert_close(fastattn.load_balancing_loss(layers, ids, 8, mask), expected)
    expected = kept.logsumexp(-1).square().mean()
    torch.testing.assert_close(fastattn.router_z_loss(layers, mask), expected)


def test_even_use_costs_as_much_as_there_are_experts_of_a_token():
    ids = torch.arange(8).view(4, 2)
    loss = fastattn.load_balancing_loss(torch.zeros(4, 8), ids, 8)
    torch.testing.assert_close(loss, torch.tensor(2.0))
    # A sentinel is no expert's.
    loss = fastattn.load_balancing_loss(torch.zeros(4, 8), ids.where(ids > 0, 8), 8)
    torch.testing.assert_close(loss, torch.tensor(1.75))


def test_bad_inputs_are_named():
    route = fastattn.route_top_k
    with pytest.raises(TypeError, match="route_top_k: logits"):
        route(torch.ones(2, 3, dtype=torch.int64), 1)
    for k in (0, 9):
        with pytest.raises(ValueError, match=r"route_top_k: k must be in \[1, 8\]"):
            route(LOGITS, k)
    with pytest.raises(TypeError, match="route_top_k: k must be an integer"):
        route(LOGITS, 2.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="route_top_k: score must be one of"):
        route(LOGITS, 2, score="tanh")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"route_top_k: bias must have shape \(8,\)"):
        route(LOGITS, 2, bias=torch.ones(7, dtype=torch.float64))
    with pytest.raises(ValueError, match="route_top_k: groups must divide"):
        route(LOGITS, 2, groups=3)
    with pytest.raises(ValueError, match="route_top_k: top_groups"):
        route(LOGITS, 2, top_groups=1)
    with pytest.raises(ValueError, match="route_top_k: k must be at most the 2 experts"):
        route(LOGITS, 3, groups=4, top_groups=1)
    with pytest.raises(ValueError, match="load_balancing_loss: ids must be of 1 layers"):
        fastattn.load_balancing_loss(LOGITS, [], 8)
    with pytest.raises(ValueError, match="router_z_loss: mask must have shape"):
        fastattn.router_z_loss(LOGITS, torch.ones(2))
