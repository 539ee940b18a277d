"""What is special about attention over caches: lengths, pages, parts, numbers of 8 bits."""

from typing import Any

import pytest
import torch

import fastattn
from fastattn.ops.attention.terms import BooleanMask
from fastattn.ops.core.backends import INTERPRETED
from support import DEVICE, WIDEST, assert_close, same_bits

on_kernels = pytest.mark.kernels


def normal(*shape: int, dtype: torch.dtype = WIDEST, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE or "cpu", dtype)


def integers(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, device=DEVICE or "cpu")


def scatter_pages(cache: torch.Tensor, page: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A cache (B, Hkv, N, D) in pages that lie in any order, one of NaN more, and its table."""
    batch, heads, keys, dim = cache.shape
    parts = cache.view(batch, heads, keys // page, page, dim).transpose(1, 2).flatten(0, 1)
    order = torch.randperm(len(parts), generator=torch.Generator().manual_seed(1)).to(cache.device)
    pool = torch.full((len(parts) + 1, heads, page, dim), float("nan"), device=cache.device)
    pool = pool.to(cache.dtype)
    pool[order] = parts
    return pool, order.view(batch, -1).int()


@pytest.fixture(
    params=[pytest.param("triton", marks=on_kernels), "reference"], ids=["triton", "reference"]
)
def _backend(request):
    with fastattn.backend(request.param):
        yield


EDGES = (0, 1, 15, 16, 17, 33, 48)
"""Lengths about the blocks of 16 keys that the interpreter's tiles have."""


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("queries", [1, 3])
def test_each_sequence_is_as_alone(queries):
    q = normal(len(EDGES), 4, queries, 16)
    k, v = normal(len(EDGES), 2, 48, 16), normal(len(EDGES), 2, 48, 24, seed=1)
    options: dict[str, Any] = {"window": 20, "softcap": 3.0, "sinks": normal(4)}
    for place, length in enumerate(EDGES):
        # What lies beyond a sequence's keys may be anything.
        k[place, :, length:], v[place, :, length:] = float("nan"), float("nan")
    o, lse = fastattn.decode_attention(
        q, k, v, lengths=integers(*EDGES), return_lse=True, **options
    )
    for place, length in enumerate(EDGES):
        own = (slice(place, place + 1), slice(None))
        expected = fastattn.attention(
            q[own],
            k[own][:, :, :length],
            v[own][:, :, :length],
            causal=True,
            return_lse=True,
            **options,
        )
        assert_close(o[own], expected[0], f"{length} keys")
        assert_close(lse[own], expected[1], f"{length} keys, lse")


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("page", [4, 6, 16, 48])
def test_pages_have_the_bits_of_one_cache(page):
    q, lengths = normal(2, 4, 2, 16), integers(37, 48)
    k, v = normal(2, 2, 48, 16), normal(2, 2, 48, 16, seed=1)
    expected = fastattn.decode_attention(q, k, v, lengths=lengths)
    pages_k, table = scatter_pages(k, page)
    pages_v, _ = scatter_pages(v, page)
    found = fastattn.decode_attention(q, pages_k, pages_v, lengths=lengths, block_table=table)
    assert same_bits(found, expected)


@pytest.mark.usefixtures("_backend")
def test_long_and_short_sequences_of_one_batch():
    q, lengths = normal(3, 2, 1, 16), (4097, 1, 4200)
    k, v = normal(3, 1, 4224, 16), normal(3, 1, 4224, 16, seed=1)
    for place, length in enumerate(lengths):
        k[place, :, length:], v[place, :, length:] = float("nan"), float("nan")
    o = fastattn.decode_attention(q, k, v, lengths=integers(*lengths))
    pages_k, table = scatter_pages(k, 64)
    pages_v, _ = scatter_pages(v, 64)
    paged = fastattn.decode_attention(
        q, pages_k, pages_v, lengths=integers(*lengths), block_table=table
    )
    assert same_bits(paged, o)
    for place, length in enumerate(lengths):
        own = (slice(place, place + 1), slice(None))
        keys, values = (x[own][:, :, :length] for x in (k, v))
        with fastattn.backend("reference"):
            expected = fastattn.attention(q[own], keys, values, causal=True)
        assert_close(o[own], expected, f"{length} keys")


@on_kernels
def test_parts_are_merged_exactly():
    q, lengths = normal(2, 4, 1, 16), integers(45, 3)
    k, v = normal(2, 1, 64, 16), normal(2, 1, 64, 16, seed=1)
    whole = fastattn.decode_attention(q, k, v, lengths=lengths, splits=1)
    for splits in (2, 3, 5, 40):
        found = fastattn.decode_attention(q, k, v, lengths=lengths, splits=splits)
        assert_close(found, whole, f"{splits} parts")


@on_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sequence_has_the_bits_that_it_has_alone(dtype):
    q = normal(3, 4, 2, 16, dtype=dtype)
    k, v = (normal(3, 2, 128, 16, dtype=dtype, seed=seed) for seed in (0, 1))
    lengths = integers(128, 5, 70)
    with fastattn.batch_invariant():
        together = fastattn.decode_attention(q, k, v, lengths=lengths)
        # With less room, too.
        alone = fastattn.decode_attention(q[2:], k[2:, :, :72], v[2:, :, :72], lengths=lengths[2:])
    assert same_bits(together[2:], alone)


@pytest.mark.usefixtures("_backend")
def test_a_tree_of_guesses_is_a_mask_among_new_tokens():
    q, k, v = normal(1, 2, 3, 8), normal(1, 2, 12, 8), normal(1, 2, 12, 8, seed=1)
    # Two guesses for one place: neither sees the other.
    tree = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]], dtype=torch.bool, device=q.device)
    found = fastattn.decode_attention(q, k, v, lengths=integers(10), mask=tree)
    mask = torch.ones(3, 10, dtype=torch.bool, device=q.device)
    mask[:, 7:] = tree
    expected = fastattn.attention(q, k[:, :, :10], v[:, :, :10], mask=mask)
    assert_close(found, expected, "o")


