"""The accuracy rule refuses errors that are planted in the kernels, and no luck passes or fails it.

The errors are those that a rewrite of a kernel might bring: planted in Triton's interpreter, where
every product of tiles goes through one function, or in a kernel's own device functions.
"""

from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch

from fastattn import checking
from fastattn.checking import Change, check_sample, compare_tensors, measure_reference
from fastattn.ops.core.backends import INTERPRETED
from support import DEVICE, OPERATIONS, Operation, Sample

triton = pytest.importorskip("triton")
# The interpreter looks for it beside a jitted function.
tl = pytest.importorskip("triton.language")

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(not INTERPRETED, reason="errors are planted in the interpreter"),
]

LONG_SUMS = {
    "attention": {"q": (1, 1, 96, 96), "k": (1, 1, 96, 96), "v": (1, 1, 96, 96)},
    "attention_varlen": {
        "q": (96, 1, 96),
        "k": (96, 1, 96),
        "v": (96, 1, 96),
        "cu_seqlens_q": lambda device: torch.tensor([0, 96], dtype=torch.int32, device=device),
        "cu_seqlens_k": lambda device: torch.tensor([0, 96], dtype=torch.int32, device=device),
        "max_seqlen_q": 96,
        "max_seqlen_k": 96,
    },
    "decode_attention": {
        "q": (1, 1, 96, 96),
        "k": (1, 1, 96, 96),
        "v": (1, 1, 96, 96),
        "lengths": lambda device: torch.tensor([96], device=device),
    },
    "gated_linear": {"x": (96, 96), "w_gate": (96, 96), "w_up": (96, 96)},
    "grouped_linear": {
        "x": (96, 96),
        "weight": (1, 96, 96),
        "offsets": lambda device: torch.tensor([0, 96], dtype=torch.int32, device=device),
    },
    "linear": {"x": (96, 96), "weight": (96, 96)},
    "linear_cross_entropy": {
        "x": (96, 96),
        "weight": (96, 96),
        "target": lambda device: torch.arange(96, device=device),
        # In a mean the errors of the rows would cancel.
        "reduction": "none",
    },
    "linear_jsd": {
        "x": (96, 96),
        "weight": (96, 96),
        "teacher_x": lambda device: torch.eye(96, device=device),
        "teacher_weight": lambda device: torch.eye(96, device=device),
    },
    "linear_log_prob": {
        "x": (96, 96),
        "weight": (96, 96),
        "target": lambda device: torch.arange(96, device=device),
    },
    "linear_top_k_kl": {
        "x": (96, 96),
        "weight": (96, 96),
        "teacher_ids": lambda device: torch.arange(192, device=device).view(96, 2) % 96,
        "teacher_log_probs": lambda device: torch.full((96, 2), -1.0, device=device),
    },
    "mixture": {
        "x": (96, 96),
        "ids": lambda device: torch.zeros(96, 1, dtype=torch.int64, device=device),
        "weights": (96, 1),
        "w_gate_up": (1, 192, 96),
        "w_down": (1, 96, 96),
    },
    "matmul": {"a": (96, 96), "b": (96, 96)},
}
"""Arguments with sums of so many products that it matters what they are kept in."""

Product = Callable[[Any, Any, Any], Any]


@triton.jit
def leave_as_it_is(tile, factor, TAIL):
    return tile


