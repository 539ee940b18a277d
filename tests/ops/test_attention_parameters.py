"""What attention learns: biases, T5's table, slopes and sinks, and in what memory."""

import itertools

import pytest
import torch
from attention_support import (
    assert_results_close,
    check,
    incoming,
    normal,
    qkv,
    random_blocks,
    random_mask,
    results,
    seed,
)
from torch.utils._python_dispatch import TorchDispatchMode

import fastattn
from fastattn import RelativeBias, ScoreTerm
from fastattn.checking import Change, compare_results, measure_reference
from fastattn.kernels.attention import backward_bias
from fastattn.kernels.attention.scores import alibi_parameter_backward, alibi_score, pass_gradient
from fastattn.terms import ScoreFunctions
from support import DEVICE, WIDEST, same_bits

pytestmark = pytest.mark.kernels

BATCH, HEADS, QUERIES, KEYS = 2, 4, 40, 50


def tensors() -> list[torch.Tensor]:
    return qkv(BATCH, HEADS, QUERIES, KEYS, 8, key_heads=2)


@pytest.mark.parametrize(
    "shape",
    [
        shape
        for shape in itertools.product((1, BATCH), (1, HEADS), (1, QUERIES), (1, KEYS))
        # Of a bias that is the same for all keys of a query, softmax leaves nothing but the lse.
        if shape[3] > 1
    ],
    ids=str,
)
def test_a_bias_broadcast_in_any_way(shape):
    check(tensors(), bias=normal(*shape), causal=True, softcap=3.0)


@pytest.mark.parametrize("shape", [(KEYS,), (QUERIES, KEYS), (HEADS, 1, KEYS), (1,), ()], ids=str)
def test_a_bias_of_fewer_dimensions(shape):
    check(tensors(), bias=normal(*shape), mask=random_mask(QUERIES, KEYS))


@pytest.mark.parametrize("programs", [1, 3, 100])
def test_programs_that_share_a_tile_of_the_bias(programs, monkeypatch):
    monkeypatch.setattr(backward_bias, "PROGRAMS_OF_MULTIPROCESSOR", programs)
    inputs, bias = tensors(), normal(1, 1, QUERIES, KEYS)
    check(inputs, bias=bias, window=(20, 9))
    found = [results(fastattn.attention, inputs, bias=bias)["dbias"] for _ in range(2)]
    assert same_bits(*found)


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.float16),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
    ],
    ids=str,
)
def test_a_bias_of_another_dtype(dtypes):
    inputs = qkv(1, 2, 20, 30, 16, dtype=dtypes[0])
    bias = normal(2, 20, 30, dtype=dtypes[1])
    found = results(fastattn.attention, inputs, bias=bias)

    @fastattn.backend("reference")
    def run(change: Change) -> dict[str, torch.Tensor]:
        return results(fastattn.attention, [change(x) for x in inputs], bias=change(bias))

    for name, value in found.items():
        assert value.dtype is (dtypes[1] if name == "dbias" else dtypes[0])
    for comparison in compare_results(found, measure_reference(run)):
        assert comparison.passed, comparison


def test_a_bias_may_be_infinite():
    inputs, bias = tensors(), normal(1, HEADS, QUERIES, KEYS)
    with torch.no_grad():
        bias.masked_fill_(random_mask(HEADS, QUERIES, KEYS)[None], float("-inf"))
        bias[:, :, 3] = float("-inf")
    check(inputs, bias=bias, causal=True)
    found = results(fastattn.attention, inputs, bias=bias)
    assert found["o"][:, :, 3].abs().max() == 0.0
    assert all(value.isfinite().all() for value in found.values())
    assert found["dbias"][bias.isinf()].abs().max() == 0.0


