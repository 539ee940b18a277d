"""Tensors that plain functions capture and that learn: their gradients, on both backends."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_support import incoming, qkv

import fastattn
from fastattn.checking import Change, compare_results, measure_reference
from support import DEVICE, assert_close, count_launches

BATCH, HEADS, QUERIES, KEYS, SIDE = 2, 4, 33, 40, 7

WIDE = torch.float32 if DEVICE == "cuda" else torch.float64


def parameter(*shape: int) -> torch.Tensor:
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))
    return numbers.to(WIDE).to(DEVICE or "cpu").requires_grad_()


GAIN = parameter()
SLOPES = parameter(HEADS)
RATES = parameter(BATCH, HEADS)
BUCKETS = parameter(12, HEADS)
OFFSETS = parameter(2 * SIDE - 1, 2 * SIDE - 1)
BIAS = parameter(HEADS, 50, KEYS)
MIRRORED = parameter(KEYS, QUERIES)
OF_KEYS = parameter(BATCH, KEYS)
OF_QUERIES = parameter(QUERIES)
EMBEDDING = torch.nn.Embedding(9, HEADS, device=DEVICE, dtype=WIDE)


def slopes(score, b, h, q_idx, kv_idx):
    return score - SLOPES[h] * (q_idx - kv_idx).abs()


def decay(score, b, h, q_idx, kv_idx):
    near = torch.exp(-0.01 * RATES[b][h] ** 2 * (q_idx - kv_idx).abs().to(score.dtype))
    return score * near + GAIN * RATES[b, h]


def cap(score, b, h, q_idx, kv_idx):
    limit = 2.0 + GAIN.abs()
    return limit * torch.tanh(score / limit)


def buckets(score, b, h, q_idx, kv_idx):
    return score + BUCKETS[(q_idx - kv_idx).clamp(-6, 5) + 6, h]


def in_two_dimensions(score, b, h, q_idx, kv_idx):
    rows = (q_idx // SIDE - kv_idx // SIDE).clamp(1 - SIDE, SIDE - 1)
    columns = q_idx % SIDE - kv_idx % SIDE
    # A negative index is from the end.
    return score + OFFSETS[rows, columns + SIDE - 1]


def several_reads(score, b, h, q_idx, kv_idx):
    return score * BUCKETS[q_idx % 3, h] + BUCKETS[11, h] * BUCKETS[kv_idx % 5 + 1][h]


def bias(score, b, h, q_idx, kv_idx):
    return score + BIAS[h, q_idx, kv_idx]


def mirrored(score, b, h, q_idx, kv_idx):
    return score * MIRRORED[kv_idx][q_idx]


def of_keys_and_queries(score, b, h, q_idx, kv_idx):
    return score + OF_KEYS[b, kv_idx] * OF_QUERIES[q_idx]


def embedded(score, b, h, q_idx, kv_idx):
    return score + EMBEDDING.weight[(q_idx - kv_idx) % 9, h // 2]


FUNCTIONS: dict[str, tuple[Callable, list[torch.Tensor]]] = {
    "slopes": (slopes, [SLOPES]),
    "decay": (decay, [RATES, GAIN]),
    "cap": (cap, [GAIN]),
    "buckets": (buckets, [BUCKETS]),
    "in two dimensions": (in_two_dimensions, [OFFSETS]),
    "several reads": (several_reads, [BUCKETS]),
    "bias": (bias, [BIAS]),
    "mirrored": (mirrored, [MIRRORED]),
    "of keys and queries": (of_keys_and_queries, [OF_KEYS, OF_QUERIES]),
    "embedded": (embedded, [EMBEDDING.weight]),
}


def gradients_of(call: Callable, variables: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """An output and its gradients."""
    o = call()
    found = torch.autograd.grad(o, variables, incoming(o))
    return {"o": o, **{f"d{i}": gradient for i, gradient in enumerate(found)}}


def compare(call: Callable, variables: list[torch.Tensor]) -> None:
    """Both backends agree."""
    found = gradients_of(call, variables)
    with fastattn.backend("reference"):
        expected = gradients_of(call, variables)
    for name, value in expected.items():
        assert_close(found[name], value, name)


@pytest.mark.kernels
@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_are_the_references(name):
    function, learned = FUNCTIONS[name]
    inputs = qkv(BATCH, HEADS, QUERIES, KEYS, key_heads=2)
    compare(
        lambda: fastattn.attention(*inputs, score_mods=[function], causal=True),
        [*inputs, *learned],
    )


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_references_gradients_are_numerical_derivatives(name):
    function, learned = FUNCTIONS[name]
    if WIDE is not torch.float64:
        pytest.skip("numerical derivatives ask for float64")
    inputs = qkv(BATCH, HEADS, QUERIES, KEYS, dim=4, dtype=WIDE)
    with fastattn.backend("reference"):
        torch.autograd.gradcheck(
            lambda *_: fastattn.attention(*inputs, score_mods=[function]), learned, fast_mode=True
        )


@pytest.mark.kernels
@pytest.mark.parametrize("name", ["decay", "several reads", "mirrored"])
def test_second_derivatives(name):
    function, learned = FUNCTIONS[name]
    inputs = [x[:, :, :12].detach().requires_grad_() for x in qkv(BATCH, HEADS, 12, dim=4)]
    variables = [inputs[0], *learned]

    def call() -> torch.Tensor:
        o = fastattn.attention(*inputs, score_mods=[function])
        first = torch.autograd.grad(o, variables, incoming(o), create_graph=True)
        return torch.stack([(x * incoming(x)).sum() for x in first])

    compare(call, variables)


@pytest.mark.kernels
def test_packed_sequences_with_dropout_and_other_terms():
    cumulative = torch.tensor([0, 20, 33], dtype=torch.int32, device=DEVICE)
    q, k, v = (x[0].transpose(0, 1).detach().requires_grad_() for x in qkv(1, HEADS, 33))
    options: dict[str, Any] = {
        "score_mods": [buckets, decay, bias],
        "alibi_slopes": SLOPES,
        "dropout_p": 0.3,
        "dropout_seed": torch.tensor([3], device=DEVICE),
    }
    compare(
        lambda: fastattn.attention_varlen(q, k, v, cumulative, cumulative, 20, 20, **options),
        [q, k, v, BUCKETS, RATES, GAIN, BIAS, SLOPES],
    )


@pytest.mark.slow
@pytest.mark.kernels
def test_parameters_of_16_bits_obey_the_accuracy_rule():
    inputs = qkv(BATCH, HEADS, QUERIES, KEYS, dtype=torch.bfloat16)
    table, gains = (x.detach().bfloat16().requires_grad_() for x in (BUCKETS, RATES))

    def results_of(change: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
        own_table, own_gains, *given = (change(x) for x in (table, gains, *inputs))

        def function(score, b, h, q_idx, kv_idx):
            return score * own_gains[b, h] + own_table[(q_idx - kv_idx).clamp(-6, 5) + 6, h]

        return gradients_of(
            lambda: fastattn.attention(*given, score_mods=[function]),
            [own_table, own_gains, *given],
        )

    found = results_of(lambda x: x)

    @fastattn.backend("reference")
    def run(change: Change) -> dict[str, torch.Tensor]:
        return results_of(change)

    for comparison in compare_results(found, measure_reference(run)):
        assert comparison.passed, comparison


@pytest.mark.kernels
def test_gradients_have_the_same_bits_every_time_and_need_no_others():
    inputs = [x.detach() for x in qkv(1, HEADS, 20)]

    def run() -> list[torch.Tensor]:
        o = fastattn.attention(*inputs, score_mods=[buckets, bias])
        return list(torch.autograd.grad(o, [BUCKETS, BIAS], incoming(o)))

    with count_launches() as launched:
        first = run()
    assert "attention_keys_backward_kernel" not in launched
    assert all(map(torch.equal, first, run()))


@pytest.mark.slow
@pytest.mark.kernels
def test_what_learns_compiles_in_one_graph():
    mods = [fastattn.score_mod(buckets), fastattn.score_mod(decay)]
    inputs = qkv(BATCH, HEADS, 20)
    call = torch.compile(
        lambda *x: fastattn.attention(*x, score_mods=mods), backend="aot_eager", fullgraph=True
    )
    variables = [*inputs, BUCKETS, RATES, GAIN]
    found = gradients_of(lambda: call(*inputs), variables)
    expected = gradients_of(lambda: fastattn.attention(*inputs, score_mods=mods), variables)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_a_step_of_an_optimizer_counts_and_a_frozen_tensor_learns_nothing():
    table = torch.zeros(2, requires_grad=True)
    term = fastattn.score_mod(lambda s, b, h, m, n: s + table[h] * n)
    q, k, v = (torch.randn(1, 2, 6, 4) for _ in range(3))
    before = fastattn.attention(q, k, v, score_mods=[term])
    before.sum().backward()
    with torch.no_grad():
        table += 1.0
    assert not torch.equal(before, fastattn.attention(q, k, v, score_mods=[term]))
    table.requires_grad_(False)
    assert not fastattn.attention(q, k, v, score_mods=[term]).requires_grad


def test_what_is_computed_before_learns_too():
    weight = torch.randn(3, 2, requires_grad=True)
    q, k, v = (torch.randn(1, 2, 6, 4) for _ in range(3))
    table = torch.tanh(weight)
    fastattn.attention(q, k, v, score_mods=[lambda s, b, h, m, n: s + table[n % 3, h]]).sum()
    o = fastattn.attention(q, k, v, score_mods=[lambda s, b, h, m, n: s + table[n % 3, h]])
    (found,) = torch.autograd.grad(o, weight, incoming(o))
    assert found.abs().min() > 0


def test_other_values_and_lengths_are_the_same_code():
    def make(window: int, table: torch.Tensor):
        return fastattn.score_mod(
            lambda s, b, h, m, n: s + torch.where(m - n < window, table[h, m, n], 0.0)
        )

    one = make(3, torch.ones(2, 9, 9, requires_grad=True))
    other = make(20, torch.ones(4, 30, 30, requires_grad=True))
    assert one.name == other.name


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda s, b, h, m, n: s + (2 * SLOPES)[h], "requires a gradient: index it by all its"),
        (lambda s, b, h, m, n: s + SLOPES[h] + SLOPES[m % 4], r"once by \[h\] and once by \[ano"),
        (lambda s, b, h, m, n: s + LARGE[m - n], "a table of 2000 entries: kernels sum 1024"),
    ],
)
def test_what_cannot_learn_says_so(function, message):
    with pytest.raises(TypeError, match=message):
        fastattn.score_mod(function)


LARGE = torch.zeros(2000, requires_grad=True)


def test_a_mask_learns_nothing():
    with pytest.raises(TypeError, match="requires a gradient"):
        fastattn.mask_mod(lambda b, h, m, n: SLOPES[h] > 0)


def test_a_tensor_that_is_too_small_says_so():
    x = torch.ones(1, 5, 60, 4)
    with pytest.raises(ValueError, match="has 4 numbers along h, of which there are 5"):
        fastattn.attention(x, x, x, score_mods=[slopes])
    x = torch.ones(1, 4, 60, 4)
    with pytest.raises(ValueError, match="has 50 numbers along q_idx, of which there are 60"):
        fastattn.attention(x, x, x, score_mods=[bias])
