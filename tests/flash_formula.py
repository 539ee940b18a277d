"""What tests of flash-attn's functions share: attention as one formula, and the accuracy rule."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastattn
from fastattn.checking import Change, Results, compare_results, measure_reference
from support import DEVICE

BACKENDS = ["reference", pytest.param("triton", marks=pytest.mark.kernels)]


def device_of(backend: str) -> str:
    """Where tensors of a test on this backend lie."""
    return "cpu" if backend == "reference" else str(DEVICE)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) as flash-attn's documentation defines them, from (B, S, H, D)."""
    computed = torch.promote_types(q.dtype, torch.float32)
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bmhd,bnhd->bhmn", q.to(computed), k.to(computed))
    scores = scores * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
    if softcap > 0.0:
        scores = softcap * torch.tanh(scores / softcap)
    # From a query's place to the key: the last query stands at the last key.
    place = torch.arange(q.shape[1], device=q.device)[:, None] + k.shape[1] - q.shape[1]
    ahead = torch.arange(k.shape[1], device=q.device) - place
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(computed)[..., None, None] * ahead.abs()
    seen = torch.ones_like(ahead, dtype=torch.bool)
    if causal:
        seen = seen & (ahead <= 0)
    if window_size[0] >= 0:
        seen = seen & (ahead >= -window_size[0])
    if window_size[1] >= 0:
        seen = seen & (ahead <= window_size[1])
    some = seen.any(-1, keepdim=True)
    scores = scores.masked_fill(~seen, -1e30)
    weights = (scores.softmax(-1) * some).to(v.dtype)
    out = torch.einsum("bhmn,bnhd->bmhd", weights, v)
    return out, scores.logsumexp(-1).masked_fill(~some[:, 0], float("-inf"))


def assert_accurate(
    function: Callable[..., Any],
    formula: Callable[..., Any],
    tensors: dict[str, torch.Tensor],
    backend: str,
) -> None:
    """Outputs and gradients of a function are within the accuracy rule of a formula's.

    Args:
        function: takes the tensors by name, and returns one or several.
        formula: the same in plain PyTorch.
        tensors: leaves, of which those that ask for it get a gradient.
        backend: what the function runs on.
    """

    def run(computed: Callable[..., Any], change: Change) -> Results:
        leaves = {name: change(x) for name, x in tensors.items()}
        outputs = computed(**leaves)
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else [*outputs]
        generator = torch.Generator().manual_seed(1)
        incoming = [
            change(torch.randn(x.shape, generator=generator, dtype=torch.float64).to(dtype)).to(x)
            for x in outputs
        ]
        learned = {name: x for name, x in leaves.items() if x.requires_grad}
        gradients = torch.autograd.grad(outputs, list(learned.values()), incoming)
        named = zip((f"d{name}" for name in learned), gradients, strict=True)
        return {f"output {i}": x.detach() for i, x in enumerate(outputs)} | dict(named)

    dtype = next(iter(tensors.values())).dtype
    with fastattn.backend(backend):
        found = run(function, Change())
    measured = measure_reference(lambda change: run(formula, change))
    assert found.keys() == measured[0].truth.keys()
    for comparison in compare_results(found, measured):
        assert comparison.passed, comparison
