"""Masks and score terms as FlexAttention's users write them, on both backends, with gradients."""

import doctest
from collections.abc import Callable

import pytest
import torch
from attention_support import check, qkv, results, second_derivatives
from torch.nn.attention.flex_attention import create_block_mask as torchs_block_mask
from torch.nn.attention.flex_attention import flex_attention

import fastattn
from fastattn.checking import Change, compare_results, measure_reference
from fastattn.ops.attention.python_terms import terms
from support import DEVICE, assert_close

BATCH, HEADS, LENGTH = 2, 4, 70


def on_device(x: torch.Tensor) -> torch.Tensor:
    """A tensor that a function captures."""
    return x.to(DEVICE or "cpu")


generator = torch.Generator().manual_seed(5)
DOCUMENTS = on_device(torch.tensor([[0] * 30 + [1] * 25 + [2] * 15, [0] * 5 + [1] * 65]))
OFFSETS = on_device(torch.tensor([[0, 30, 55, 70], [0, 5, 70, 70]]))
PREFIX = on_device(torch.tensor([25, 3], dtype=torch.int32))
TABLE = on_device(torch.rand(LENGTH, LENGTH, generator=generator) < 0.5)
PER_HEAD = on_device(torch.rand(HEADS, LENGTH, LENGTH, generator=generator) < 0.5)
BIAS = on_device(torch.randn(BATCH, HEADS, LENGTH, LENGTH, generator=generator))
RELATIVE = on_device(torch.randn(HEADS, 2 * LENGTH, generator=generator, dtype=torch.float64))
SLOPES = on_device(torch.tensor([0.5, 0.25, 0.125, 0.0625]))
WINDOW, SINKS, SIDE, CAP, DECAY = 9, 4, 8, 5.0, 0.1


def causal(b, h, q_idx, kv_idx):
    return q_idx >= kv_idx


def sliding(b, h, q_idx, kv_idx):
    return (q_idx - kv_idx <= WINDOW) & (q_idx >= kv_idx)


def prefix(b, h, q_idx, kv_idx):
    return (kv_idx < PREFIX[b]) | (q_idx >= kv_idx)


def documents(b, h, q_idx, kv_idx):
    return (DOCUMENTS[b, q_idx] == DOCUMENTS[b][kv_idx]) & causal(b, h, q_idx, kv_idx)


def stream(b, h, q_idx, kv_idx):
    return (kv_idx < SINKS) | sliding(b, h, q_idx, kv_idx)


