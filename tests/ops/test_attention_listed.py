"""Masks that list their blocks, beside all other masks, where queries and keys differ in number."""

import functools
import itertools
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from attention_support import Options, check, normal, qkv, random_blocks

import fastattn
from fastattn.kernels.attention.lists import find_span
from fastattn.ops.attention import block_terms
from fastattn.ops.attention.block_terms import block_lists
from support import DEVICE

pytestmark = pytest.mark.kernels

BLOCK = 16

LISTS = {
    "documents": ["document_ids"],
    "blocks": ["block_mask"],
    "documents and blocks": ["document_ids", "block_mask"],
}

MASKS: dict[str, Options] = {
    "no other mask": {},
    "causal": {"causal": True},
    "window": {"window": 20},
    "window to the right": {"window": (None, 3)},
    "causal in a window": {"causal": True, "window": 0},
}

LENGTHS = {
    "many more queries": (150, 3),
    "more queries": (70, 40),
    "many more keys": (3, 150),
    "a last block of each": (33, 97),
}

CASES = [
    pytest.param(*case, id=", ".join(case)) for case in itertools.product(LISTS, MASKS, LENGTHS)
]


def ids(batch: int, length: int) -> torch.Tensor:
    """Documents of 21 tokens, of which the first element of the batch has all the same."""
    place = torch.arange(length, device=DEVICE) // 21
    return place * torch.arange(batch, device=DEVICE)[:, None]


def lists(name: str, batch: int, queries: int, keys: int) -> Options:
    """The options that list blocks."""
    made: Options = {
        "document_ids": (ids(batch, queries), ids(batch, keys)),
        "block_mask": random_blocks(batch, 1, queries, keys, (BLOCK, BLOCK)),
    }
    return {option: made[option] for option in LISTS[name]}


@pytest.fixture(autouse=True)
def small_blocks_of_documents(monkeypatch) -> None:
    monkeypatch.setattr(block_terms, "DOCUMENT_BLOCK", BLOCK)


@pytest.mark.parametrize(("listed", "masks", "lengths"), CASES)
def test_every_mask_beside_lists(listed, masks, lengths):
    queries, keys = LENGTHS[lengths]
    options = lists(listed, 2, queries, keys)
    check(qkv(2, 1, queries, keys, 8), **options, **MASKS[masks])


@pytest.mark.parametrize("listed", LISTS)
@pytest.mark.parametrize("masks", MASKS)
def test_every_mask_beside_lists_of_packed_sequences(listed, masks):
    """Few queries of many keys, many of few, some of none, and none of some."""
    queries, keys = [2, 60, 5, 0], [90, 3, 0, 9]
    cumulative = [
        torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=DEVICE)
        for lengths in (queries, keys)
    ]
    packed = [normal(sum(queries), 1, 8), *(normal(sum(keys), 1, 8) for _ in "kv")]

    def attention(*inputs: torch.Tensor, **options: Any) -> Any:
        return fastattn.attention_varlen(*inputs, *cumulative, 60, 90, **options)

    check(packed, attention, **lists(listed, 4, 60, 90), **MASKS[masks])


@pytest.mark.parametrize("listed", LISTS)
def test_key_lengths_beside_lists(listed):
    """Also those that are no lengths: below 0, and beyond all keys."""
    lengths = torch.tensor([-1, -(2**63), 50, 2**63 - 1], device=DEVICE)
    check(qkv(4, 1, 40, 70, 8), kv_lengths=lengths, **lists(listed, 4, 40, 70), causal=True)


@triton.jit
def span_kernel(before_ptr, first_ptr, end_ptr, found_ptr, cols, size, BLOCK: tl.constexpr):
    case = tl.program_id(0)
    first, end = tl.load(first_ptr + case), tl.load(end_ptr + case)
    row = tl.full((), 0, tl.int32)
    start, stop = find_span(before_ptr, first, end, row, cols, size, BLOCK)  # type: ignore
    tl.store(found_ptr + 2 * case, start)
    tl.store(found_ptr + 2 * case + 1, stop)


@pytest.mark.parametrize("size", [16, 64])
def test_a_range_of_a_list_stays_in_the_list(size):
    """Whatever the range: ends before the first key and behind the last one are cut."""
    table = torch.tensor([[[[True, False, True, True, False]]]], device=DEVICE)
    before = block_lists(table)[0].flatten()
    # Numbers beside the list that no list has.
    guarded = torch.full((3000,), 10**6, dtype=torch.int32, device=DEVICE)
    own = guarded[1000 : 1000 + len(before)]
    own.copy_(before)
    tiles = size // BLOCK
    kept = [place for place in range(5 * tiles) if table.flatten()[place // tiles]]
    ends = (-5000, -300, -17, -16, -1, 0, 1, 16, 63, 64, 65, 300, 5 * size, 5000, 2**30)
    cases = list(itertools.product((0, 16, 64, 5 * size - 16, 5 * size, 5000), ends))
    firsts, lasts = (
        torch.tensor(numbers, dtype=torch.int32, device=DEVICE)
        for numbers in zip(*cases, strict=True)
    )
    found = torch.empty((len(cases), 2), dtype=torch.int32, device=DEVICE)
    run = functools.partial(span_kernel[(len(cases),)], BLOCK=BLOCK)
    run(own, firsts, lasts, found, 5, size)
    for (first, end), (start, stop) in zip(cases, found.tolist(), strict=True):
        expected = [place for place in kept if first // BLOCK <= place < -(-end // BLOCK)]
        assert stop >= start, (first, end)
        assert [kept[place] for place in range(start, stop)] == expected, (first, end)
