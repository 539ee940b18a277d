"""Packed sequences against a loop over them, and against padded ones."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from attention_support import (
    Options,
    Results,
    assert_results_close,
    check,
    normal,
    random_mask,
    results,
    second_derivatives,
)

import fastattn
from support import DEVICE, same_bits

kernels = pytest.mark.kernels


def cumulative(lengths: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()


def packed(
    queries: Sequence[int], keys: Sequence[int], *, more: int = 0
) -> tuple[list[torch.Tensor], Options]:
    """q, k and v of sequences of these lengths and some rows more, and the other arguments."""
    rows, key_rows = sum(queries) + more, sum(keys) + more
    tensors = [normal(rows, 2, 8), normal(key_rows, 1, 8), normal(key_rows, 1, 12)]
    return tensors, {
        "cu_seqlens_q": cumulative(queries),
        "cu_seqlens_k": cumulative(keys),
        "max_seqlen_q": max(queries),
        "max_seqlen_k": max(keys),
    }


def one_by_one(
    queries: Sequence[int],
    keys: Sequence[int],
    each: Sequence[Options],
    *tensors: torch.Tensor,
    **options: Any,
) -> Any:
    """(o, lse) of a loop over the sequences, each with options of its own."""
    outputs = []
    parts = zip(
        tensors[0][: sum(queries)].split(list(queries)),
        *(x[: sum(keys)].split(list(keys)) for x in tensors[1:]),
        each,
        strict=True,
    )
    for *sequence, own in parts:
        q, k, v = (x.transpose(0, 1)[None] for x in sequence)
        o, lse = fastattn.attention(q, k, v, return_lse=True, **options, **own)
        outputs.append((o[0].transpose(0, 1), lse[0]))
    rest = tensors[0].shape[0] - sum(queries)
    o = torch.cat([o for o, _ in outputs])
    lse = torch.cat([lse for _, lse in outputs], 1)
    return (
        torch.cat((o, o.new_zeros(rest, *o.shape[1:]))),
        torch.cat((lse, lse.new_full((lse.shape[0], rest), float("-inf"))), 1),
    )


def compare(
    queries: Sequence[int],
    keys: Sequence[int],
    each: Sequence[Options] | None = None,
    of_all: Options | None = None,
    **options: Any,
) -> None:
    """Packed sequences, with options of each and those of all that mean the same, and a loop."""
    tensors, places = packed(queries, keys, more=3)
    found = results(
        fastattn.attention_varlen, tensors, **places, **options, **(of_all or {}), return_lse=True
    )
    expected = results(
        lambda *x: one_by_one(queries, keys, each or [{}] * len(queries), *x, **options), tensors
    )
    assert_results_close(found, expected)


LENGTHS = {
    "alike": ([20, 7, 1], [20, 7, 1]),
    "empty ones": ([0, 9, 0, 20, 0], [0, 9, 0, 20, 0]),
    "cross": ([3, 20], [35, 9]),
    "without queries or keys": ([20, 0, 9], [0, 13, 9]),
    "one": ([40], [50]),
}

TERMS: dict[str, Options] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (9, 4)},
    "scores": {"softcap": 0.7, "causal": True, "scale": 0.5},
}


@kernels
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(
    "terms",
    [pytest.param(name, marks=[] if name == "window" else pytest.mark.slow) for name in TERMS],
)
def test_kernels_do_what_a_loop_does(lengths, terms):
    compare(*LENGTHS[lengths], **TERMS[terms])


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("terms", TERMS)
def test_reference_does_what_a_loop_does(lengths, terms):
    with fastattn.backend("reference"):
        compare(*LENGTHS[lengths], **TERMS[terms])


def options_of_each(queries: Sequence[int], keys: Sequence[int]) -> tuple[list[Options], Options]:
    """A mask, slopes and key lengths: for each sequence, and for all of them at once."""
    batch = len(queries)
    mask = random_mask(batch, 2, max(queries), max(keys))
    slopes = torch.rand(batch, 2, device=DEVICE)
    kept = torch.tensor([max(length - 2, 0) for length in keys], device=DEVICE)
    each: list[Options] = [
        {
            "mask": mask[place : place + 1, :, : queries[place], : keys[place]],
            "alibi_slopes": slopes[place],
            "kv_lengths": kept[place : place + 1],
        }
        for place in range(batch)
    ]
    return each, {"mask": mask, "alibi_slopes": slopes, "kv_lengths": kept}


@kernels
def test_tensors_of_terms_are_by_sequence():
    queries, keys = [20, 3, 0], [25, 9, 4]
    compare(queries, keys, *options_of_each(queries, keys), causal=True)


def test_tensors_of_terms_are_by_sequence_in_the_reference():
    queries, keys = [20, 3, 0], [25, 9, 4]
    with fastattn.backend("reference"):
        compare(queries, keys, *options_of_each(queries, keys), causal=True)


@kernels
def test_a_packed_sequence_has_the_bits_that_it_has_alone():
    lengths = [9, 20, 3]
    tensors, places = packed(lengths, lengths)
    found = results(fastattn.attention_varlen, tensors, **places, causal=True)
    begin = 0
    for length in lengths:
        parts = [x.detach()[begin : begin + length].requires_grad_() for x in tensors]
        alone = [x.transpose(0, 1)[None] for x in parts]
        o = fastattn.attention(*alone, causal=True)[0].transpose(0, 1)
        assert same_bits(found["o"][begin : begin + length], o)
        begin += length


@kernels
def test_padded_sequences_give_the_same():
    lengths = [9, 20, 3]
    tensors, places = packed(lengths, lengths)
    longest = max(lengths)
    inside = torch.arange(longest, device=DEVICE) < torch.tensor(lengths, device=DEVICE)[:, None]

    def padded(*tensors: torch.Tensor) -> Any:
        rows = []
        for x in tensors:
            row = x.new_zeros(3, longest, *x.shape[1:]).masked_scatter(inside[..., None, None], x)
            rows.append(row.transpose(1, 2))
        kept = torch.tensor(lengths, device=DEVICE)
        o, lse = fastattn.attention(*rows, kv_lengths=kept, return_lse=True)
        return o.transpose(1, 2)[inside], lse.transpose(1, 2)[inside].T

    found = results(fastattn.attention_varlen, tensors, **places, return_lse=True)
    assert_results_close(found, results(padded, tensors))


@kernels
def test_longest_lengths_may_be_more_than_they_are():
    lengths = [9, 20, 3]
    tensors, places = packed(lengths, lengths)
    expected = results(fastattn.attention_varlen, tensors, **places, causal=True)
    places |= {"max_seqlen_q": 50, "max_seqlen_k": 77}
    for name, value in results(fastattn.attention_varlen, tensors, **places, causal=True).items():
        assert same_bits(value, expected[name]), name


@kernels
def test_cumulative_lengths_of_any_stride():
    tensors, places = packed([9, 20, 3], [9, 20, 14])
    expected = results(fastattn.attention_varlen, tensors, **places)
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        places[name] = places[name].repeat_interleave(2)[::2]
    for name, value in results(fastattn.attention_varlen, tensors, **places).items():
        assert same_bits(value, expected[name]), name


@kernels
@pytest.mark.parametrize("lengths", [[], [0, 0]])
@pytest.mark.parametrize("rows", [0, 3])
def test_nothing_packed(lengths, rows):
    def attention(*tensors: torch.Tensor) -> Any:
        longest = max(lengths, default=0)
        places = (cumulative(lengths), cumulative(lengths), longest, longest)
        return fastattn.attention_varlen(*tensors, *places, return_lse=True)

    found: Results = results(attention, [normal(rows, 2, 8) for _ in range(3)])
    assert found["lse"].shape == (2, rows)
    assert (found.pop("lse") == float("-inf")).all()
    assert all((value == 0).all() for value in found.values())


@kernels
@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("longest", [0, 4])
@pytest.mark.parametrize("options", [{}, {"causal": True, "window": 2}], ids=str)
def test_no_rows_at_all(options, longest, backend):
    """As on a rank that got no tokens, where the longest lengths are fixed."""
    some, none = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in ([0, 3, 5], [0, 0, 0]))
    rows, nothing = normal(5, 2, 8), normal(0, 2, 8)
    with fastattn.backend(backend):
        without_keys = fastattn.attention_varlen(
            rows, nothing, nothing, some, none, 3, longest, return_lse=True, **options
        )
        without_queries = fastattn.attention_varlen(
            nothing, rows, rows, none, some, longest, 3, return_lse=True, **options
        )
    assert torch.equal(without_keys[0], torch.zeros_like(rows))
    assert (without_keys[1] == float("-inf")).all()
    assert [tuple(x.shape) for x in without_queries] == [(0, 2, 8), (2, 0)]
    for outputs in (without_keys, without_queries):
        for gradient in torch.autograd.grad(outputs[0].sum(), (rows, nothing)):
            assert torch.equal(gradient, torch.zeros_like(gradient))


@kernels
def test_derivatives_of_gradients():
    lengths = [20, 0, 3], [9, 1, 14]
    tensors, places = packed(*lengths, more=1)
    options = {"causal": True, "softcap": 2.0}
    found = second_derivatives(
        fastattn.attention_varlen, tensors, **places, **options, return_lse=True
    )
    each: list[Options] = [{}] * 3

    def loop(*tensors: torch.Tensor) -> Any:
        return one_by_one(*lengths, each, *tensors, **options)

    with fastattn.backend("reference"):
        assert_results_close(found, second_derivatives(loop, tensors))


@kernels
@pytest.mark.slow
def test_compiles_with_other_lengths():
    torch.compiler.reset()

    def attention(*tensors: torch.Tensor, **places: Any) -> Any:
        return fastattn.attention_varlen(*tensors, **places, causal=True)

    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    for lengths in ([9, 3], [7, 11]):
        tensors, places = packed(lengths, lengths)
        expected = results(attention, tensors, **places)
        for name, value in results(compiled, tensors, **places).items():
            assert same_bits(value, expected[name]), name


@kernels
def test_autocast_gives_its_dtype():
    tensors, places = packed([20, 3], [9, 14])
    tensors = [x.detach().float().requires_grad_() for x in tensors]
    tensors[1] = tensors[1].detach().bfloat16().requires_grad_()
    with torch.autocast(str(DEVICE), dtype=torch.bfloat16):
        found = results(fastattn.attention_varlen, tensors, **places, return_lse=True)
    assert [found[name].dtype for name in ("o", "lse", "dq", "dk", "dv")] == [
        torch.bfloat16,
        torch.float32,
        torch.float32,
        torch.bfloat16,
        torch.float32,
    ]


@kernels
def test_equals_the_reference_with_wide_heads_that_share_keys():
    tensors, places = packed([20, 3], [9, 14])
    tensors = [normal(*x.shape[:2], dim) for x, dim in zip(tensors, (40, 40, 80), strict=True)]
    check(tensors, fastattn.attention_varlen, **places)


def places(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.randn(1, 2, 5, 8)}, ValueError, r"q must have 3 dimensions \(N, H, D\)"),
        ({"k": torch.randn(7, 3, 8)}, ValueError, "the same number of heads"),
        ({"v": torch.randn(6, 2, 8)}, ValueError, "k and v must have the same length"),
        ({"cu_seqlens_q": [0, 2, 5]}, TypeError, "cu_seqlens_q must be a tensor, got list"),
        ({"cu_seqlens_q": places(0, 2, 5).long()}, ValueError, "cu_seqlens_q must be int32"),
        ({"cu_seqlens_k": places(0, 3, 7)[None]}, ValueError, r"cu_seqlens_k .* shape \(B \+ 1,\)"),
        ({"cu_seqlens_k": places()}, ValueError, r"cu_seqlens_k must be int32 of shape \(B \+ 1"),
        ({"cu_seqlens_k": places(0, 3, 4, 7)}, ValueError, "must have the same shape"),
        (
            {"cu_seqlens_k": places(0, 3, 8)},
            ValueError,
            "cu_seqlens_k must rise from 0 to at most 7",
        ),
        ({"cu_seqlens_k": places(1, 3, 7)}, ValueError, "cu_seqlens_k must rise from 0"),
        ({"cu_seqlens_q": places(0, 4, 2)}, ValueError, "cu_seqlens_q must rise from 0"),
        ({"cu_seqlens_q": places(0, 2**31 - 1, -(2**31))}, ValueError, "cu_seqlens_q must rise"),
        ({"max_seqlen_q": 6.0}, TypeError, "max_seqlen_q must be an integer, got 6.0"),
        ({"max_seqlen_k": None}, TypeError, "max_seqlen_k must be an integer, got None"),
        ({"max_seqlen_k": True}, TypeError, "max_seqlen_k must be an integer, got True"),
        ({"max_seqlen_q": -1}, ValueError, "max_seqlen_q must not be negative, got -1"),
        ({"max_seqlen_q": 2}, ValueError, "a sequence of 3, more than the 2 of max_seqlen_q"),
        ({"max_seqlen_k": 3}, ValueError, "a sequence of 4, more than the 3 of max_seqlen_k"),
        (
            {"mask": torch.ones(2, 2, 5, 7).bool()},
            ValueError,
            r"mask must broadcast to \(2, 2, 3, 4",
        ),
        ({"kv_lengths": torch.ones(3).int()}, ValueError, r"kv_lengths must have shape \(2,\)"),
        ({"window": -1}, ValueError, "window must not be negative, got -1"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    arguments = {
        "q": torch.randn(5, 2, 8),
        "k": torch.randn(7, 2, 8),
        "v": torch.randn(7, 2, 8),
        "cu_seqlens_q": places(0, 2, 5),
        "cu_seqlens_k": places(0, 3, 7),
        "max_seqlen_q": 3,
        "max_seqlen_k": 4,
    }
    with pytest.raises(error, match=message):
        fastattn.attention_varlen(**{**arguments, **change})
