"""mixture: what it saves, spreads of tokens, ids that are no expert's, and bad inputs."""

import sys
from typing import Any

import pytest
import torch

import fastattn
from fastattn.reference.mixture import order_by_expert
from support import DEVICE, WIDEST, assert_close, gradients_of, same_bits, tensors_of

TOKENS, HIDDEN, INSIDE, EXPERTS, SLOTS = 12, 16, 24, 3, 2


def make(ids: torch.Tensor, dtype: torch.dtype = WIDEST, **options: Any) -> dict[str, Any]:
    """Arguments of a layer for these ids."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        x = 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)
        return x.to(DEVICE or "cpu", dtype).requires_grad_()

    return {
        "x": random(ids.shape[0], HIDDEN),
        "ids": ids.to(DEVICE or "cpu"),
        "weights": random(*ids.shape),
        "w_gate_up": random(EXPERTS, 2 * INSIDE, HIDDEN),
        "w_down": random(EXPERTS, HIDDEN, INSIDE),
        **options,
    }


def by_hand(x, ids, weights, w_gate_up, w_down):
    """Token by token and expert by expert."""
    rows = []
    for token in range(x.shape[0]):
        total = x[token] * 0.0
        for slot in range(ids.shape[1]):
            expert = ids[token, slot]
            if expert < w_down.shape[0]:
                gate, up = (w_gate_up[expert] @ x[token]).chunk(2)
                y = w_down[expert] @ (torch.nn.functional.silu(gate) * up)
                total = total + weights[token, slot] * y
        rows.append(total)
    return torch.stack(rows)


SPREADS = {
    "all to one": torch.ones(TOKENS, SLOTS, dtype=torch.int64),
    "none to the first": torch.arange(TOKENS * SLOTS).view(TOKENS, SLOTS) % 2 + 1,
    "twice in a row": torch.tensor([[0, 0], [2, 2], [1, 0]] * 4),
    "nobody's": torch.tensor([[0, EXPERTS], [EXPERTS, EXPERTS], [2, 1]] * 4),
    "more experts than tokens": torch.tensor([[2, 0]]),
}


@pytest.mark.parametrize("backend", [pytest.param("triton", marks=pytest.mark.kernels), "auto"])
@pytest.mark.parametrize("spread", SPREADS)
def test_every_spread_is_what_experts_make_one_by_one(spread, backend):
    arguments = make(SPREADS[spread])
    with fastattn.backend(backend):
        found = fastattn.mixture(**arguments)
        gradients = gradients_of(fastattn.mixture, arguments)
    assert_close(found, by_hand(**arguments))
    for name, expected in gradients_of(by_hand, arguments).items():
        assert_close(gradients[name], expected, f"d{name}")


@pytest.mark.kernels
@pytest.mark.parametrize("recompute", [False, True])
def test_the_bytes_that_are_saved(recompute):
    ids = torch.arange(TOKENS * SLOTS).view(TOKENS, SLOTS) % EXPERTS
    biases = {
        name: torch.zeros(EXPERTS, size, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
        for name, size in (("b_gate_up", 2 * INSIDE), ("b_down", HIDDEN))
    }
    arguments = make(ids, torch.bfloat16, recompute=recompute, **biases)
    parameters = {t.data_ptr() for name, t in tensors_of(arguments).items() if "_" in name}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = fastattn.mixture(**arguments)
    pairs = TOKENS * SLOTS
    products = 0 if recompute else 4 * pairs * INSIDE
    # 32 bytes a pair, and where experts begin.
    allowed = 2 * TOKENS * HIDDEN + products + 32 * pairs + 4 * (EXPERTS + 1)
    assert 2 * TOKENS * HIDDEN + products < sum(saved.values()) <= allowed
    y.sum().backward()


@pytest.mark.kernels
def test_a_token_has_the_same_bits_among_any_others(products_by_element):
    ids = torch.arange(TOKENS * SLOTS).view(TOKENS, SLOTS) % EXPERTS
    arguments = make(ids, torch.float32)

    def one_token(tokens: torch.Tensor, place: int) -> list[torch.Tensor]:
        """The output of one of some tokens, and its gradients."""
        own = {name: arguments[name][tokens].detach().requires_grad_() for name in ("x", "weights")}
        called = {**arguments, **own, "ids": arguments["ids"][tokens]}
        with fastattn.batch_invariant():
            y = fastattn.mixture(**called)
        dx, dweights = torch.autograd.grad(y[place].sum(), (own["x"], own["weights"]))
        return [y[place], dx[place], dweights[place]]

    every = torch.arange(TOKENS, device=DEVICE)
    expected = one_token(every, 4)
    for tokens, place in ((every[4:5], 0), (every.flip(0), TOKENS - 5), (every[3:9].repeat(4), 7)):
        for found, kept in zip(one_token(tokens, place), expected, strict=True):
            assert same_bits(found, kept)


@pytest.mark.kernels
def test_what_belongs_to_no_expert_is_not_multiplied():
    arguments = make(SPREADS["nobody's"])
    expected = gradients_of(fastattn.mixture, arguments)
    nobody = arguments["ids"] == EXPERTS
    with torch.no_grad():
        arguments["weights"][nobody] = float("inf")
    for name, gradient in gradients_of(fastattn.mixture, arguments).items():
        assert same_bits(gradient, expected[name]), name
    assert not expected["weights"][nobody].any()


@pytest.mark.parametrize("backend", [pytest.param("triton", marks=pytest.mark.kernels), "auto"])
def test_ids_out_of_range_are_nobodys_where_they_are_not_looked_at(backend, monkeypatch):
    """On a GPU, where looking at them would wait: zero rows, and nothing outside is read."""
    ids = torch.tensor([[0, -1], [2**40, 1], [EXPERTS + 1, -(2**62)], [2, 0]])
    arguments = make(ids)
    nobody = (arguments["ids"] < 0) | (arguments["ids"] >= EXPERTS)
    named = {**arguments, "ids": arguments["ids"].masked_fill(nobody, EXPERTS)}
    # The module has its function's name.
    module = sys.modules[fastattn.mixture.__module__]
    monkeypatch.setattr(module, "is_plain", lambda tensors: False)
    with fastattn.backend(backend):
        found = fastattn.mixture(**arguments)
        gradients = gradients_of(fastattn.mixture, arguments)
        expected = fastattn.mixture(**named)
        expected_gradients = gradients_of(fastattn.mixture, named)
    assert same_bits(found, expected)
    assert not found[2].any()
    for name, gradient in expected_gradients.items():
        assert same_bits(gradients[name], gradient), name


def test_the_order_of_rows():
    ids = torch.tensor([[2, 0], [0, 3], [2, 2], [-1, 2**40]])
    order = order_by_expert(ids, 3)
    assert order.offsets.tolist() == [0, 2, 2, 5]
    assert order.slots.tolist() == [1, 2, 0, 4, 5, 3, 6, 7]
    assert order.tokens.tolist() == [0, 1, 0, 2, 2, 1, 3, 3]
    assert order.slots[order.places.flatten().long()].tolist() == list(range(8))
    assert {tensor.dtype for tensor in order} == {torch.int32}


class DTensor(torch.Tensor):
    """What is known by its name."""


def test_distributed_tensors_are_refused_by_name():
    arguments = make(SPREADS["all to one"], torch.float32)
    arguments["w_down"] = arguments["w_down"].detach().as_subclass(DTensor)
    with pytest.raises(TypeError, match="mixture: w_down is a DTensor"):
        fastattn.mixture(**arguments)
    weight = arguments["w_down"]
    with pytest.raises(TypeError, match="grouped_linear: weight is a DTensor"):
        fastattn.grouped_linear(torch.ones(2, INSIDE), weight, torch.tensor([0, 1, 1, 2]))


def test_bad_inputs_are_named():
    arguments = make(SPREADS["all to one"], torch.float32)

    def call(**changed: Any) -> torch.Tensor:
        return fastattn.mixture(**{**arguments, **changed})

    ids, w_gate_up = arguments["ids"], arguments["w_gate_up"]
    with pytest.raises(ValueError, match="mixture: x must have at least two dimensions"):
        call(x=arguments["x"][0])
    with pytest.raises(TypeError, match="mixture: ids must be int32 or int64"):
        call(ids=ids.float())
    with pytest.raises(ValueError, match="mixture: ids must have the shape"):
        call(ids=ids[:3])
    for wrong in (-1, EXPERTS + 1):
        with pytest.raises(ValueError, match=r"mixture: ids must be in \[0, 3\)"):
            call(ids=torch.full_like(ids, wrong))
    with pytest.raises(ValueError, match="mixture: weights must have shape"):
        call(weights=arguments["weights"][:, :1])
    with pytest.raises(ValueError, match=r"mixture: w_gate_up must have the shape \(E, 2 I, 16\)"):
        call(w_gate_up=w_gate_up.mT)
    with pytest.raises(ValueError, match=r"mixture: w_gate_up must have the shape \(E, 2 I, 16\)"):
        call(w_gate_up=w_gate_up[:, 1:])
    with pytest.raises(ValueError, match=r"mixture: w_down must have shape \(3, 16, 24\)"):
        call(w_down=arguments["w_down"].mT)
    with pytest.raises(TypeError, match="mixture: w_down must have x's dtype"):
        call(w_down=arguments["w_down"].half())
    with pytest.raises(ValueError, match=r"mixture: b_down must have shape \(3, 16\)"):
        call(b_down=torch.ones(3, 24, device=ids.device))
    with pytest.raises(ValueError, match="mixture: activation must be one of"):
        call(activation="tanh")
    with pytest.raises(ValueError, match="belong to the activation 'silu'"):
        call(activation="gelu", limit=7.0)
    with pytest.raises(ValueError, match="mixture: limit must be positive"):
        call(limit=0.0)