def plant(monkeypatch: pytest.MonkeyPatch, product: Product) -> None:
    """Make the interpreter compute a @ b + d of tiles by `product`."""
    from triton.runtime import interpreter

    def create_dot(_: Any, a: Any, b: Any, d: Any, *__: Any) -> Any:
        found = product(a.data.astype(d.data.dtype), b.data.astype(d.data.dtype), d.data)
        return interpreter.TensorHandle(found.astype(d.data.dtype), d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def multiply(a: Any, b: Any, d: Any) -> Any:
    return a @ b + d


def drop_a_term(a: Any, b: Any, d: Any) -> Any:
    """The first of the products that an element is the sum of is missing."""
    return a[:, 1:] @ b[1:] + d


def multiply_in_tf32(a: Any, b: Any, d: Any) -> Any:
    """Operands of ten bits, to the nearest."""
    a, b = (
        ((numpy.ascontiguousarray(x).view(numpy.uint32) + 0x1000) & 0xFFFFE000).view(numpy.float32)
        for x in (a, b)
    )
    return a @ b + d


def accumulate_in_float16(a: Any, b: Any, d: Any) -> Any:
    """One product after the other is added to a sum of 16 bits."""
    total = d.astype(numpy.float16)
    for column, row in zip(a.T, b, strict=True):
        total = (total + numpy.outer(column, row)).astype(numpy.float16)
    return total


def failures(operation: Operation, sample: Sample, dtype: torch.dtype) -> list[str]:
    found = check_sample(operation, sample, dtype, str(DEVICE))
    return [comparison.name for comparison in found if not comparison.passed]


@pytest.mark.parametrize("name", LONG_SUMS)
@pytest.mark.parametrize(
    ("product", "dtype"),
    [
        (drop_a_term, torch.float32),
        (drop_a_term, torch.float16),
        (drop_a_term, torch.bfloat16),
        (multiply_in_tf32, torch.float32),
        (accumulate_in_float16, torch.float16),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_planted_error_of_products_is_refused(name, product, dtype, monkeypatch):
    operation = OPERATIONS[name]
    sample = Sample("long sums", **LONG_SUMS[name])
    plant(monkeypatch, multiply)
    assert not failures(operation, sample, dtype)
    plant(monkeypatch, product)
    assert failures(operation, sample, dtype)


def test_a_missing_rescale_is_refused(monkeypatch):
    from fastattn.kernels.attention import forward

    operation = OPERATIONS["attention"]
    assert not failures(operation, operation.samples[1], torch.float32)
    monkeypatch.setattr(forward, "scale_tile", leave_as_it_is)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert "output 0" in failures(operation, operation.samples[1], dtype)


def test_every_op_with_products_is_here():
    """An op whose kernels multiply tiles has to be named above."""
    from triton.runtime import interpreter

    create_dot = interpreter.InterpreterBuilder.create_dot
    found = set()
    for operation in OPERATIONS.values():

        def counting(*args: Any, name: str = operation.name) -> Any:
            found.add(name)
            return create_dot(*args)

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(interpreter.InterpreterBuilder, "create_dot", counting)
            failures(operation, operation.samples[0], torch.float32)
    assert found - {"attention_weights"} == set(LONG_SUMS)


def test_a_reference_that_is_right_by_luck_is_no_yardstick():
    """One number that the reference happens to get exactly does not make half a unit an error."""
    truth = torch.tensor([1.0], dtype=torch.float64)
    lucky, unlucky = truth.float(), torch.tensor([1.0 + 2.0**-22])
    found = torch.tensor([1.0 + 2.0**-22])
    assert not compare_tensors("y", found, [(lucky, truth)], 2.0).passed
    assert compare_tensors("y", found, [(lucky, truth), (unlucky, truth)], 2.0).passed


def test_neighbours_are_near_and_the_same_narrow_and_wide():
    x = torch.randn(1000).bfloat16().requires_grad_()
    found = []

    def run(change: Change) -> dict[str, torch.Tensor]:
        moved = change(x)
        assert moved.requires_grad
        assert moved.is_leaf
        found.append(moved.detach())
        return {"x": moved.detach()}

    measured = measure_reference(run)
    assert len(measured) == 1 + checking.NEIGHBOURS
    for narrow, wide in zip(found[::2], found[1::2], strict=True):
        assert narrow.dtype is torch.bfloat16
        assert torch.equal(narrow.double(), wide)
        # The move, and the rounding after it.
        assert ((wide - x.double()) / x.double()).abs().max() <= checking.DISTANCE + 2.0**-8
    assert torch.equal(found[0], x.detach())
    moved = [not torch.equal(one, x.detach()) for one in found[2::2]]
    assert all(moved)


def test_what_is_no_number_is_not_moved():
    change = Change(neighbour=1)
    ids = torch.arange(5)
    assert change(ids) is ids
    assert change(0.5) == 0.5
    assert change(torch.float16) is torch.float16
    assert Change(wide=True)(torch.float16) is torch.float64
    infinite = torch.tensor([float("-inf"), 0.0, float("nan")])
    assert torch.equal(change(infinite).nan_to_num(7.0), infinite.nan_to_num(7.0))