def neighbourhood(b, h, q_idx, kv_idx):
    rows = (q_idx // SIDE - kv_idx // SIDE).abs() <= 1
    return rows & ((q_idx % SIDE - kv_idx % SIDE).abs() <= 2)


def neighbourhood_in_three_dimensions(b, h, q_idx, kv_idx):
    def place(i):
        return i // (SIDE * 2), i // 2 % SIDE, i % 2

    places = zip(place(q_idx), place(kv_idx), strict=True)
    near = [(one - other).abs() <= 1 for one, other in places]
    return near[0] & near[1] & near[2]


def dilated(b, h, q_idx, kv_idx):
    return (q_idx >= kv_idx) & ((q_idx - kv_idx) % 3 == 0)


def from_a_table(b, h, q_idx, kv_idx):
    return TABLE[q_idx, kv_idx]


def from_a_table_of_each_head(b, h, q_idx, kv_idx):
    return PER_HEAD[h, q_idx, kv_idx] | (q_idx == kv_idx)


def of_each_head(b, h, q_idx, kv_idx):
    return torch.where(h % 2 == 0, q_idx >= kv_idx, q_idx - kv_idx <= SINKS * (h + 1))


def by_offsets(b, h, q_idx, kv_idx):
    return (kv_idx >= OFFSETS[b, 1]) == (q_idx >= OFFSETS[b, 1])


def nobody_sees_the_first_keys(b, h, q_idx, kv_idx):
    return kv_idx > SINKS


MASKS: dict[str, Callable] = {
    function.__name__: function
    for function in (
        causal,
        sliding,
        prefix,
        documents,
        stream,
        neighbourhood,
        neighbourhood_in_three_dimensions,
        dilated,
        from_a_table,
        from_a_table_of_each_head,
        of_each_head,
        by_offsets,
        nobody_sees_the_first_keys,
    )
} | {
    "and": fastattn.and_masks(causal, dilated),
    "or": fastattn.or_masks(sliding, neighbourhood, nobody_sees_the_first_keys),
}


def alibi(score, b, h, q_idx, kv_idx):
    return score + SLOPES[h] * (kv_idx - q_idx)


def computed_slopes(score, b, h, q_idx, kv_idx):
    return score - torch.exp2(-((h + 1) * 8.0 / HEADS)) * (q_idx - kv_idx).abs()


def softcap(score, b, h, q_idx, kv_idx):
    return CAP * torch.tanh(score / CAP)


def capped_and_masked(score, b, h, q_idx, kv_idx):
    return torch.where(q_idx >= kv_idx, softcap(score, b, h, q_idx, kv_idx), -float("inf"))


def relative(score, b, h, q_idx, kv_idx):
    return score + RELATIVE[h, q_idx - kv_idx + LENGTH]


def bucketed(score, b, h, q_idx, kv_idx):
    distance = (q_idx - kv_idx).clamp(-SIDE, SIDE)
    far = (torch.log((distance.abs() + 1).float()) * 3).long()
    return score + RELATIVE[h][torch.where(distance > 0, far, distance + LENGTH)]


def biased(score, b, h, q_idx, kv_idx):
    return score + BIAS[b, h, q_idx, kv_idx]


def decayed(score, b, h, q_idx, kv_idx):
    # By itself PyTorch multiplies integers and a number in float32.
    return score * torch.exp(-DECAY * (q_idx - kv_idx).abs().to(score.dtype))


def squared(score, b, h, q_idx, kv_idx):
    return score**2 * torch.sigmoid(score) + score.clamp(-1.0, 1.5)


def powers(score, b, h, q_idx, kv_idx):
    near = ((q_idx - kv_idx).abs() + 1).to(score.dtype)
    return score**5 / 50 + score**3 * near**-2 - near**-0.5 + (1.0 + score.abs()) ** 1.5


def forgotten(score, b, h, q_idx, kv_idx):
    return BIAS[b, h, 0, kv_idx]


SCORES: dict[str, Callable] = {
    function.__name__: function
    for function in (
        alibi,
        computed_slopes,
        softcap,
        capped_and_masked,
        relative,
        bucketed,
        biased,
        decayed,
        squared,
        powers,
        forgotten,
    )
}


def term_of(name: str) -> fastattn.ScoreTerm | fastattn.MaskTerm:
    return fastattn.mask_mod(MASKS[name]) if name in MASKS else fastattn.score_mod(SCORES[name])


@pytest.mark.kernels
@pytest.mark.parametrize("name", [*MASKS, *SCORES])
def test_outputs_and_gradients_are_the_references(name):
    inputs = qkv(BATCH, HEADS, LENGTH, key_heads=2)
    if name == "forgotten":
        with torch.no_grad():
            found = fastattn.attention(*inputs, score_mods=[term_of(name)])
            with fastattn.backend("reference"):
                expected = fastattn.attention(*inputs, score_mods=[term_of(name)])
        assert_close(found, expected, name)
    else:
        check(inputs, score_mods=[term_of(name)])


@pytest.mark.parametrize("name", [*MASKS, *SCORES])
def test_the_reference_is_flex_attention(name):
    q, k, v = (x.detach().cpu().float() for x in qkv(BATCH, HEADS, LENGTH))
    cpu = lambda x: x.to("cpu") if isinstance(x, torch.Tensor) else x  # noqa: E731
    with pytest.MonkeyPatch.context() as patch, fastattn.backend("reference"):
        for captured in ("DOCUMENTS", "OFFSETS", "PREFIX", "TABLE", "PER_HEAD", "BIAS"):
            patch.setitem(globals(), captured, cpu(globals()[captured]))
        for captured in ("RELATIVE", "SLOPES"):
            patch.setitem(globals(), captured, cpu(globals()[captured]).float())
        found = fastattn.attention(q, k, v, score_mods=[term_of(name)])
        if name in MASKS:
            sizes = (BATCH, HEADS, LENGTH, LENGTH, "cpu")
            theirs = flex_attention(q, k, v, block_mask=torchs_block_mask(MASKS[name], *sizes))
        else:
            theirs = flex_attention(q, k, v, SCORES[name])
    torch.testing.assert_close(found, theirs)


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("names", ["documents decayed", "neighbourhood relative softcap"])
def test_the_accuracy_rule_holds_with_everything_else(names, dtype):
    inputs = qkv(BATCH, HEADS, 40, LENGTH, dim=20, key_heads=1, dtype=dtype)
    options = {
        "score_mods": [term_of(name) for name in names.split()],
        "causal": True,
        "return_lse": True,
    }
    found = results(fastattn.attention, inputs, **options)

    @fastattn.backend("reference")
    def run(change: Change) -> dict[str, torch.Tensor]:
        return results(fastattn.attention, [change(x) for x in inputs], **options)

    for comparison in compare_results(found, measure_reference(run)):
        assert comparison.passed, comparison


@pytest.mark.kernels
@pytest.mark.parametrize("name", ["squared", "capped_and_masked", "documents"])
def test_second_derivatives(name):
    inputs = qkv(1, HEADS, 20, dim=8)
    options = {"score_mods": [term_of(name)], "return_lse": True}
    found = second_derivatives(fastattn.attention, inputs, **options)
    with fastattn.backend("reference"):
        expected = second_derivatives(fastattn.attention, inputs, **options)
    for key, value in expected.items():
        assert_close(found[key], value, key)


@pytest.mark.kernels
@pytest.mark.parametrize("name", ["squared", "decayed"])
def test_gradcheck(name):
    inputs = qkv(1, HEADS, 9, dim=4)
    torch.autograd.gradcheck(
        lambda *x: fastattn.attention(*x, score_mods=[term_of(name)]), inputs, fast_mode=True
    )


@pytest.mark.kernels
def test_packed_sequences_with_dropout_have_indices_of_their_own():
    cumulative = torch.tensor([0, 30, 55], dtype=torch.int32, device=DEVICE)
    q, k, v = (x[0].transpose(0, 1).detach().requires_grad_() for x in qkv(1, HEADS, 55))
    mods = [fastattn.score_mod(relative), fastattn.mask_mod(prefix)]
    seed = torch.tensor([3], device=DEVICE)
    options = {"score_mods": mods, "dropout_p": 0.3, "dropout_seed": seed}
    check(
        (q, k, v),
        lambda *x, **more: fastattn.attention_varlen(*x, cumulative, cumulative, 30, 30, **more),
        **options,
    )


def test_other_values_are_the_same_code(monkeypatch):
    def make(window: int, factor: float, table: torch.Tensor):
        def f(score, b, h, q_idx, kv_idx):
            return torch.where(q_idx - kv_idx < window, score * factor, score) + table[h]

        return fastattn.score_mod(f)

    one, other = make(3, 0.5, torch.ones(2)), make(70, 1.1, torch.ones(16)[::2])
    assert one.name == other.name
    assert (one.integers, other.integers) == ((2, 1, 3), (8, 2, 70))


def test_a_number_that_decides_what_is_computed_is_compiled_in():
    def make(times: int):
        def f(score, b, h, q_idx, kv_idx):
            for _ in range(times):
                score = torch.tanh(score)
            return score

        return fastattn.score_mod(f)

    assert make(1).name != make(2).name


def test_a_term_is_made_once_for_a_function_and_what_it_captures():
    assert fastattn.mask_mod(causal) is fastattn.mask_mod(causal)
    before = fastattn.mask_mod(sliding)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "WINDOW", 5)
        after = fastattn.mask_mod(sliding)
    assert (before.integers, after.integers) == ((9,), (5,))
    assert before.name == after.name


