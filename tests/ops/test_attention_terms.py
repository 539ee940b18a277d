"""Score terms and masks of one's own, and what is said of those that lack something."""

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from attention_own_terms import (
    Band,
    Chosen,
    Slope,
    Square,
    Squashed,
    pairs_of_terms,
    square_backward,
    square_score,
    squashed_backward,
    squashed_score,
)
from attention_support import (
    assert_results_close,
    check,
    qkv,
    random_mask,
    results,
    second_derivatives,
)

import fastattn
from fastattn import MaskTerm, ScoreTerm
from fastattn.terms import MaskFunctions, ScoreFunctions
from support import DEVICE, same_bits

kernels = pytest.mark.kernels


@kernels
@pytest.mark.parametrize("name", pairs_of_terms())
def test_terms_of_ones_own_do_what_the_librarys_do(name):
    options, own = pairs_of_terms()[name]
    tensors = qkv(2, 2, 20, 40, 8, key_heads=1)
    found = results(fastattn.attention, tensors, score_mods=own, return_lse=True)
    expected = results(fastattn.attention, tensors, **options, return_lse=True)
    assert_results_close(found, expected)
    check(tensors, score_mods=own)


@kernels
def test_terms_of_ones_own_beside_the_librarys():
    check(
        qkv(2, 2, 20, 40, 8, key_heads=1),
        score_mods=[Square(), Band(25, 3)],
        softcap=2.0,
        causal=True,
        mask=random_mask(2, 1, 20, 40),
    )


@kernels
def test_terms_of_ones_own_in_packed_sequences():
    cumulative = torch.tensor([0, 20, 20, 35], dtype=torch.int32, device=DEVICE)
    tensors = [
        x.detach()[0].transpose(0, 1).requires_grad_() for x in qkv(1, 2, 35, dim=8, key_heads=1)
    ]
    packed = (cumulative, cumulative, 20, 20)

    def attention(*tensors: torch.Tensor, **options: Any) -> Any:
        return fastattn.attention_varlen(*tensors, *packed, **options)

    check(tensors, attention, score_mods=[Square(), Band(9, 3)])


@kernels
def test_derivatives_of_gradients_go_through_terms_of_ones_own():
    tensors = qkv(1, 2, 20, 40, 8)
    options = {"score_mods": [Square(), Band(9, 3)], "return_lse": True}
    found = second_derivatives(fastattn.attention, tensors, **options)
    with fastattn.backend("reference"):
        expected = second_derivatives(fastattn.attention, tensors, **options)
    assert_results_close(found, expected)


@kernels
@pytest.mark.slow
@pytest.mark.parametrize("needs_gradient", [False, True])
def test_terms_of_ones_own_compile(needs_gradient):
    torch.compiler.reset()
    tensors = [x.requires_grad_(needs_gradient) for x in qkv(1, 2, 40)]
    table = random_mask(1, 40).to(torch.uint8)

    def attention(*tensors: torch.Tensor, table: torch.Tensor, reach: int) -> torch.Tensor:
        mods = [Square(), Band(reach, 3), Chosen(table)]
        return fastattn.attention(*tensors, score_mods=mods)

    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    for reach in (20, 9):
        expected = attention(*tensors, table=table, reach=reach)
        assert same_bits(compiled(*tensors, table=table, reach=reach), expected)


@kernels
def test_a_class_of_the_same_name_has_its_own_functions():
    def define(function: Any, backward: Any) -> ScoreTerm:
        class Again(ScoreTerm):
            floats = (0.75,)

            @classmethod
            def triton_functions(cls) -> Any:
                return ScoreFunctions(function, backward)

        return Again()

    tensors = qkv()
    first = fastattn.attention(*tensors, score_mods=[define(squashed_score, squashed_backward)])
    second = fastattn.attention(*tensors, score_mods=[define(square_score, square_backward)])
    assert same_bits(first, fastattn.attention(*tensors, score_mods=[Squashed(0.75)]))
    assert not torch.allclose(first, second)


@kernels
def test_terms_may_have_many_integers():
    tensors = qkv()
    many = fastattn.attention(*tensors, score_mods=[Band(9, 4)] * 13)
    assert same_bits(many, fastattn.attention(*tensors, score_mods=[Band(9, 4)]))


@triton.jit
def bits_keep(m, n, place, args):
    return (args[0].to(tl.int64) >> n) & 1 != 0


class Bits(MaskTerm):
    """Each key is seen that has a bit of an integer."""

    def __init__(self, integer: int) -> None:
        self.integers = (integer,)

    @classmethod
    def triton_functions(cls) -> Any:
        return MaskFunctions(bits_keep)


@kernels
@pytest.mark.parametrize("integer", [-(2**63), -(2**62) - 9, -(2**31), -1, 1, 2**31, 2**63 - 1])
def test_integers_come_with_all_their_bits(integer):
    q, k, v = qkv(1, 1, 20, 64, 8)
    mask = torch.tensor([bool(integer >> n & 1) for n in range(64)], device=DEVICE)
    found = fastattn.attention(q, k, v, score_mods=[Bits(integer)])
    assert torch.equal(found, fastattn.attention(q, k, v, mask=mask))


class Silent(ScoreTerm):
    """A term without anything."""


class SilentMask(MaskTerm):
    """A mask without anything."""


class Misled(ScoreTerm):
    """A term whose functions are not what they should be."""

    @classmethod
    def triton_functions(cls) -> Any:
        return (1, 2)


@kernels
@pytest.mark.parametrize(
    ("terms", "error", "message"),
    [
        ([Silent()], TypeError, r"Silent must define triton_functions\(\) or name its functions"),
        ([SilentMask()], TypeError, r"SilentMask must define triton_functions\(\) or name"),
        (
            [Misled()],
            TypeError,
            r"Misled must return ScoreFunctions or MaskFunctions, got \(1, 2\)",
        ),
    ],
)
def test_what_a_term_lacks_is_said(terms, error, message):
    with pytest.raises(error, match=message):
        fastattn.attention(*qkv(), score_mods=terms)


@pytest.mark.parametrize(
    ("mods", "error", "message"),
    [
        ([Silent()], TypeError, r"Silent must define score\(\)"),
        ([SilentMask()], TypeError, r"SilentMask must define keep\(\)"),
        (Silent(), TypeError, "score_mods must be a sequence of terms, got <"),
        ([torch.tanh], TypeError, "tanh cannot be compiled into the kernels"),
        (
            [Slope(torch.ones(2, requires_grad=True), 1.0)],
            ValueError,
            "score_mods: a tensor of Slope must not require a gradient",
        ),
        (
            [Slope(torch.ones(2, device="meta"), 1.0)],
            ValueError,
            "score_mods: a tensor of Slope must be on cpu, got meta",
        ),
    ],
)
def test_bad_terms_are_named(mods, error, message):
    x = torch.randn(1, 2, 5, 8)
    with fastattn.backend("reference"), pytest.raises(error, match=message):
        fastattn.attention(x, x, x, score_mods=mods)
