"""Print what attention's kernels compile to for sm_90, as JSON.

Run in a process of its own: Triton keeps compiled kernels by device, and the stub is one.
"""

import json
from typing import Any

import torch
import triton
import triton.language as tl

import fastattn
from bench.compiled.machine_code import inspect
from fastattn.kernels.attention import terms
from fastattn.kernels.attention.composition import compose, join_arguments
from fastattn.machine.driver import TARGETS, Recorder, stub_driver
from fastattn.ops.core.backends import assume_gpu, backend
from fastattn.terms import Place

BLOCK = 64

# Jitted functions have no types that would fit their calls.
scores: Any = terms


@triton.jit
def by_terms_kernel(
    score_ptr,
    out_ptr,
    terms_args,
    TERMS: tl.constexpr,
):
    """A causal, capped tile with its gradient, as attention's kernels compose it."""
    offs = tl.arange(0, 64)
    m, n = offs[:, None], offs[None, :]
    place = Place(0, 0, 64, 64, 0, 0)
    args = scores.part_arguments(terms_args, TERMS)
    given_score = tl.load(score_ptr + m * 64 + n)
    score, given = scores.apply_scores(given_score, m, n, place, args.scores, TERMS)
    keep = scores.apply_masks(n < 64, m, n, place, args.masks, TERMS)
    dscore, _ = scores.apply_scores_backward(score, given, m, n, place, args.scores, TERMS)
    tl.store(out_ptr + m * 64 + n, tl.where(keep, dscore, 0.0))


@triton.jit
def by_hand_kernel(score_ptr, out_ptr, cap, CAUSAL: tl.constexpr, CAPPED: tl.constexpr):
    """The same with flags."""
    offs = tl.arange(0, 64)
    m, n = offs[:, None], offs[None, :]
    x = tl.load(score_ptr + m * 64 + n)
    score = x
    if CAPPED:
        ratio = x * (1.0 / cap)
        e = tl.exp2(ratio * (2.0 * scores.LOG2E))
        square = ratio * ratio
        series = square * (square * (square * (-17.0 / 315.0) + 2.0 / 15.0) - 1.0 / 3.0)
        score = tl.where(square < 0.0625, x + x * series, cap - 2.0 * cap / (e + 1.0))
    keep = n < 64
    if CAUSAL:
        keep = keep & (n <= m)
    if CAPPED:
        e = tl.exp2(tl.abs(x) * (-2.0 * scores.LOG2E / cap))
        score = score * (4.0 * e / ((1.0 + e) * (1.0 + e)))
    tl.store(out_ptr + m * 64 + n, tl.where(keep, score, 0.0))


def composition(recorder: Recorder) -> dict[str, int]:
    """Instructions of a tile by terms and by hand."""
    x = torch.empty(BLOCK, BLOCK)
    composed = compose("softcap:0:1:0;causal:0:0:0")
    by_terms: Any = by_terms_kernel
    by_hand: Any = by_hand_kernel
    by_terms[(1,)](x, x, join_arguments((), (30.0,), ()), composed.terms)
    by_hand[(1,)](x, x, 30.0, True, True)
    return {kernel.name: inspect(kernel).instructions for kernel in recorder.take()}


def forward(recorder: Recorder, **options: Any) -> dict[str, Any]:
    """The machine code of the forward at D = 128 in bfloat16."""
    q, k, v = (torch.empty(2, 8, 1024, 128, dtype=torch.bfloat16) for _ in "qkv")
    fastattn.attention(q, k, v, **options)
    (kernel,) = recorder.take()
    code = inspect(kernel)
    return {
        "hopper_products": kernel.files["ptx"].read_text().count("wgmma.mma_async"),
        "async_copies": code.async_copies,
        "spill_bytes": code.spill_bytes,
        "loops": [loop.instructions for loop in code.loops],
    }


def main() -> None:
    recorder = Recorder()
    with stub_driver(TARGETS["sm_90"], recorder), assume_gpu(), backend("triton"):
        report = {
            "composition": composition(recorder),
            "full": forward(recorder),
            "causal": forward(recorder, causal=True),
            "window": forward(recorder, causal=True, window=256),
        }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
