"""What rounding does to attention: where its gradients lose digits in 16 bits, and its softcap."""

import math
from collections.abc import Callable

import pytest
import torch
from attention_support import qkv, results

import fastattn
from fastattn.checking import ROUNDING, Change, compare_results, measure_reference
from support import DEVICE, same_bits

pytestmark = pytest.mark.kernels

DTYPES = (torch.float16, torch.bfloat16)


def dq_from(
    o: torch.Tensor, inputs: list[torch.Tensor], do: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """dq of causal attention in float64, but for delta, which comes from this o, and for dscore,
    which is rounded to `dtype` as tensor cores take it."""
    q, k, v = inputs
    scale = q.shape[-1] ** -0.5
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    weights = (q @ k.mT * scale).masked_fill(~seen, -math.inf).softmax(-1)
    dscore = weights * (do @ v.mT - (do * o).sum(-1, keepdim=True))
    return dscore.to(dtype).double() @ k * scale


def error(found: torch.Tensor, expected: torch.Tensor, truth: torch.Tensor) -> float:
    """The norm of a difference, relative to the true gradient's."""
    return ((found.double() - expected).norm() / truth.norm()).item()


@pytest.mark.parametrize(("dtype", "stated"), [(torch.float16, 2e-2), (torch.bfloat16, 1.7e-1)])
def test_a_common_mean_of_keys_and_values_shows_the_rounding_of_o_in_dq(dtype, stated):
    """Both means are 5. What is stated in attention's docstring, and where it comes from.

    It is what FlashAttention's delta = sum(do o) gives: o as it was rounded explains nearly all of
    the error, and with the exact o it would be a tenth or less.
    """
    given = [torch.randn(1, 2, 64, 32, device=DEVICE) for _ in range(4)]
    for moved in given[1:3]:
        moved += 5.0
    q, k, v, do = (x.to(dtype) for x in given)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    o = fastattn.attention(*leaves, causal=True)
    (dq,) = torch.autograd.grad(o, leaves[:1], do)

    exact = [x.double().requires_grad_() for x in (q, k, v)]
    with fastattn.backend("reference"):
        exact_o = fastattn.attention(*exact, causal=True)
    (truth,) = torch.autograd.grad(exact_o, exact[:1], do.double())
    numbers = [x.detach() for x in exact]
    by_rounded_o = dq_from(o.detach().double(), numbers, do.double(), dtype)
    by_exact_o = dq_from(exact_o.detach(), numbers, do.double(), dtype)

    whole = error(dq, truth, truth)
    assert stated / 1.5 < whole < stated * 1.5
    assert error(dq, by_rounded_o, truth) < 0.2 * whole
    assert error(by_exact_o, truth, truth) < 0.1 * whole


QUERIES, KEYS = 130, 31


def minus_distances(slopes: torch.Tensor) -> torch.Tensor:
    """What ALiBi adds to the scores (H, QUERIES, KEYS)."""
    places = torch.arange(KEYS - QUERIES, KEYS, device=DEVICE)
    return -slopes[:, None, None] * (places[:, None] - torch.arange(KEYS, device=DEVICE)).abs()


def by_distance(table: torch.Tensor) -> torch.Tensor:
    """What a relative bias adds to the scores (1, H, QUERIES, KEYS)."""
    m, n = (torch.arange(size, device=DEVICE) for size in (QUERIES, KEYS))
    nothing = table.new_zeros(QUERIES, KEYS)
    return fastattn.RelativeBias(table).score(nothing, m[:, None], n, QUERIES, KEYS)


ADDED: dict[str, tuple[Callable[[], torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]] = {
    "alibi_slopes": (lambda: fastattn.alibi_slopes(4).to(DEVICE), minus_distances),
    "relative_bias": (lambda: torch.randn(32, 4, device=DEVICE), by_distance),
    "bias": (lambda: torch.randn(4, 1, KEYS, device=DEVICE), lambda bias: bias),
}
"""What is learned and added to the scores: how it is made, in float32, and what it adds."""


def learned_gradient_from(
    o: torch.Tensor, inputs: list[torch.Tensor], do: torch.Tensor, name: str, value: torch.Tensor
) -> torch.Tensor:
    """The gradient of what is learned, in float64, but for delta, which comes from this o."""
    q, k, v = inputs
    value = value.detach().double().requires_grad_()
    added = ADDED[name][1](value)
    weights = (q @ k.mT * q.shape[-1] ** -0.5 + added).softmax(-1)
    dscore = weights * (do @ v.mT - (do * o).sum(-1, keepdim=True))
    (gradient,) = torch.autograd.grad(added.expand_as(dscore), value, dscore.detach())
    return gradient


@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES])
@pytest.mark.parametrize("name", ADDED)
def test_the_gradient_of_what_is_added_to_scores_lacks_the_rounding_of_o_alone(name, dtype):
    """What attention's docstring states of learned slopes, where queries outnumber keys.

    How much delta's error adds up to is the inputs' luck, and more than the rule allows. Without it
    the gradient keeps the rule; in float32 it does as it is.
    """
    inputs = [x.to(dtype) for x in qkv(1, 4, QUERIES, KEYS, dtype=torch.float32)]
    do = torch.randn(1, 4, QUERIES, 16, device=DEVICE).to(dtype)
    value = ADDED[name][0]().requires_grad_()

    def run(change: Change) -> dict[str, torch.Tensor]:
        given, leaf = [change(x) for x in inputs], change(value)
        term = fastattn.RelativeBias(leaf) if name == "relative_bias" else leaf
        o = fastattn.attention(*given, **{name: term})
        (gradient,) = torch.autograd.grad(o, leaf, do.to(o))
        return {"o": o.detach(), "dlearned": gradient}

    found = run(Change())
    with fastattn.backend("reference"):
        measured = measure_reference(run)
    truth = measured[0].truth
    numbers = [x.detach().double() for x in inputs]
    by_exact_o = learned_gradient_from(truth["o"], numbers, do.double(), name, value)
    assert error(by_exact_o, truth["dlearned"], by_exact_o) < 1e-12

    gradient = found["dlearned"]
    if dtype is not torch.float32:
        by_rounded_o = learned_gradient_from(found["o"].double(), numbers, do.double(), name, value)
        whole = error(gradient, by_exact_o, by_exact_o)
        assert error(gradient, by_rounded_o, by_exact_o) < 0.02 * whole
        gradient = (gradient - (by_rounded_o - by_exact_o)).to(gradient.dtype)
    for comparison in compare_results({"dlearned": gradient}, measured):
        assert comparison.passed, comparison