@on_kernels
@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("shape", [(1, 1, 1, 48), (2, 4, 3, 48)], ids=["one", "each"])
def test_a_dense_mask_is_a_term_among_others(shape):
    """Of a cache that somebody else manages, as transformers' static one."""
    q, k, v = normal(2, 4, 3, 16), normal(2, 2, 48, 16), normal(2, 2, 48, 16, seed=1)
    seen = torch.rand(shape, generator=torch.Generator().manual_seed(2)) < 0.5
    seen[..., 30:] = False
    k[:, :, 30:], v[:, :, 30:] = float("nan"), float("nan")
    seen = seen.to(q.device)
    options: dict[str, Any] = {"causal": False, "return_lse": True}
    found = fastattn.decode_attention(
        q, k, v, lengths=integers(30, 30), score_mods=[BooleanMask(seen)], **options
    )
    expected = fastattn.attention(q, k, v, mask=seen, **options)
    for own, other in zip(found, expected, strict=True):
        assert_close(own, other)


@pytest.mark.skipif(not INTERPRETED, reason="a CPU looks at the table itself otherwise")
def test_a_page_out_of_range_is_not_read():
    from fastattn.kernels.decode.attention import decode_attention_forward

    q, k = normal(2, 2, 1, 16), normal(3, 2, 16, 16)
    for wrong in (3, -1, 2**31 - 1, -(2**31)):
        table = torch.tensor([[0, 1], [wrong, 2]], dtype=torch.int32)
        o, lse = decode_attention_forward(
            q, k, k, integers(20, 20), table, None, None, None, [], 16, 0.3, "ieee", "", [], []
        )
        assert o[0].isfinite().all()
        assert o[1].isnan().all()
        assert lse[1].isnan().all()