class Largest(TorchDispatchMode):
    """Notes the most elements of any tensor that an op returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for output in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(output, torch.Tensor):
                self.elements = max(self.elements, output.numel())
        return result


def test_no_gradient_takes_more_memory_than_its_parameter():
    length, heads = 100, 2
    inputs = qkv(1, heads, length, dim=4)
    options = {
        "bias": normal(1, heads, 1, length),
        "relative_bias": RelativeBias(normal(8, heads), max_distance=20),
        "alibi_slopes": normal(heads),
        "sinks": normal(heads),
        "dropout_p": 0.2,
        "document_ids": torch.zeros(1, length, dtype=torch.int64, device=DEVICE),
    }
    with Largest() as largest:
        results(fastattn.attention, inputs, **options)
    # Far from heads * length * length.
    assert largest.elements <= 4 * heads * length * 4


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (8, 20), (10, 30)])
def test_relative_bias_is_that_of_hugging_face(bidirectional, buckets, max_distance):
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    config = t5.T5Config(
        num_heads=2,
        d_model=8,
        d_kv=4,
        relative_attention_num_buckets=buckets,
        relative_attention_max_distance=max_distance,
        is_decoder=not bidirectional,
    )
    layer = t5.T5Attention(config, has_relative_attention_bias=True, layer_idx=0)
    table = torch.randn(buckets, 2)
    layer.relative_attention_bias.weight.data = table
    # Distances to beyond the last bucket's.
    length = max_distance + 22
    expected = layer.compute_bias(length, length).detach()
    term = RelativeBias(table, bidirectional, max_distance)
    m, n = torch.arange(length)[:, None], torch.arange(length)
    zeros = torch.zeros(1, 2, length, length)
    assert torch.equal(term.score(zeros, m, n, length, length), expected)

    inputs = qkv(1, 2, length, dim=4)
    term = RelativeBias(table.to(DEVICE, WIDEST), bidirectional, max_distance)
    found = results(fastattn.attention, inputs, relative_bias=term)
    bias = results(fastattn.attention, inputs, bias=expected.to(DEVICE, WIDEST))
    found.pop("drelative_bias", None)
    assert_results_close(found, bias)


def test_relative_bias_of_sequences_of_different_lengths():
    cumulative_q = torch.tensor([0, 20, 20, 57], dtype=torch.int32, device=DEVICE)
    cumulative_k = torch.tensor([0, 33, 40, 70], dtype=torch.int32, device=DEVICE)
    packed = [normal(57, 2, 8), normal(70, 2, 8), normal(70, 2, 8)]

    def attention(*inputs, **options):
        return fastattn.attention_varlen(*inputs, cumulative_q, cumulative_k, 40, 35, **options)

    check(
        packed,
        attention,
        relative_bias=RelativeBias(normal(8, 2), max_distance=20),
        bias=normal(3, 2, 1, 35),
        alibi_slopes=normal(3, 2),
        sinks=normal(2),
        dropout_p=0.3,
        dropout_seed=seed(3),
        block_mask=random_blocks(3, 1, 40, 35, (16, 16)),
    )


def test_a_sink_is_all_where_there_is_no_key():
    sinks = normal(2)
    q, k, v = qkv(1, 2, 5, 0)
    o, lse = fastattn.attention(q, k, v, sinks=sinks, return_lse=True)
    assert torch.equal(lse, sinks[None, :, None].expand(1, 2, 5))
    (gradient,) = torch.autograd.grad(lse, sinks, incoming(lse))
    assert torch.allclose(gradient, incoming(lse).sum((0, 2)))
    q, k, v = qkv(1, 2, 5, 7)
    nobody = torch.zeros(5, 7, dtype=torch.bool, device=DEVICE)
    o, lse = fastattn.attention(q, k, v, mask=nobody, sinks=sinks, return_lse=True)
    assert o.abs().max() == 0.0
    assert torch.allclose(lse, sinks[None, :, None].expand(1, 2, 5))


def test_a_sink_of_minus_infinity_is_none():
    inputs = tensors()
    none = torch.full((HEADS,), float("-inf"), device=DEVICE)
    found = results(fastattn.attention, inputs, sinks=none, causal=True, return_lse=True)
    expected = results(fastattn.attention, inputs, causal=True, return_lse=True)
    for name, value in expected.items():
        assert same_bits(found[name], value), name


def test_only_what_is_wanted_is_computed():
    """Each gradient alone has the bits that it has among all."""
    inputs = tensors()
    parameters = {
        "bias": normal(1, HEADS, QUERIES, KEYS),
        "alibi_slopes": normal(HEADS),
        "sinks": normal(HEADS),
    }
    whole = results(fastattn.attention, inputs, **parameters)
    for name, parameter in parameters.items():
        options = {key: value.detach() for key, value in parameters.items()} | {name: parameter}
        o = fastattn.attention(*(x.detach() for x in inputs), **options)
        (gradient,) = torch.autograd.grad(o, parameter, incoming(o))
        assert same_bits(gradient, whole[f"d{name}"]), name


class Unlearned(ScoreTerm):
    """Says that it learns, but not how."""

    learned = True

    def __init__(self) -> None:
        self.tensors = (normal(1, HEADS),)

    @classmethod
    def triton_functions(cls):
        return ScoreFunctions(alibi_score, pass_gradient)


class Odd(Unlearned):
    """Has a parameter of a shape that means nothing."""

    @classmethod
    def triton_functions(cls):
        return ScoreFunctions(alibi_score, pass_gradient, alibi_parameter_backward)

    def __init__(self) -> None:
        self.tensors = (normal(3, HEADS),)


@pytest.mark.parametrize(
    ("term", "error", "message"),
    [
        (Unlearned, TypeError, "Unlearned is learned, so that its triton_functions"),
        (Odd, ValueError, r"must begin with the dimensions batch and heads, \(2, 4\) or 1 for"),
    ],
)
def test_what_a_learned_term_lacks_is_said(term, error, message):
    with pytest.raises(error, match=message):
        fastattn.attention(*tensors(), score_mods=[term()])
