"""matmul: layouts, sizes, broadcasting, splits and persistent programs, and who multiplies."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import fastattn
from fastattn.ops.core import products
from fastattn.ops.core.products import product, uses_cublas
from support import DEVICE, WIDEST, assert_close, same_bits

kernels = pytest.mark.kernels

LAYOUTS = {
    "rows": lambda x: x,
    "columns": lambda x: x.mT.contiguous().mT,
    "slice of rows": lambda x: torch.cat((x, x), -1)[..., 1 : x.shape[-1] + 1].roll(0),
    "slice of columns": lambda x: torch.cat((x, x), -2).mT.contiguous().mT[..., : x.shape[-2], :],
    "every other": lambda x: x.repeat_interleave(2, -1)[..., ::2],
}


def random(*shape: int, dtype: torch.dtype = WIDEST) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=torch.float64).to(dtype)


@kernels
@pytest.mark.parametrize("of_a", LAYOUTS)
@pytest.mark.parametrize("of_b", LAYOUTS)
def test_any_transposition_gives_the_same_bits(of_a, of_b):
    a, b = random(37, 70, dtype=torch.bfloat16), random(70, 50, dtype=torch.bfloat16)
    changed = LAYOUTS[of_a](a), LAYOUTS[of_b](b)
    expected = fastattn.matmul(*(x.contiguous() for x in changed))
    assert same_bits(fastattn.matmul(*changed), expected)


@kernels
@pytest.mark.slow
@pytest.mark.parametrize(
    ("m", "k", "n"), list(itertools.product((0, 1, 33), (0, 1, 33), (0, 1, 33))), ids=str
)
def test_sizes_of_nothing_one_and_odd(m, k, n):
    a, b = random(m, k).requires_grad_(), random(k, n).requires_grad_()
    dout = random(m, n)
    found = fastattn.matmul(a, b)
    expected = a @ b
    assert_close(found, expected)
    for x, y in zip(
        torch.autograd.grad(found, (a, b), dout),
        torch.autograd.grad(expected, (a, b), dout),
        strict=True,
    ):
        assert_close(x, y)


@kernels
@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    batch=st.lists(st.tuples(st.integers(1, 3), st.sampled_from(["both", "a", "b"])), max_size=4),
    sizes=st.tuples(*[st.integers(1, 20)] * 3),
    transposed=st.tuples(st.booleans(), st.booleans()),
)
def test_any_broadcast_of_leading_dimensions(batch, sizes, transposed):
    m, k, n = sizes
    a = random(*(1 if who == "b" else size for size, who in batch), m, k)
    b = random(*(1 if who == "a" else size for size, who in batch), k, n)
    a = a.mT.contiguous().mT if transposed[0] else a
    b = b.mT.contiguous().mT if transposed[1] else b
    a, b = a.requires_grad_(), b.requires_grad_()
    found, expected = fastattn.matmul(a, b), torch.matmul(a, b)
    assert_close(found, expected)
    dout = random(*expected.shape)
    for x, y in zip(
        torch.autograd.grad(found, (a, b), dout),
        torch.autograd.grad(expected, (a, b), dout),
        strict=True,
    ):
        assert_close(x, y)


@kernels
def test_a_batch_of_broadcast_matrices_is_not_copied(monkeypatch):
    from fastattn.kernels.matmul import matmul as kernels

    def refuse(*_: torch.Tensor) -> None:
        raise AssertionError("an operand was copied")

    monkeypatch.setattr(torch.Tensor, "contiguous", refuse)
    a, b = random(2, 1, 20, 30), random(1, 3, 30, 10)
    out = torch.empty(2, 3, 20, 10, device=DEVICE, dtype=WIDEST)
    kernels.launch_product(a.expand(2, 3, 20, 30), b.expand(2, 3, 30, 10), out, "ieee")
    assert_close(out, a @ b)


def launched(a: torch.Tensor, b: torch.Tensor, **changed: Any) -> torch.Tensor:
    from fastattn.kernels.matmul.config import MatmulConfig
    from fastattn.kernels.matmul.matmul import launch_product

    out = torch.empty(a.shape[0], b.shape[1], device=DEVICE, dtype=a.dtype)
    config = MatmulConfig(32, 32, 32, num_warps=4, num_stages=2, **changed)
    launch_product(a, b, out, "ieee", config=config)
    return out


@kernels
@pytest.mark.parametrize("dtype", [WIDEST, torch.bfloat16])
@pytest.mark.parametrize("group_m", [1, 3])
def test_persistent_programs_give_the_same_bits(dtype, group_m):
    a, b = random(150, 70, dtype=dtype), random(70, 100, dtype=dtype)
    plain = launched(a, b)
    assert same_bits(launched(a, b, persistent=True, group_m=group_m), plain)
    assert same_bits(launched(a, b, group_m=group_m), plain)


@kernels
@pytest.mark.parametrize("splits", [2, 4, 16])
def test_splits_are_summed_in_their_order(splits):
    # With steps of 32 along K, 16 splits leave some with nothing to do.
    a, b = random(40, 300), random(300, 33)
    assert_close(launched(a, b, splits=splits), a @ b)
    steps = -(-300 // 32)
    share = -(-steps // splits) * 32
    a, b = a.float(), b.float()
    expected = torch.zeros(40, 33, device=DEVICE)
    for first in range(0, 300, share):
        expected += launched(a[:, first : first + share], b[first : first + share])
    assert same_bits(launched(a, b, splits=splits), expected)
    assert same_bits(launched(a, b, splits=splits, persistent=True), expected)


@kernels
def test_a_split_result_is_rounded_once():
    # Each split alone is far beyond what float16 holds.
    a = torch.full((1, 256), 200.0, device=DEVICE).half()
    b = torch.cat((torch.full((128, 1), 200.0), torch.full((128, 1), -200.0))).to(a)
    assert launched(a, b, splits=2).item() == 0.0


@kernels
def test_rows_do_not_depend_on_their_number_within_a_bucket():
    weight = random(70, 50, dtype=torch.float32)
    x = random(64, 70, dtype=torch.float32)
    whole = fastattn.matmul(x, weight)
    for rows in (33, 40, 63):
        assert same_bits(fastattn.matmul(x[:rows], weight), whole[:rows])


@kernels
def test_the_number_of_tokens_compiles_nothing_anew(monkeypatch):
    from fastattn.kernels.matmul.matmul import linear_weight_gradient, matmul_kernel

    compiled_for = set()
    launch = matmul_kernel.launch

    def recorded(*given: Any, **named: Any) -> None:
        kept = {name: value for name, value in named.items() if name.isupper()}
        compiled_for.add(tuple(sorted(kept.items(), key=str)))
        launch(*given, **named)

    monkeypatch.setattr(matmul_kernel, "launch", recorded)
    weight = random(24, 40)
    for rows in (33, 40, 49, 64):
        x = random(rows, 40)
        dy = fastattn.linear(x, weight)
        assert len(compiled_for) == 1
    compiled_for.clear()
    for rows in (33, 40, 49, 64):
        linear_weight_gradient(random(rows, 24), random(rows, 40), dy.dtype, "ieee")
    assert len(compiled_for) == 1


@kernels
@pytest.mark.parametrize("out_dtype", [None, torch.float32])
@pytest.mark.parametrize("engine", ["kernels", "torch"])
def test_product_rounds_once(out_dtype, engine):
    a, b = random(20, 70, dtype=torch.bfloat16), random(70, 9, dtype=torch.bfloat16)
    found = product(a, b, out_dtype=out_dtype, engine=engine)
    exact = a.double() @ b.double()
    assert found.dtype is (out_dtype or torch.bfloat16)
    tolerance = 2.0**-7 if out_dtype is None else 1e-5
    assert (found.double() - exact).abs().max() <= tolerance * exact.abs().max()


@kernels
@pytest.mark.parametrize("engine", ["kernels", "torch"])
def test_products_accumulate_in_place(engine):
    a, b = random(40, 70, dtype=torch.bfloat16), random(70, 33, dtype=torch.bfloat16)
    start = random(40, 33, dtype=torch.float32)
    total = start.clone()
    found = product(a, b, accumulate_into=total, engine=engine)
    assert found.data_ptr() == total.data_ptr()
    torch.testing.assert_close(found, start + a.float() @ b.float(), rtol=1e-5, atol=1e-4)


@kernels
def test_a_traced_product_accumulates_out_of_place():
    a, b, start = random(5, 7), random(7, 3), random(5, 3)

    def accumulated(a: torch.Tensor, b: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        return product(a, b, accumulate_into=start.clone())

    torch.compiler.reset()
    compiled = torch.compile(accumulated, fullgraph=True, backend="aot_eager")
    assert_close(compiled(a, b, start), start + a @ b)


def test_the_reference_accumulates_in_place():
    a, b, total = torch.randn(5, 7).bfloat16(), torch.randn(7, 3).bfloat16(), torch.ones(5, 3)
    found = product(a, b, accumulate_into=total, engine="torch")
    assert found is total
    torch.testing.assert_close(found, 1.0 + a.float() @ b.float())


def test_products_without_an_epilogue_are_cublas():
    sizes = (4096, 4096, 4096, torch.bfloat16)
    assert uses_cublas(*sizes)
    assert uses_cublas(1, 16, 1, torch.float32)
    assert not uses_cublas(*sizes, epilogue=True)
    assert not uses_cublas(*sizes, out_dtype=torch.float32)
    assert not uses_cublas(*sizes, copies=True)


def test_an_activation_goes_to_cublas_where_many_columns_are_summed():
    assert uses_cublas(16, 64, 2048, torch.bfloat16, activation=True)
    assert not uses_cublas(8192, 8192, 2047, torch.bfloat16, activation=True)
    assert not uses_cublas(16, 64, 2048, torch.bfloat16, activation=True, epilogue=True)


def test_the_backend_decides_before_anything_else(monkeypatch):
    tensor = torch.zeros(1)
    monkeypatch.setattr(products, "INTERPRETED", False)
    monkeypatch.setattr(products, "use_triton", lambda tensor: True)
    assert products.choose_engine(tensor) == "auto"
    with fastattn.backend("triton"):
        assert products.choose_engine(tensor) == "kernels"
    monkeypatch.setattr(products, "use_triton", lambda tensor: False)
    assert products.choose_engine(tensor) == "torch"


@kernels
@pytest.mark.parametrize("allowed", [False, True])
def test_tf32_is_torchs_setting(monkeypatch, allowed):
    from fastattn.kernels.matmul import matmul as kernels

    seen = []
    monkeypatch.setattr(
        kernels, "launch_product", lambda a, b, out, precision, **_: seen.append(precision)
    )
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    try:
        for dtype in (torch.float32, torch.bfloat16):
            fastattn.matmul(random(3, 4, dtype=dtype), random(4, 2, dtype=dtype))
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == ["tf32" if allowed else "ieee", "ieee"]


@pytest.fixture
def two_ranks() -> Iterator[DeviceMesh]:
    """A mesh of two of which this process is the first; nothing can be communicated."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield init_device_mesh("cpu" if DEVICE is None else DEVICE, (2,))
    torch.distributed.destroy_process_group()


