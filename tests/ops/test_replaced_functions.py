"""Ours in the place of torch's own functions, where ours must not find themselves."""

import doctest
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

import fastattn
from fastattn.functional import replacing
from support import DEVICE, same_bits

DEVICES = ["cpu", pytest.param(DEVICE, marks=pytest.mark.kernels, id="kernels")]

Q, K, V = torch.randn(3, 2, 3, 8, 16)
X, WEIGHT, TARGET = torch.randn(4, 16), torch.randn(10, 16), torch.arange(4)

Move = Callable[[torch.Tensor], torch.Tensor]
CALLS: dict[str, list[Callable[[Callable[..., torch.Tensor], Move], torch.Tensor]]] = {
    "cross_entropy": [
        lambda f, to: f(to(X), TARGET.to(to(X).device), label_smoothing=0.1),
        lambda f, to: f(to(X), to(X).softmax(-1)),
    ],
    "dropout": [lambda f, to: f(to(X), 0.5, False)],
    "layer_norm": [
        lambda f, to: f(to(X), (16,), to(WEIGHT[0])),
        lambda f, to: f(to(X)[:, :1], (1,)),
        lambda f, to: f(to(X), (16,), WEIGHT[0].to(to(X).device)),
    ],
    "linear": [lambda f, to: f(to(X), to(WEIGHT))],
    "linear_cross_entropy": [
        lambda f, to: f(to(X), to(WEIGHT), TARGET.to(to(X).device)),
        lambda f, to: f(to(X), to(WEIGHT), to(WEIGHT[:4, :10]).softmax(-1)),
    ],
    "log_softmax": [lambda f, to: f(to(X), -1)],
    "rms_norm": [
        lambda f, to: f(to(X), (16,)),
        lambda f, to: f(to(X), (16,), WEIGHT[0].to(to(X).device)),
    ],
    "scaled_dot_product_attention": [
        lambda f, to: f(to(Q), to(K), to(V)),
        lambda f, to: f(to(Q), to(K), to(V), is_causal=True),
        lambda f, to: f(to(Q), to(K), to(V), to(V)[0, 0, :, :8] > 0),
        lambda f, to: f(to(Q).clone().requires_grad_(), to(K), to(V)),
    ],
    "softmax": [lambda f, to: f(to(X), -1)],
}
"""Calls of each of `fastattn.functional`: by torch's own on a CPU, and what ours takes alone."""


def test_every_function_is_tried():
    assert CALLS.keys() == set(fastattn.functional.__all__)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CALLS)
def test_ours_in_torchs_place_give_what_they_give_beside_it(name, dtype, device, monkeypatch):
    ours = {name: getattr(fastattn.functional, name) for name in CALLS}
    before = [call(ours[name], lambda x: x.to(device, dtype)) for call in CALLS[name]]
    for every, function in ours.items():
        monkeypatch.setattr(F, every, function, raising=False)
    after = [call(getattr(F, name), lambda x: x.to(device, dtype)) for call in CALLS[name]]
    for one, other in zip(before, after, strict=True):
        assert same_bits(one, other)


@pytest.mark.parametrize("name", ["Linear", "LayerNorm", "RMSNorm", "CrossEntropyLoss"])
def test_torchs_modules_compute_through_ours(name, monkeypatch):
    calls = []

    def spy(function):
        def call(*args, **kwargs):
            calls.append(name)
            return function(*args, **kwargs)

        return call

    for every in fastattn.functional.__all__:
        monkeypatch.setattr(F, every, spy(getattr(fastattn.functional, every)), raising=False)
    module = getattr(torch.nn, name)(*{"Linear": (16, 3), "CrossEntropyLoss": ()}.get(name, (16,)))
    x = X.clone().requires_grad_()
    (module(x, TARGET) if name == "CrossEntropyLoss" else module(x)).sum().backward()
    assert calls
    assert x.grad is not None


def test_attention_is_replaced_for_good_or_in_a_block():
    torchs = F.scaled_dot_product_attention
    with fastattn.replace_sdpa():
        assert F.scaled_dot_product_attention is fastattn.functional.scaled_dot_product_attention
        with fastattn.replace_sdpa():
            pass
        assert F.scaled_dot_product_attention is fastattn.functional.scaled_dot_product_attention
    assert F.scaled_dot_product_attention is torchs
    undo = fastattn.replace_sdpa()
    try:
        found = F.scaled_dot_product_attention(Q, K, V, is_causal=True)
        attend = torch.compile(
            lambda q: F.scaled_dot_product_attention(q, K, V), backend="aot_eager", fullgraph=True
        )
        torch.testing.assert_close(attend(Q), torchs(Q, K, V))
    finally:
        undo.close()
    assert torch.equal(found, torchs(Q, K, V, is_causal=True))
    assert F.scaled_dot_product_attention is torchs


def test_the_example_runs():
    assert doctest.testmod(replacing).failed == 0
