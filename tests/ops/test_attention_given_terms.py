"""What attention's terms are made of: tensors of any strides, objects made once, and their checks.

A term is the same whichever argument it comes by, and whatever the memory layout of its tensors.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from attention_own_terms import Chosen, Slope
from attention_support import (
    FEATURES,
    Options,
    assert_results_close,
    check,
    learned,
    normal,
    qkv,
    random_mask,
    results,
)

import fastattn
from fastattn import BlockMask, RelativeBias
from fastattn.ops.attention.bias_terms import AdditiveBias, Alibi
from fastattn.ops.attention.block_terms import DocumentIds
from fastattn.ops.attention.shapes import layout_name
from fastattn.ops.attention.terms import BooleanMask, KeyLengths, Softcap, WindowLeft
from support import DEVICE, WIDEST, layouts, same_bits

SIZES = (2, 2, 40, 37)


def tensors_of(value: Any) -> list[torch.Tensor]:
    """The tensors of an option, but those of a BlockMask, which makes its own."""
    values = value if isinstance(value, tuple) else (value,)
    values = [x.table if isinstance(x, RelativeBias) else x for x in values]
    return [x for x in values if isinstance(x, torch.Tensor)]


def with_layout(value: Any, layout: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """An option of the same numbers in another layout of memory."""
    if isinstance(value, tuple):
        return tuple(with_layout(x, layout) for x in value)
    if isinstance(value, RelativeBias):
        both = value.table.shape[0] % 2 == 0
        return RelativeBias(layout(value.table), both, max_distance=20)
    return layout(value) if isinstance(value, torch.Tensor) else value


def every_layout() -> Iterator[tuple[str, Callable[[torch.Tensor], torch.Tensor]]]:
    """Layouts by name; each is a function, for it serves several tensors of an option."""
    for layout in ("slice of wider rows", "last stride 2", "transposed", "batch inside"):

        def laid_out(tensor: torch.Tensor, layout: str = layout) -> torch.Tensor:
            found = dict(layouts(tensor.detach())).get(layout, tensor.detach())
            return found.requires_grad_(tensor.requires_grad)

        yield layout, laid_out

    def expanded(tensor: torch.Tensor) -> torch.Tensor:
        one = tensor.detach().flatten()[:1].clone()
        return one.expand(tensor.shape).requires_grad_(tensor.requires_grad)

    yield "expanded", expanded


WITH_TENSORS = [
    name
    for name, make in FEATURES.items()
    if DEVICE is not None and any(map(tensors_of, make(2, 2, 4, 4).values()))
]


@pytest.mark.kernels
@pytest.mark.parametrize("feature", WITH_TENSORS)
def test_tensors_of_any_strides(feature):
    inputs = qkv(*SIZES, 8)
    options = FEATURES[feature](*SIZES)
    for layout, laid_out in every_layout():
        changed = {name: with_layout(value, laid_out) for name, value in options.items()}
        found = results(fastattn.attention, inputs, return_lse=True, **changed)
        with fastattn.backend("reference"):
            expected = results(fastattn.attention, inputs, return_lse=True, **changed)
        try:
            assert_results_close(found, expected)
        except AssertionError as error:
            raise AssertionError(f"{layout}: {error}") from None


@pytest.mark.kernels
@pytest.mark.parametrize("make", [lambda x: Slope(x, 2.0)], ids=["Slope"])
def test_own_terms_of_any_strides(make):
    column = torch.rand(2, 3, device=DEVICE)[:, 1]
    for slopes in (torch.rand(4, device=DEVICE)[::2], column, column[:1].expand(2)):
        check(qkv(*SIZES, 8), score_mods=[make(slopes)])


def test_rows_are_read_together_where_16_divides_all_but_the_last_stride():
    wide = torch.empty(2, 3, 5, 64, device=DEVICE)
    assert layout_name("bias", wide) == "bias of rows"
    assert layout_name("bias", wide[..., :48]) == "bias of rows"
    assert layout_name("bias", wide[..., :50]) == "bias"
    assert layout_name("bias", wide[..., :40].contiguous()) == "bias"
    assert layout_name("bias", wide.mT) == "bias"


@pytest.mark.kernels
def test_what_rows_hold_beyond_a_packed_sequence_counts_nowhere():
    # Sequences of 20 and 9 queries, of 48 and 25 keys: rows are read 16 keys at a time.
    tensors = normal(29, 2, 8), normal(73, 1, 8), normal(73, 1, 12)
    places: Options = {
        "cu_seqlens_q": torch.tensor([0, 20, 29], device=DEVICE).int(),
        "cu_seqlens_k": torch.tensor([0, 48, 73], device=DEVICE).int(),
        "max_seqlen_q": 20,
        "max_seqlen_k": 48,
    }
    mask, bias = random_mask(2, 2, 20, 48), torch.randn(2, 2, 20, 48, device=DEVICE)

    def attended(mask: torch.Tensor, bias: torch.Tensor) -> dict[str, torch.Tensor]:
        options: Options = {"mask": mask, "bias": bias, "return_lse": True}
        return results(fastattn.attention_varlen, tensors, **places, **options)

    expected = attended(mask, bias)
    mask, bias = mask.clone(), bias.clone()
    mask[1, :, :, 25:], bias[1, :, :, 25:] = True, float("nan")
    found = attended(mask, bias)
    assert all(same_bits(found[name], expected[name]) for name in expected)


@pytest.mark.kernels
def test_a_term_that_goes_by_strides_gets_its_tensors_as_they_are():
    class Strided(Chosen):
        by_strides = True

    wide = torch.rand(2, 50, device=DEVICE) < 0.6
    strided = wide.to(torch.uint8)[:, :37]
    assert strided.stride(0) == 50
    check(qkv(*SIZES, 8), score_mods=[Strided(strided)])


def changed_in_place(tensor: torch.Tensor) -> None:
    with torch.no_grad():
        tensor.mul_(-1.5)


def replaced(tensor: torch.Tensor) -> None:
    tensor.data = tensor.data * -1.5


KEPT: dict[str, tuple[Callable[[torch.Tensor], Any], tuple[int, ...], Callable]] = {
    "RelativeBias": (lambda x: RelativeBias(x, max_distance=20), (8, 2), changed_in_place),
    "RelativeBias of another tensor": (
        lambda x: RelativeBias(x, max_distance=20),
        (8, 2),
        replaced,
    ),
    "slopes": (Alibi, (2,), changed_in_place),
    "bias": (AdditiveBias, (2, 40, 37), changed_in_place),
    "one of one's own": (lambda x: Slope(x.detach(), 2.0), (2,), changed_in_place),
}


@pytest.mark.kernels
@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("name", KEPT)
def test_a_term_made_once_follows_its_parameter(name, backend):
    """As in training: backward, a step of the optimizer, and the next call."""
    make, shape, change = KEPT[name]
    parameter, inputs = normal(*shape), qkv(*SIZES, 8)
    term = make(parameter)

    def gradients(term: Any) -> list[torch.Tensor]:
        o = fastattn.attention(*inputs, score_mods=[term])
        wanted = [*inputs, *([parameter] if name != "one of one's own" else [])]
        return [o, *torch.autograd.grad(o.square().sum(), wanted)]

    with fastattn.backend(backend):
        before = gradients(term)
        change(parameter)
        found, expected = gradients(term), gradients(make(parameter))
    assert not torch.equal(found[0], before[0])
    for own, fresh in zip(found, expected, strict=True):
        assert same_bits(own, fresh)


@pytest.mark.kernels
def test_a_block_mask_stays_what_it_was_made_of():
    table = torch.ones(3, 3, dtype=torch.bool, device=DEVICE).tril()
    mask, expected = BlockMask(table, 16), BlockMask(table.clone(), 16)
    table.zero_()
    inputs = qkv(*SIZES, 8)
    for backend in ("triton", "reference"):
        with fastattn.backend(backend):
            found = fastattn.attention(*inputs, block_mask=mask)
            assert same_bits(found, fastattn.attention(*inputs, block_mask=expected))
            assert found.abs().max() > 0.0


@pytest.mark.kernels
@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("listed", [True, False])
def test_documents_differ_by_all_their_bits(backend, listed):
    document = torch.arange(40, device=DEVICE).expand(2, 40) // 9 % 3
    hashes = torch.tensor([7, 7 + 2**32, -(2**63)], device=DEVICE)[document]
    short = torch.tensor([7, 8, 9], dtype=torch.int32, device=DEVICE)[document]
    # Of the three documents of keys, the short numbers of queries name the first.
    expected = {
        "both of 64 bits": (hashes, hashes, document, document),
        "queries of 32": (short, hashes, document, torch.where(document == 0, 0, 5)),
        "keys of 32": (hashes, short, torch.where(document == 0, 0, 5), document),
    }
    options: Options = {} if listed else {"block_mask": BlockMask(document.new_ones(3, 3) > 0, 16)}
    inputs = qkv(2, 1, 40, dim=8)
    for case, (of_queries, of_keys, *small) in expected.items():
        with fastattn.backend(backend):
            found = results(
                fastattn.attention, inputs, document_ids=(of_queries, of_keys), **options
            )
            wanted = results(fastattn.attention, inputs, document_ids=tuple(small), **options)
        for name, value in wanted.items():
            assert same_bits(found[name], value), (case, name)


def table(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.bool)


BAD: list[tuple[str, Any, Callable[[Any], Any]]] = [
    ("softcap", 0.0, Softcap),
    ("softcap", float("nan"), Softcap),
    ("bias", torch.ones(5, 5), AdditiveBias),
    ("bias", torch.ones(5, 6).int(), AdditiveBias),
    ("bias", torch.ones(5, 6, device="meta"), AdditiveBias),
    ("bias", [1.0], AdditiveBias),
    ("relative_bias", RelativeBias(torch.ones(8, 3)), lambda term: term),
    ("relative_bias", RelativeBias(torch.ones(8, 4, device="meta")), lambda term: term),
    ("alibi_slopes", torch.ones(3), Alibi),
    ("alibi_slopes", torch.ones(4, 2), Alibi),
    ("alibi_slopes", torch.ones(4).int(), Alibi),
    ("alibi_slopes", torch.ones(4, device="meta"), Alibi),
    ("alibi_slopes", 1.0, Alibi),
    ("window", -1, WindowLeft),
    ("mask", table(6, 5), BooleanMask),
    ("mask", torch.ones(5, 6), BooleanMask),
    ("mask", torch.ones(5, 6).requires_grad_(), BooleanMask),
    ("mask", table(5, 6).to("meta"), BooleanMask),
    ("mask", [True], BooleanMask),
    ("kv_lengths", torch.ones(3).int(), KeyLengths),
    ("kv_lengths", torch.ones(2), KeyLengths),
    ("kv_lengths", torch.ones(2, device="meta").int(), KeyLengths),
    ("kv_lengths", 3, KeyLengths),
    ("block_mask", BlockMask(table(2, 1), 16), lambda term: term),
    ("block_mask", BlockMask(table(3, 1, 1, 1), 16), lambda term: term),
    ("block_mask", BlockMask(table(1, 1).to("meta"), 16), lambda term: term),
    ("document_ids", (torch.ones(2, 5).int(), torch.ones(2, 5).int()), lambda x: DocumentIds(*x)),
    ("document_ids", (torch.ones(2, 5), torch.ones(2, 6)), lambda x: DocumentIds(*x)),
    ("document_ids", ([1], [2]), lambda x: DocumentIds(*x)),
]


@pytest.mark.parametrize("place", range(len(BAD)))
def test_a_term_is_checked_whichever_argument_it_comes_by(place):
    name, value, make = BAD[place]
    x = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8)
    with pytest.raises((TypeError, ValueError)) as by_argument:
        fastattn.attention(*x, **{name: value})
    term = make(value)
    with pytest.raises((TypeError, ValueError)) as by_term:
        fastattn.attention(*x, score_mods=[term])
    assert by_argument.type is by_term.type
    said = str(by_term.value).replace(f"score_mods: {type(term).__name__}", name)
    assert said == str(by_argument.value)


@pytest.mark.kernels
def test_lists_of_documents_and_of_a_block_mask_in_any_arguments():
    ids = (torch.arange(40, device=DEVICE) // 9).expand(2, 40)
    blocks = BlockMask((torch.rand(3, 3, device=DEVICE) < 0.6), 16)
    inputs = qkv(2, 2, 40, dim=8)
    expected = results(fastattn.attention, inputs, document_ids=ids, block_mask=blocks)
    for options in (
        {"document_ids": ids, "score_mods": [blocks]},
        {"score_mods": [DocumentIds(ids, ids)], "block_mask": blocks},
        {"score_mods": [DocumentIds(ids, ids), blocks]},
        {"score_mods": [DocumentIds(ids, ids), DocumentIds(ids, ids)], "block_mask": blocks},
    ):
        for name, value in results(fastattn.attention, inputs, **options).items():
            assert same_bits(value, expected[name]), name


def test_no_terms_of_ones_own_may_be_none():
    x = torch.randn(1, 2, 5, 8)
    expected = fastattn.attention(x, x, x)
    assert torch.equal(fastattn.attention(x, x, x, score_mods=None), expected)


def test_what_learns_is_found():
    """The helper of these tests sees the table of a RelativeBias, not a view of it."""
    parameter = torch.ones(8, 2, dtype=WIDEST).requires_grad_()
    assert learned({"relative_bias": RelativeBias(parameter)})["relative_bias"] is parameter