def test_an_object_that_a_function_captures_may_change():
    class Bias:
        def __init__(self) -> None:
            self.table = torch.zeros(3)

        def __call__(self, score, b, h, q_idx, kv_idx):
            return score + self.table[h]

        def make(self) -> Callable:
            return lambda score, b, h, q_idx, kv_idx: score + self.table[h]

    bias = Bias()
    for function in (bias, bias.__call__, bias.make()):
        bias.table = torch.zeros(3)
        before = fastattn.score_mod(function)
        bias.table = torch.zeros(5)
        assert (before.integers, fastattn.score_mod(function).integers) == ((3, 1), (5, 1))


@pytest.mark.kernels
def test_a_captured_tensor_counts_as_it_is():
    table = torch.zeros(HEADS, device=DEVICE)
    term = fastattn.score_mod(lambda score, b, h, q_idx, kv_idx: score * table[h])
    inputs = qkv(1, HEADS, 10)
    check(inputs, score_mods=[term])
    table += SLOPES
    check(inputs, score_mods=[term])


@pytest.mark.kernels
def test_an_index_is_from_the_end_where_it_is_negative():
    check(
        qkv(1, 2, 20),
        score_mods=[fastattn.score_mod(lambda s, b, h, m, n: s + RELATIVE[-1 - h, m - n])],
    )


@pytest.mark.kernels
def test_terms_compile_in_one_graph():
    mods = [term_of("documents"), term_of("decayed")]
    compiled = torch.compile(
        lambda *x: fastattn.attention(*x, score_mods=mods), backend="aot_eager", fullgraph=True
    )
    inputs = qkv(BATCH, HEADS, LENGTH)
    for found, expected in zip(
        results(compiled, inputs).values(),
        results(fastattn.attention, inputs, score_mods=mods).values(),
        strict=True,
    ):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda s, b, h, m, n: s if m > n else -s, "choose by torch.where"),
        (lambda s, b, h, m, n: s + torch.sort(RELATIVE[h]).values[n], "sort"),
        (lambda s, b, h, m, n: s + (2 * RELATIVE)[h, n], "compute that before"),
        (lambda s, b, h, m, n: s + torch.special.i0(s), "is not one of the operations abs, add"),
        (lambda s, b, h, m, n: s + RELATIVE[h], "of shape"),
        (lambda s, b, h: s, "positional arguments"),
    ],
)
def test_what_cannot_be_compiled_says_so(function, message):
    with pytest.raises(TypeError, match=message):
        fastattn.score_mod(function)


def test_the_examples_run():
    assert doctest.testmod(terms, extraglobs={"fastattn": fastattn, "torch": torch}).failed == 0


@pytest.mark.parametrize(
    ("function", "by_numbers"),
    [(causal, False), (documents, True), (of_each_head, True), (neighbourhood, False)],
)
def test_a_term_knows_whether_shards_can_compute_it(function, by_numbers):
    assert fastattn.mask_mod(function).by_numbers is by_numbers
