"""Rotary positions: what each argument means, tables that are too short, and bad arguments."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

import fastattn
from fastattn.ops.core.backends import INTERPRETED
from support import DEVICE, WIDEST, assert_close, same_bits

kernels = pytest.mark.kernels

both_pairings = pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])


def angles(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    turns = torch.randn(shape, dtype=dtype, device=DEVICE)
    return turns.cos(), turns.sin()


def normal(*shape: int, dtype: torch.dtype = WIDEST) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype, device=DEVICE)


def gradient(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    x = x.detach().requires_grad_()
    y = function(x)
    dy = torch.linspace(-1.0, 2.0, y.numel(), dtype=y.dtype, device=y.device).reshape(y.shape)
    return torch.autograd.grad(y, x, dy)[0]


def as_complex(x: torch.Tensor, interleaved: bool) -> torch.Tensor:
    pairs = x.unflatten(-1, (-1, 2)) if interleaved else x.unflatten(-1, (2, -1)).transpose(-1, -2)
    return torch.view_as_complex(pairs.contiguous())


@kernels
@both_pairings
def test_kernels_multiply_complex_numbers(interleaved):
    check_complex("triton", interleaved)


@both_pairings
def test_reference_multiplies_complex_numbers(interleaved):
    check_complex("reference", interleaved)


def check_complex(backend: Any, interleaved: bool) -> None:
    x, (cos, sin) = normal(2, 3, 7, 12), angles(9, 6, dtype=WIDEST)
    with fastattn.backend(backend):
        y = fastattn.apply_rotary(x, cos, sin, interleaved=interleaved, positions=2)
    turned = as_complex(x, interleaved) * torch.complex(cos, sin)[2:]
    assert_close(
        torch.view_as_real(as_complex(y, interleaved)), torch.view_as_real(turned), "rotation"
    )


@kernels
@both_pairings
def test_inverse_undoes_it(interleaved):
    x, tables = normal(2, 3, 7, 16), angles(7, 6, dtype=WIDEST)
    there = fastattn.apply_rotary(x, *tables, interleaved=interleaved)
    back = fastattn.apply_rotary(there, *tables, interleaved=interleaved, inverse=True)
    assert not torch.allclose(there, x)
    assert_close(back, x)


@kernels
@both_pairings
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_columns_that_are_not_turned_keep_their_bits(interleaved, dtype):
    x = normal(2, 3, 7, 37).to(dtype)
    y = fastattn.apply_rotary(x, *angles(7, 5), interleaved=interleaved)
    assert same_bits(y[..., 10:], x[..., 10:])
    assert not torch.equal(y[..., :10], x[..., :10])


@kernels
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_positions_select_rows(dtype):
    x, (cos, sin) = normal(2, 3, 4, 16), angles(11, 8)
    positions = torch.tensor([[10, 0, 3, 3], [1, 2, 9, 0]], dtype=dtype, device=DEVICE)

    def selected(positions: torch.Tensor) -> torch.Tensor:
        return fastattn.apply_rotary(x, cos, sin, positions=positions)

    expected = fastattn.apply_rotary(x, cos[positions.long()], sin[positions.long()])
    assert same_bits(selected(positions), expected)
    # Positions with other strides, and one row of them for all batch entries.
    assert same_bits(selected(positions.t().contiguous().t()), expected)
    assert same_bits(selected(positions[0])[0], expected[0])
    assert same_bits(selected(positions[:1])[0], expected[0])
    assert same_bits(selected(positions[1])[1], expected[1])


@kernels
def test_an_offset_is_the_position_of_the_first_token():
    x, (cos, sin) = normal(2, 3, 4, 16), angles(11, 8)
    expected = fastattn.apply_rotary(x, cos[7:], sin[7:])
    assert same_bits(fastattn.apply_rotary(x, cos, sin, positions=7), expected)


@kernels
@pytest.mark.parametrize(
    "lengths",
    [(5,), (3, 4), (0, 3, 0, 0, 130, 1, 0), tuple(range(20))],
    ids=["one", "two", "empty ones among them", "twenty"],
)
@pytest.mark.parametrize("batched", [False, True])
def test_packed_sequences_are_turned_as_alone(lengths, batched):
    cos, sin = angles(140, 8)
    parts = [normal(2, length, 16) for length in lengths]
    cu_seqlens = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
    packed = torch.cat(parts, dim=1)
    rotary = partial(fastattn.apply_rotary, cos=cos, sin=sin, cu_seqlens=cu_seqlens, positions=2)
    y = rotary(packed[None])[0] if batched else rotary(packed)
    alone = [fastattn.apply_rotary(part, cos, sin, positions=2) for part in parts]
    assert same_bits(y, torch.cat(alone, dim=1))


@kernels
def test_both_at_once_have_the_bits_of_each_alone():
    q, k, tables = normal(2, 9, 33, 16), normal(2, 3, 33, 16), angles(33, 8)
    for both, alone in zip(
        fastattn.apply_rotary_qk(q, k, *tables),
        (fastattn.apply_rotary(q, *tables), fastattn.apply_rotary(k, *tables)),
        strict=True,
    ):
        assert same_bits(both, alone)


@kernels
def test_both_at_once_are_one_launch_in_either_direction(monkeypatch):
    from fastattn.kernels import rotary

    launches = []
    launch = rotary.rotary_kernel.launch
    monkeypatch.setattr(
        rotary.rotary_kernel,
        "launch",
        lambda *args, **arguments: launches.append(1) or launch(*args, **arguments),
    )
    q, k = normal(2, 9, 5, 16).requires_grad_(), normal(2, 3, 5, 16).requires_grad_()
    turned = fastattn.apply_rotary_qk(q, k, *angles(5, 8))
    assert len(launches) == 1
    torch.autograd.backward(turned, [torch.ones_like(x) for x in turned])
    assert len(launches) == 2


@kernels
@pytest.mark.parametrize("dims", [3, 4])
def test_transposed_storage_is_read_in_place_and_kept(dims, monkeypatch):
    x, tables = normal(*(2, 3, 7, 16)[-dims:]), angles(7, 8)
    stored = x.transpose(-3, -2).contiguous().transpose(-3, -2)
    expected = fastattn.apply_rotary(x, *tables)
    assert expected.is_contiguous()
    monkeypatch.setattr(torch.Tensor, "contiguous", None)
    y = fastattn.apply_rotary(stored, *tables)
    dx = gradient(lambda x: fastattn.apply_rotary(x, *tables), stored)
    monkeypatch.undo()
    assert same_bits(y, expected)
    # What a linear layer's product was, it is again, so that nothing has to copy it.
    assert y.transpose(-3, -2).is_contiguous()
    assert dx.transpose(-3, -2).is_contiguous()


@kernels
def test_slices_of_one_product_are_read_in_place():
    product, tables = normal(2, 7, 3, 4, 16), angles(7, 8)
    q, k, _ = product.permute(2, 0, 3, 1, 4)
    for found, expected in zip(
        fastattn.apply_rotary_qk(q, k, *tables),
        fastattn.apply_rotary_qk(q.contiguous(), k.contiguous(), *tables),
        strict=True,
    ):
        assert same_bits(found, expected)


@kernels
def test_tables_with_other_strides():
    x, (cos, sin) = normal(2, 3, 7, 16), angles(7, 8)
    expected = fastattn.apply_rotary(x, cos, sin)
    doubled = [torch.cat((table, table), -1)[..., :8] for table in (cos, sin)]
    across = [table.t().contiguous().t() for table in (cos, sin)]
    for tables in (doubled, across, (cos, across[1])):
        assert same_bits(fastattn.apply_rotary(x, *tables), expected)


@kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_tables_of_any_float_dtype(dtype):
    x, (cos, sin) = normal(2, 3, 7, 16, dtype=torch.float32), angles(7, 8)
    cos, sin = cos.to(dtype), sin.to(dtype)
    y = fastattn.apply_rotary(x, cos, sin)
    assert same_bits(y, fastattn.apply_rotary(x, cos.float(), sin.float()))


FORMS = ["full width", "complex", "conjugate of a conjugate", "complex double"]


def in_form(cos: torch.Tensor, sin: torch.Tensor, form: str, interleaved: bool) -> dict[str, Any]:
    """The tables in another form, with NaN in place of what nobody may use."""
    if form == "complex":
        return {"cos": torch.complex(cos, sin)}
    if form == "complex double":
        return {"cos": torch.complex(cos.double(), sin.double())}
    if form == "conjugate of a conjugate":
        return {"cos": torch.complex(cos, -sin).conj()}
    unused = torch.full_like(cos, torch.nan)
    if interleaved:
        tables = [torch.stack((table, unused), -1).flatten(-2) for table in (cos, sin)]
    else:
        tables = [torch.cat((table, unused), -1) for table in (cos, sin)]
    return {"cos": tables[0], "sin": tables[1], "full_width": True}


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=kernels)])
@both_pairings
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(9, 6), (2, 7, 6), (1, 7, 6)], ids=str)
def test_every_form_of_the_tables_gives_the_same_bits(backend, interleaved, form, shape):
    x = torch.randn(2, 3, 7, 16)
    turns = torch.randn(shape)
    cos, sin = turns.cos(), turns.sin()
    options = {"interleaved": interleaved, "positions": 2 if len(shape) == 2 else None}
    other = {**in_form(cos, sin, form, interleaved), **options}
    x, cos, sin = (tensor.to(DEVICE or "cpu") for tensor in (x, cos, sin))
    other = {k: v.to(x.device) if isinstance(v, torch.Tensor) else v for k, v in other.items()}
    with fastattn.backend(backend):
        expected = fastattn.apply_rotary(x, cos, sin, **options)
        assert same_bits(fastattn.apply_rotary(x, **other), expected)
        both = fastattn.apply_rotary_qk(x, x[:, :1], **other)
        assert same_bits(both[0], expected)
        assert same_bits(both[1], expected[:, :1])
        dx = gradient(lambda x: fastattn.apply_rotary(x, **other), x)
        assert same_bits(dx, gradient(lambda x: fastattn.apply_rotary(x, cos, sin, **options), x))


@kernels
@both_pairings
@pytest.mark.parametrize("form", ["full width", "complex"])
def test_no_form_of_the_tables_is_copied(interleaved, form, monkeypatch):
    from fastattn.kernels import rotary

    tables = in_form(*angles(7, 6), form, interleaved)
    addresses = {table.data_ptr() for table in tables.values() if isinstance(table, torch.Tensor)}
    launch, read = rotary.rotary_kernel.launch, set()

    def spy(*args: Any, **given: Any) -> None:
        read.update(t.data_ptr() for t in (given["cos_view"][0], given["sin_ptr"]) if t is not None)
        launch(*args, **given)

    monkeypatch.setattr(rotary.rotary_kernel, "launch", spy)
    fastattn.apply_rotary(normal(2, 3, 7, 16), interleaved=interleaved, **tables)
    assert read == addresses


@pytest.mark.parametrize("interleaved", [False, True], ids=["Llama", "Cohere"])
def test_tables_of_hugging_face_as_they_are(interleaved):
    pytest.importorskip("transformers")
    if interleaved:
        from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb
    else:
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
    q, k, turns = torch.randn(2, 4, 7, 16), torch.randn(2, 2, 7, 16), torch.randn(2, 7, 8)
    turns = turns.repeat_interleave(2, -1) if interleaved else torch.cat((turns, turns), -1)
    cos, sin = turns.cos(), turns.sin()
    ours = fastattn.apply_rotary_qk(q, k, cos, sin, interleaved=interleaved, full_width=True)
    for found, expected in zip(ours, apply_rotary_pos_emb(q, k, cos, sin), strict=True):
        torch.testing.assert_close(found, expected)


@kernels
@pytest.mark.parametrize("form", ["full width", "complex"])
def test_other_forms_of_the_tables_compile(form):
    torch.compiler.reset()
    x, tables = normal(1, 2, 6, 16, dtype=torch.float32), in_form(*angles(6, 8), form, True)

    def rotary(x: torch.Tensor) -> torch.Tensor:
        return fastattn.apply_rotary(x, interleaved=True, **tables)

    compiled = torch.compile(rotary, fullgraph=True, backend="aot_eager")
    assert same_bits(compiled(x), rotary(x))


def beyond_the_tables(backend: Any) -> None:
    x, (cos, sin) = normal(1, 2, 6, 4), angles(5, 2)
    positions = torch.tensor([0, 5, 4, -1, 2**40, -(2**40)], device=DEVICE)
    with fastattn.backend(backend):
        y = fastattn.apply_rotary(x, cos, sin, positions=positions)
        dx = gradient(lambda x: fastattn.apply_rotary(x, cos, sin, positions=positions), x)
        cu_seqlens = torch.tensor([0, 6], device=DEVICE)
        packed = fastattn.apply_rotary(x, cos, sin, cu_seqlens=cu_seqlens)
    lost = torch.tensor([False, True, False, True, True, True])
    for found in (y, dx):
        assert torch.equal(found.isnan().cpu(), lost[:, None].expand(1, 2, 6, 4))
    assert packed[..., :5, :].isfinite().all()
    assert packed[..., 5, :].isnan().all()


@kernels
def test_kernels_give_nan_beyond_the_tables_and_read_nothing_there():
    beyond_the_tables("triton")


def test_reference_gives_nan_beyond_the_tables():
    beyond_the_tables("reference")


@kernels
def test_compiles_with_positions_and_another_length():
    torch.compiler.reset()
    x, tables = normal(1, 2, 6, 16, dtype=torch.float32), angles(40, 8)

    def rotary(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return fastattn.apply_rotary(x.transpose(1, 2), *tables, positions=positions)

    compiled = torch.compile(rotary, fullgraph=True, backend="aot_eager")
    for length in (6, 9, 13):
        x = normal(1, length, 2, 16, dtype=torch.float32)
        positions = torch.arange(length, device=DEVICE) + 3
        assert same_bits(compiled(x, positions), rotary(x, positions))


@kernels
@pytest.mark.skipif(not INTERPRETED, reason="a mesh of CPUs")
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_shards_of_batch_heads_and_tokens_stay_where_they_are(dim, alone):
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor.debug import CommDebugMode
    from torch.testing._internal.distributed.fake_pg import FakeStore

    q, k, (cos, sin) = normal(2, 4, 6, 8), normal(2, 2, 6, 8), angles(20, 4)
    positions = torch.tensor([[0, 4, 2, 1, 5, 19], [7, 6, 5, 1, 1, 0]])
    place = {0: Shard(0), 1: Replicate(), 2: Shard(1)}[dim]

    def rotary(q: Any, k: Any, *tables: Any, positions: Any) -> tuple:
        if alone:
            return (fastattn.apply_rotary(q, *tables, positions=positions),)
        return fastattn.apply_rotary_qk(q, k, *tables, positions=positions)

    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (2,))
        shards = [
            DTensor.from_local(x.clone(), mesh, [Shard(dim)]).requires_grad_() for x in (q, k)
        ]
        tables = [DTensor.from_local(x, mesh, [Replicate()]) for x in (cos, sin)]
        with CommDebugMode() as communication:
            turned = rotary(
                *shards, *tables, positions=DTensor.from_local(positions, mesh, [place])
            )
            torch.autograd.backward(turned, [torch.ones_like(x) for x in turned])
        assert communication.get_total_counts() == 0
        for found, one in zip(turned, rotary(q, k, cos, sin, positions=positions), strict=True):
            assert isinstance(found, DTensor)
            assert found.placements == (Shard(dim),)
            assert same_bits(found.to_local(), one)
        assert isinstance(shards[0].grad, DTensor)
        assert shards[0].grad.placements == (Shard(dim),)
    finally:
        torch.distributed.destroy_process_group()


def bad(change: dict[str, Any]) -> dict[str, Any]:
    """Arguments of which one is bad."""
    cos, sin = torch.ones(9, 4), torch.ones(9, 4)
    return {"x": torch.randn(2, 3, 7, 8), "cos": cos, "sin": sin, **change}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": 1.0}, TypeError, "x must be a tensor"),
        ({"x": torch.ones(2, 3, 7, 8).int()}, TypeError, "x must be float16"),
        ({"x": torch.randn(7, 8)}, ValueError, r"x must be \(B, H, S, D\) or \(H, S, D\)"),
        ({"cos": torch.ones(9, 4).int()}, TypeError, "cos must be float16"),
        ({"cos": torch.ones(9, 5)}, ValueError, r"sin must have cos's shape \(9, 5\)"),
        (
            {"cos": torch.ones(9, 5), "sin": torch.ones(9, 5)},
            ValueError,
            r"0 < R <= 8 columns of x to turn, got \(9, 5\)",
        ),
        (
            {"cos": torch.ones(6, 4), "sin": torch.ones(6, 4)},
            ValueError,
            r"cos must have a row for each of 7 positions, got \(6, 4\)",
        ),
        ({"positions": 3}, ValueError, "a row for each of 10 positions"),
        ({"positions": -1}, ValueError, "positions must not be negative, got -1"),
        ({"positions": 1.5}, TypeError, "positions must be a tensor or an int, got float"),
        ({"positions": torch.ones(7)}, TypeError, "positions must be a tensor of int32 or int64"),
        (
            {"positions": torch.ones(6, dtype=torch.long)},
            ValueError,
            r"positions must be \(7,\) or \(2, 7\), got \(6,\)",
        ),
        (
            {"cu_seqlens": torch.tensor([0, 7])},
            ValueError,
            "with cu_seqlens all sequences lie in one batch entry",
        ),
        (
            {"x": torch.randn(3, 7, 8), "cu_seqlens": torch.tensor([0])},
            ValueError,
            r"cu_seqlens must be \(sequences \+ 1,\), got \(1,\)",
        ),
        (
            {
                "x": torch.randn(3, 7, 8),
                "cu_seqlens": torch.tensor([0, 7]),
                "positions": torch.arange(7),
            },
            ValueError,
            "positions must be an int or None where cu_seqlens is given",
        ),
        (
            {"cos": torch.ones(2, 6, 4), "sin": torch.ones(2, 6, 4)},
            ValueError,
            r"cos must be \(2 or 1, 7, R/2\)",
        ),
        (
            {"cos": torch.ones(2, 7, 4), "sin": torch.ones(2, 7, 4), "positions": 0},
            ValueError,
            "cos has a row for each token already",
        ),
        (
            {"cos": torch.ones(9, 4, requires_grad=True)},
            ValueError,
            "cos requires a gradient, which rotary tables do not get",
        ),
        ({"sin": torch.ones(9, 4, requires_grad=True)}, ValueError, "sin requires a gradient"),
        (
            {"cos": torch.ones(9, 8), "sin": torch.ones(9, 8)},
            ValueError,
            r"got \(9, 8\); a table of R columns, .* needs full_width=True",
        ),
        (
            {"cos": torch.ones(9, 7), "sin": torch.ones(9, 7), "full_width": True},
            ValueError,
            r"cos must have R columns, an even number, with full_width, got \(9, 7\)",
        ),
        ({"sin": None}, TypeError, "sin must be None beside complex cos, and nowhere else"),
        (
            {"cos": torch.ones(9, 4, dtype=torch.complex64)},
            TypeError,
            "sin must be None beside complex cos, and nowhere else, got a second table",
        ),
        (
            {"cos": torch.ones(9, 4, dtype=torch.complex64), "sin": None, "full_width": True},
            ValueError,
            "full_width must be False for complex cos",
        ),
        (
            {"cos": torch.ones(9, 4, dtype=torch.complex64, requires_grad=True), "sin": None},
            ValueError,
            "cos requires a gradient",
        ),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        fastattn.apply_rotary(**bad(change))


@pytest.mark.parametrize(
    ("k", "message"),
    [
        (torch.randn(2, 1, 6, 8), r"k must have q's shape .* but for the heads"),
        (torch.randn(1, 1, 7, 8), r"k must have q's shape .* but for the heads"),
        (torch.randn(3, 7, 8), r"k must have q's shape .* but for the heads"),
        (torch.randn(2, 1, 7, 8).half(), r"k must be like q, torch\.float32 on cpu"),
    ],
)
def test_keys_that_do_not_fit_are_named(k, message):
    arguments = bad({})
    q = arguments.pop("x")
    with pytest.raises((TypeError, ValueError), match=message):
        fastattn.apply_rotary_qk(q, k, **arguments)


def test_tables_that_learn_are_fine_where_nothing_is_recorded():
    arguments = bad({"cos": torch.ones(9, 4, requires_grad=True)})
    with torch.no_grad():
        fastattn.apply_rotary(**arguments)
