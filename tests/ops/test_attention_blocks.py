"""Which blocks attention computes, and in which of them it asks masks.

Terms of the test's own note the blocks: in the interpreter a kernel may call Python.
"""

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from attention_support import qkv

import fastattn
from fastattn.kernels.attention.config import INTERPRETED as CONFIGS
from fastattn.kernels.attention.scores import pass_gradient
from fastattn.ops.core.backends import INTERPRETED
from fastattn.terms import MaskFunctions, MaskTerm, ScoreFunctions, ScoreTerm

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(not INTERPRETED, reason="calls Python inside a kernel"),
]

Blocks = set[tuple[int, int]]
COMPUTED: dict[str, Blocks] = {}
MASKED: dict[str, Blocks] = {}


def note(record: dict[str, Blocks], kernel: str, place: Any) -> None:
    record.setdefault(kernel, set()).add((int(place[4]), int(place[5])))


@triton.jit
def noted_score(score, m, n, place, args):
    # The tile of the gradients of keys is the transpose of the others.
    if m.shape[0] > 1:
        note(COMPUTED, "queries", place)
    else:
        note(COMPUTED, "keys", place)
    return score


@triton.jit
def noted_keep(m, n, place, args):
    if m.shape[0] > 1:
        note(MASKED, "queries", place)
    else:
        note(MASKED, "keys", place)
    return tl.zeros_like(n) == 0


@triton.jit
def all_keys(first, last, place, args):
    return 0, place[3], 0, place[3]


@triton.jit
def all_queries(first, last, place, args):
    return 0, place[2], 0, place[2]


class Noted(ScoreTerm):
    """Notes the blocks that are computed."""

    @classmethod
    def triton_functions(cls) -> Any:
        return ScoreFunctions(noted_score, pass_gradient)


class NotedMask(MaskTerm):
    """Hides nothing, and notes the blocks in which masks are asked."""

    @classmethod
    def triton_functions(cls) -> Any:
        return MaskFunctions(noted_keep, all_keys, all_queries)


def noted(tensors: list[torch.Tensor], **options: Any) -> list[dict[str, Blocks]]:
    """The blocks computed and those masked, by the forward, then by the backward."""
    records = []

    def take() -> None:
        for record in (COMPUTED, MASKED):
            records.append(dict(record))
            record.clear()

    o = fastattn.attention(*tensors, score_mods=[Noted(), NotedMask()], **options)
    take()
    torch.autograd.grad(o.sum(), tensors)
    take()
    return records


def blocks(seen: torch.Tensor, kernel: str) -> tuple[Blocks, Blocks]:
    """A kernel's blocks that hold something of `seen` (M, N), and those that hold nothing else."""
    some, full = set(), set()
    rows, columns = CONFIGS[kernel].block_m, CONFIGS[kernel].block_n
    for first_m in range(0, seen.shape[0], rows):
        for first_n in range(0, seen.shape[1], columns):
            block = seen[first_m : first_m + rows, first_n : first_n + columns]
            if block.any():
                some.add((first_m, first_n))
            # A sequence's last block is masked where it holds keys beyond the last one.
            if block.all() and first_n + columns <= seen.shape[1]:
                full.add((first_m, first_n))
    return some, full


@pytest.mark.parametrize(
    ("options", "queries", "keys"),
    [
        ({}, 100, 100),
        ({"causal": True}, 100, 100),
        ({"causal": True}, 40, 120),
        ({"causal": True}, 120, 40),
        ({"causal": True, "window": (30, None)}, 120, 120),
        ({"window": (10, 70)}, 120, 120),
        ({"window": (None, 0)}, 100, 100),
        ({"kv_lengths": 75}, 40, 120),
        ({"kv_lengths": 0}, 40, 120),
    ],
    ids=str,
)
def test_blocks_that_nobody_sees_are_skipped_and_full_ones_are_not_masked(options, queries, keys):
    if "kv_lengths" in options:
        options = {"kv_lengths": torch.tensor([options["kv_lengths"]])}
    at = torch.arange(queries)[:, None] + keys - queries
    n = torch.arange(keys)
    seen = torch.ones(queries, keys, dtype=torch.bool)
    left, right = options.get("window", (None, None))
    if left is not None:
        seen &= n >= at - left
    if right is not None:
        seen &= n <= at + right
    if options.get("causal"):
        seen &= n <= at
    if "kv_lengths" in options:
        seen &= n < options["kv_lengths"]

    tensors = qkv(1, 1, queries, keys, dim=8)
    forward, forward_masks, backward, backward_masks = noted(tensors, **options)
    for kernel, computed, masks in (
        ("attention_forward", forward, forward_masks),
        ("attention_queries_backward", backward, backward_masks),
    ):
        some, full = blocks(seen, kernel)
        assert computed.get("queries", set()) == some
        assert masks.get("queries", set()) == some - full
    some, full = blocks(seen, "attention_keys_backward")
    assert backward.get("keys", set()) == some
    # The gradients of keys have no loop without masks where a window hides first keys.
    masked = backward_masks.get("keys", set())
    if left is not None:
        assert masked == some
    else:
        assert masked <= some - full
