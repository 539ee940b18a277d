"""What kernels are launched with, and whether it is what they were compiled for."""

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from machine_support import write_kernel

from fastattn.machine.arguments import find_tensors, pack
from fastattn.machine.parser import PtxError, parse


def pack_all(
    signature: dict[str, Any],
    values: tuple,
    constants: dict | None = None,
    attrs: dict | None = None,
) -> tuple[list[str], list[int]]:
    """The faults, and the parameters as unsigned integers."""
    source = SimpleNamespace(signature=signature, constants=constants or {}, attrs=attrs or {})
    faults: list[str] = []

    def count(kind: Any) -> int:
        return sum(map(count, kind)) if isinstance(kind, tuple) else kind != "constexpr"

    kernel = parse(write_kernel("", 2 + count(tuple(signature.values()))))
    tensors = find_tensors(source, values, sys._getframe(1))
    packed = pack(kernel, source, values, tensors, faults.append)
    return faults, [int(value[0, 0]) for value in packed.values()][:-2]


def test_all_kinds_of_arguments():
    x = torch.zeros(4)
    signature = {"x_ptr": "*fp32", "rows": "i32", "wide": "i64", "eps": "fp32", "flag": "i1"}
    faults, packed = pack_all(signature, (x, -1, 2**40, 1.0, True))
    assert faults == []
    assert packed == [x.data_ptr(), 2**32 - 1, 2**40, 0x3F800000, 1]
    assert pack_all(signature, (None, 0, 0, 0.0, False)) == ([], [0, 0, 0, 0, 0])


def test_tuples_are_taken_apart():
    x = torch.zeros(4)
    signature = {"x_view": ("*fp32", "i32"), "terms": (("*fp32", "constexpr"), "fp32")}
    values = ((x, 7), ((x.data_ptr(), 3), 0.5))
    faults, packed = pack_all(signature, values, {(1, 0, 1): 3})
    assert faults == []
    assert packed == [x.data_ptr(), 7, x.data_ptr(), 0x3F000000]
    (fault,), _ = pack_all(signature, values, {(1, 0, 1): 4})
    assert fault == "argument terms[0][1] is 3, compiled for 4"


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        ("i32", 2**31, "does not fit the type i32"),
        ("i32", 1.5, "compiled for the integer type i32"),
        ("constexpr", 8, "compiled for 16"),
    ],
)
def test_arguments_that_do_not_fit(kind: str, value: Any, expected: str):
    if isinstance(value, float):
        value = np.float64(value)
    faults, _ = pack_all({"a": kind}, (value,), {(0,): 16} if kind == "constexpr" else None)
    assert any(expected in fault for fault in faults)


def test_what_is_not_divisible_as_it_was():
    attrs = {(0,): [["tt.divisibility", 16]], (1,): [["tt.divisibility", 16]]}
    signature = {"x_ptr": "*fp32", "n": "i32"}
    x = torch.zeros(8)
    assert pack_all(signature, (x, 32), attrs=attrs)[0] == []
    faults, _ = pack_all(signature, (x[1:], 33), attrs=attrs)
    assert ["x_ptr" in faults[0], "n: 33" in faults[1]] == [True, True]


def test_an_argument_too_many():
    kernel = parse(write_kernel("", 4))
    source = SimpleNamespace(signature={"n": "i32"}, constants={}, attrs={})
    with pytest.raises(PtxError, match="1 arguments for 2 parameters"):
        pack(kernel, source, (1,), [], print)


def test_tensors_are_found_by_their_addresses():
    x, y = torch.zeros(4), torch.zeros(8)[2:]
    source = SimpleNamespace(signature={"x_ptr": "*fp32", "y_view": ("*fp32", "i32")})

    def launch(*values: Any) -> list[torch.Tensor]:
        return find_tensors(source, values, sys._getframe(1))

    views = (y, 3)
    found = launch(x.data_ptr(), (views[0].data_ptr(), 3))
    assert [any(t is one for t in found) for one in (x, y)] == [True, True]
    assert launch(x, (None, 3)) == [x]
    with pytest.raises(PtxError, match="no tensor of the caller's lies at the address 12345"):
        launch(x, (12345, 3))


def test_elements_of_another_dtype():
    x = torch.zeros(4, dtype=torch.bfloat16)
    assert pack_all({"x_ptr": "*bf16"}, (x,))[0] == []
    (fault,), _ = pack_all({"x_ptr": "*fp32"}, (x,))
    assert fault == "argument x_ptr is compiled for elements of fp32"