@kernels
@pytest.mark.parametrize("shards", ["rows", "columns", "sums", "batch"])
def test_shards_multiply_where_they_are(two_ranks, shards):
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
    from torch.distributed.tensor.debug import CommDebugMode

    a, b = random(3, 4, 6), random(3, 6, 8)
    of_a, of_b, of_out = {
        "rows": (Shard(1), Replicate(), Shard(1)),
        "columns": (Replicate(), Shard(2), Shard(2)),
        "sums": (Shard(2), Shard(1), Partial()),
        "batch": (Shard(0), Shard(0), Shard(0)),
    }[shards]
    with CommDebugMode() as communication:
        found: Any = fastattn.matmul(
            DTensor.from_local(a, two_ranks, [of_a]), DTensor.from_local(b, two_ranks, [of_b])
        )
    assert communication.get_total_counts() == 0
    assert found.placements == (of_out,)
    assert_close(found.to_local(), a @ b)


@pytest.mark.parametrize(
    ("a", "b", "error", "text"),
    [
        ([1.0], torch.ones(1), TypeError, "a must be a tensor"),
        (torch.ones(2, 3), torch.ones(3, 2).long(), TypeError, "b must be float16.*int64"),
        (torch.tensor(1.0), torch.ones(1), ValueError, "a must have at least one dimension"),
        (
            torch.ones(2, 3),
            torch.ones(4, 5),
            ValueError,
            r"b must have 3 rows for an a of shape \(2, 3\), got the shape \(4, 5\)",
        ),
        (torch.ones(3), torch.ones(4), ValueError, "b must have 3 rows"),
        (
            torch.ones(2, 1, 3),
            torch.ones(5, 3, 1),
            ValueError,
            r"broadcast with \(2,\), got \(5,\)",
        ),
        (torch.ones(2, 3), torch.ones(3, 2).half(), TypeError, "b must have a's dtype"),
        (torch.ones(2, 3).double(), torch.ones(3, 2), TypeError, "float64 mixes"),
    ],
)
def test_bad_arguments_are_named(a, b, error, text):
    with pytest.raises(error, match=f"matmul: .*{text}|matmul: {text}"):
        fastattn.matmul(a, b)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((3, 4), (4, 5)),
        ((4,), (4,)),
        ((4,), (2, 4, 5)),
        ((2, 1, 3, 4), (6, 4, 5)),
        ((0, 4), (4, 2)),
    ],
    ids=str,
)
def test_the_reference_is_torch_matmul(a, b):
    a, b = torch.randn(a), torch.randn(b)
    with fastattn.backend("reference"):
        assert same_bits(fastattn.matmul(a, b), torch.matmul(a, b))
