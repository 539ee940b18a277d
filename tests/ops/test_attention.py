"""Attention's features alone, in pairs and all together, against the reference."""

import itertools

import pytest
import torch
from attention_support import (
    FEATURES,
    SHAPES,
    assert_results_close,
    check,
    combined,
    incoming,
    normal,
    qkv,
    random_mask,
    results,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_calls import attention_calls

import fastattn
from support import DEVICE, same_bits

pytestmark = pytest.mark.kernels

NAMES = (*FEATURES, *SHAPES)


@pytest.mark.parametrize("name", NAMES)
def test_each_feature_alone(name):
    tensors, options = combined([name])
    check(tensors, **options)


EXCLUSIVE = ({"ALiBi", "learned ALiBi"},)

# One feature of each kind.
PAIRS = [
    pair
    for pair in itertools.combinations(
        (
            "causal",
            "window to both sides",
            "softcap",
            "ALiBi",
            "mask",
            "key lengths",
            "scale",
            "bias of heads",
            "learned ALiBi",
            "relative bias",
            "sinks",
            "dropout",
            "documents",
            "block mask",
            *SHAPES,
        ),
        2,
    )
    if not (pair[0] in SHAPES and SHAPES[pair[0]].keys() == SHAPES.get(pair[1], {}).keys())
    and set(pair) not in EXCLUSIVE
]


@pytest.mark.parametrize("pair", PAIRS, ids=" and ".join)
@pytest.mark.slow
def test_features_in_pairs(pair):
    tensors, options = combined(pair, batch=1)
    check(tensors, **options)


@pytest.mark.parametrize("dims", [(8, 8), (40, 40), (80, 80), (96, 96), (112, 112)], ids=str)
@pytest.mark.parametrize("causal", [pytest.param(False, marks=pytest.mark.slow), True])
def test_head_dimensions(dims, causal):
    check(qkv(dim=dims[0], value_dim=dims[1], queries=37, keys=45), causal=causal)


@pytest.mark.parametrize(
    "dims", [(24, 16), (16, 24), (1, 3), (192, 128), (256, 256), (576, 512)], ids=str
)
def test_head_dimensions_that_differ_or_are_wide(dims):
    queries, keys = (37, 45) if max(dims) < 32 else (3, 35)
    check(qkv(1, 2, queries, keys, dims[0], key_heads=1, value_dim=dims[1]), causal=True)


@pytest.mark.slow
@given(call=attention_calls(), return_lse=st.booleans(), seed=st.integers(0, 1000))
@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_features_together(call, return_lse, seed):
    torch.manual_seed(seed)
    tensors, options = combined(call[0], **call[1])
    check(tensors, return_lse=return_lse, **options)


def test_each_output_alone_gives_its_gradient():
    tensors = qkv(queries=40, keys=70)
    for place in range(2):
        found, expected = [], []
        for backend, gradients in (("triton", found), ("reference", expected)):
            with fastattn.backend(backend):  # type: ignore[arg-type]
                output = fastattn.attention(*tensors, causal=True, return_lse=True)[place]
            # v has no part in the lse, whose gradient there is 0 or missing.
            gradients += torch.autograd.grad(
                output, tensors, incoming(output), allow_unused=True, materialize_grads=True
            )
        assert_results_close(
            dict(zip("qkv", found, strict=True)), dict(zip("qkv", expected, strict=True))
        )


@pytest.mark.parametrize(
    "options",
    [
        {"mask": torch.tensor([True, False]).repeat(20)[:, None].expand(40, 70)},
        {"causal": True},
        {"window": (3, None), "kv_lengths": torch.tensor([20])},
        {"kv_lengths": torch.tensor([0])},
        {"mask": torch.zeros(1, 1, 1, 1, dtype=torch.bool), "softcap": 2.0},
    ],
    ids=["mask", "causal", "window and lengths", "no keys", "nothing"],
)
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_queries_without_keys(options, backend):
    options = {
        name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value
        for name, value in options.items()
    }
    # With more queries than keys the first ones stand before the first key.
    keys = 17 if options.get("causal") else 70
    q, k, v = qkv(heads=2, queries=40, keys=keys)
    seen = torch.full((40, keys), True, device=DEVICE)
    places = torch.arange(40, device=DEVICE)[:, None] + keys - 40
    order = torch.arange(keys, device=DEVICE)
    if "mask" in options:
        seen &= options["mask"].expand(1, 1, 40, keys)[0, 0]
    if options.get("causal"):
        seen &= order <= places
    if "window" in options:
        seen &= order >= places - 3
    if "kv_lengths" in options:
        seen &= order < options["kv_lengths"]
    alone = ~seen.any(1)
    unseen = ~seen.any(0)
    assert alone.any()
    with fastattn.backend(backend):
        found = results(fastattn.attention, (q, k, v), return_lse=True, **options)
    assert (found["o"][:, :, alone] == 0).all()
    assert (found["lse"][:, :, alone] == float("-inf")).all()
    assert found["lse"][:, :, ~alone].isfinite().all()
    assert (found["dq"][:, :, alone] == 0).all()
    for name in ("o", "dq", "dk", "dv"):
        assert found[name].isfinite().all(), name
    for name in ("dk", "dv"):
        assert (found[name][:, :, unseen] == 0).all(), name


def test_gradients_repeat_bit_for_bit_where_heads_share_keys():
    tensors = qkv(1, 4, 40, key_heads=2, dtype=torch.float32)
    options = {"causal": True, "mask": random_mask(40, 40), "return_lse": True}
    first = results(fastattn.attention, tensors, **options)
    for name, value in results(fastattn.attention, tensors, **options).items():
        assert same_bits(value, first[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_batch_element_has_the_bits_that_it_has_alone(dtype):
    tensors = qkv(2, 2, 40, 35, key_heads=1, dtype=dtype)
    weight = normal(2, 2, 40, 16, dtype=dtype).detach()
    mask = random_mask(2, 1, 40, 35)

    def run(rows: slice) -> list[torch.Tensor]:
        parts = [x.detach()[rows].clone().requires_grad_() for x in tensors]
        o, lse = fastattn.attention(*parts, causal=True, mask=mask[rows], return_lse=True)
        return [o, lse, *torch.autograd.grad(o, parts, weight[rows])]

    together = run(slice(0, 2))
    for element in range(2):
        rows = slice(element, element + 1)
        for whole, alone in zip(together, run(rows), strict=True):
            assert same_bits(whole[rows], alone)


def test_lengths_and_slopes_of_any_strides():
    tensors = qkv(3, 2, 5, 12, 4, key_heads=1)
    lengths = torch.tensor([5, 99, 2, 99, 9, 99], device=DEVICE)
    for dtype in (torch.int32, torch.int64):
        check(tensors, kv_lengths=lengths.to(dtype).expand(1, 6)[0, ::2])
    check(tensors, kv_lengths=torch.tensor(7, device=DEVICE).expand(3))
    check(tensors, kv_lengths=lengths[:1].expand(6)[::2])
    slopes = torch.tensor([[0.3, 9.0, 0.1, 9.0]], device=DEVICE)
    check(tensors, alibi_slopes=slopes[0, ::2])
    check(tensors, alibi_slopes=slopes[:, ::2].expand(3, 2))
    check(tensors, alibi_slopes=slopes.t()[::2].expand(2, 3).t())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_slopes_of_any_dtype_count_with_the_precision_of_scores(dtype):
    tensors = qkv(1, 2, 20, 300, dtype=torch.float32)
    slopes = torch.tensor([0.25, 2.0**-8], device=DEVICE)
    expected = fastattn.attention(*tensors, alibi_slopes=slopes)
    assert same_bits(fastattn.attention(*tensors, alibi_slopes=slopes.to(dtype)), expected)


def test_masks_of_any_strides():
    tensors = qkv(2, 2, 20, 48)
    mask = random_mask(2, 2, 20, 48)
    expected = results(fastattn.attention, tensors, mask=mask)
    wide = random_mask(2, 2, 20, 96)
    wide[..., ::2] = mask
    padded = random_mask(2, 2, 20, 50)
    padded[..., 1:49] = mask
    layouts = (wide[..., ::2], padded[..., 1:49], mask.mT.contiguous().mT)
    for layout in layouts:
        for name, value in results(fastattn.attention, tensors, mask=layout).items():
            assert same_bits(value, expected[name]), name


def test_alibi_slopes_are_those_of_the_paper():
    assert torch.equal(fastattn.alibi_slopes(8), 2.0 ** -torch.arange(1.0, 9.0))
    whole, more = fastattn.alibi_slopes(8), fastattn.alibi_slopes(12)
    assert torch.equal(more[:8], whole)
    assert torch.equal(more[8:], fastattn.alibi_slopes(16)[::2][:4])
    assert fastattn.alibi_slopes(1).tolist() == [2.0**-8]
    with pytest.raises(ValueError, match="num_heads must be positive, got 0"):
        fastattn.alibi_slopes(0)