@on_kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_number_of_eight_bits_is_read_as_torch_reads_it(dtype):
    """Of one key: what comes out is its value."""
    every = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(1, 1, 1, 256)
    q = torch.zeros(1, 1, 1, 1, dtype=dtype, device=DEVICE)
    for kind in (torch.int8, torch.float8_e4m3fn):
        v = every.view(kind)
        o = fastattn.decode_attention(q, v[..., :1], v, lengths=integers(1)).flatten()
        # But for the sign of zero, to which a sum adds nothing.
        assert torch.equal(o.float().nan_to_num(0.5), v.float().flatten().nan_to_num(0.5))


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn, torch.bfloat16])
def test_scaled_caches_give_the_dtype_of_queries(kind):
    """Also where no gradient is wanted, and PyTorch's own attention takes one dtype alone."""
    cache, lengths = (40 * normal(2, 2, 20, 16)).to(kind), integers(20, 7)
    scales: dict[str, Any] = {"k_scale": 0.02, "v_scale": 0.05}
    q = normal(2, 4, 1, 16, dtype=torch.bfloat16)
    for leaf in (q, q.clone().requires_grad_()):
        for given in ({}, {"v_scale": 0.05}, scales):
            o = fastattn.decode_attention(leaf, cache, cache, lengths=lengths, **given)
            assert o.dtype is torch.bfloat16
    if kind is torch.bfloat16:
        return
    q = normal(2, 4, 1, 16)
    found = fastattn.decode_attention(q, cache, cache, lengths=lengths, **scales)
    k, v = (cache.to(WIDEST) * scale for scale in scales.values())
    assert_close(found, fastattn.attention(q, k, v, kv_lengths=lengths))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"lengths": torch.tensor([9, 1])}, r"lengths must be in \[0, 8\]"),
    ({"lengths": torch.tensor([-1, 1])}, r"lengths must be in \[0, 8\]"),
    ({"lengths": torch.tensor([1.0, 1.0])}, "lengths must be int32 or int64"),
    ({"lengths": torch.tensor([1])}, "lengths must have shape"),
    ({"k": torch.zeros(2, 3, 8, 4)}, "the number of heads of k must divide that of q"),
    ({"k": torch.zeros(3, 2, 8, 4)}, "same heads and room"),
    ({"v": torch.zeros(2, 2, 8, 4).half()}, "k and v must have one dtype"),
    ({"k": torch.zeros(2, 2, 8, 5), "v": torch.zeros(2, 2, 8, 5)}, "same head dimension"),
    ({"v": None}, "value_dim must say"),
    ({"v": None, "value_dim": 5}, "value_dim at most that of k"),
    ({"value_dim": 4}, "value_dim is for calls without v"),
    ({"k_scale": torch.ones(3)}, "k_scale must be float32"),
    ({"v_scale": torch.ones(2).half()}, "v_scale must be float32"),
    ({"splits": 0}, "splits must be positive"),
    ({"mask": torch.zeros(1, 1, dtype=torch.bool)}, "mask must have shape"),
    ({"mask": torch.zeros(3, 3)}, "mask must be boolean"),
    ({"sinks": torch.zeros(3)}, "sinks must have shape"),
    ({"block_table": torch.zeros(3, 1).int()}, r"block_table must be \(2, pages\)"),
    ({"block_table": torch.tensor([[2], [0]])}, r"must name pages in \[0, 2\), got \[2\]"),
    ({"q": torch.zeros(2, 4, 3, 4).int()}, "q must be float16"),
]


@pytest.mark.parametrize(("wrong", "message"), REFUSED)
def test_what_does_not_fit_is_refused(wrong, message):
    given: dict[str, Any] = {
        "q": torch.zeros(2, 4, 3, 4),
        "k": torch.zeros(2, 2, 8, 4),
        "v": torch.zeros(2, 2, 8, 4),
        "lengths": torch.tensor([4, 8]),
    }
    if "v" not in wrong and "k" in wrong and wrong["k"].shape[1] == 3:
        given["v"] = wrong["k"]
    with pytest.raises((TypeError, ValueError), match=message):
        fastattn.decode_attention(**{**given, **wrong})


def test_parts_that_do_not_fit_are_refused():
    o, lse = torch.zeros(2, 3, 4), torch.zeros(2, 3)
    for wrong, message in (
        ((o, lse[:1]), "lse must have shape"),
        ((o.half(), lse.half()), "lse must be torch.float32"),
        ((o[:0], lse[:0]), "one part"),
        (([], []), "one part"),
        ((o, None), "lse must be a tensor"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            fastattn.merge_attention(*wrong)


@pytest.mark.usefixtures("_backend")
def test_a_part_without_keys_may_hold_anything():
    o, lse = normal(3, 2, 5, 8), normal(3, 2, 5)
    expected = fastattn.merge_attention(o[:2], lse[:2])
    o[2], lse[2] = float("nan"), float("-inf")
    for found, wanted in zip(fastattn.merge_attention(o, lse), expected, strict=True):
        assert_close(found, wanted, "a part more")
    o, lse = fastattn.merge_attention(o, torch.full_like(lse, float("-inf")))
    assert (o == 0).all()
    assert (lse == float("-inf")).all()