CAPS = (0.5, 5.0, 50.0, 1e4, 1e6, 1e8, 1e20, 1e30, 3e38)


@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES])
@pytest.mark.parametrize("cap", CAPS)
def test_a_softcap_of_any_size_loses_no_digits(cap, dtype):
    inputs = [x.to(dtype).detach().requires_grad_() for x in qkv(1, 2, 40, dim=16)]
    options = {"softcap": cap, "return_lse": True}
    found = results(fastattn.attention, inputs, **options)

    @fastattn.backend("reference")
    def run(change: Change) -> dict[str, torch.Tensor]:
        return results(fastattn.attention, [change(x) for x in inputs], **options)

    for comparison in compare_results(found, measure_reference(run)):
        assert comparison.passed, comparison


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *DTYPES])
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_infinity_is_no_softcap_of_attention(backend, dtype):
    inputs = [x.to(dtype).detach().requires_grad_() for x in qkv(1, 2, 40, dim=16)]
    if DEVICE == "cuda" and dtype is torch.float64:
        backend = "reference"
    with fastattn.backend(backend):
        found = results(fastattn.attention, inputs, softcap=math.inf, return_lse=True)
        expected = results(fastattn.attention, inputs, return_lse=True)
    for name, value in expected.items():
        assert same_bits(found[name], value), name


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("cap", [math.inf, 1e300])
def test_infinity_is_no_softcap_of_losses(cap, backend):
    """Nor is what is infinite in float32."""
    logits, target = torch.randn(9, 12, device=DEVICE), torch.arange(9, device=DEVICE)
    weight = torch.randn(12, 12, device=DEVICE)
    with fastattn.backend(backend):
        for options in ({}, {"label_smoothing": 0.1, "z_loss": 0.01}):
            for loss in (
                lambda **more: fastattn.cross_entropy(logits, target, **more),
                lambda **more: fastattn.linear_cross_entropy(logits, weight, target, **more),
                lambda **more: fastattn.linear_cross_entropy(
                    logits, weight, target, chunk_rows=4, **more
                ),
            ):
                assert same_bits(loss(softcap=cap, **options), loss(**options))


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES])
def test_a_gradient_that_cancels_leaves_the_rounding_of_what_cancels(dtype, dropout_p):
    """Queries that see one key: their gradient is zero, and do . v is subtracted from do . o."""
    q, do = (torch.randn(1, 2, 16, 32, device=DEVICE).to(dtype) for _ in range(2))
    k, v = (torch.randn(1, 2, 1, 32, device=DEVICE).to(dtype) for _ in range(2))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o = fastattn.attention(*leaves, dropout_p=dropout_p, scale=1.0)
    dq, dk = torch.autograd.grad(o, leaves[:2], do)
    cancelled = (do.double() * o.double()).abs().sum(-1, keepdim=True)
    unit = ROUNDING[dtype] if dropout_p and dtype is not torch.float32 else 2.0**-20
    # The gradient of a score, times what it is a gradient for, and rounded once itself.
    allowed = 1.01 * unit * cancelled
    of_keys = (allowed * q.double().abs()).sum(-2, keepdim=True)
    assert (dq.double().abs() <= allowed * k.double().abs() + 2.0**-24).all()
    assert (dk.double().abs() <= of_keys + 2.0**-24).all()
    if dropout_p and dtype in DTYPES:
        assert dq.abs().max() > 0.0
