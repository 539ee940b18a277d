"""What a kernel is launched with, held against what it was compiled for.

Triton compiles a kernel for what it sees in the arguments: their types, the values of constants,
and which addresses and integers are divisible by 16. Whoever launches the machine code without
asking Triton again must see the same, or the kernel computes nonsense; so it is checked here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import numpy as np
import torch

from .arithmetic import UNSIGNED, Array
from .parser import Kernel, PtxError
from .tensormap import HostMaps

INTEGERS = {
    "i1": "i1",
    "u1": "u1",
    **{f"{k}{8 * n}": f"{k}{n}" for k in "iu" for n in (1, 2, 4, 8)},
}
"""Triton's types of integers as numpy's; a bool comes as a byte."""

FLOATS = {"fp16": "f2", "fp32": "f4", "f32": "f4", "fp64": "f8"}

POINTERS = {
    "*fp32": torch.float32,
    "*fp16": torch.float16,
    "*bf16": torch.bfloat16,
    "*fp64": torch.float64,
    "*i1": torch.bool,
    "*u8": torch.uint8,
    **{f"*i{width}": getattr(torch, f"int{width}") for width in (8, 16, 32, 64)},
}

Argument = tuple[tuple[int, ...], str, Any]
"""Where an argument stands among tuples in tuples, its Triton type, and its value."""


def flatten(
    types: tuple[Any, ...], values: tuple[Any, ...], path: tuple[int, ...] = ()
) -> Iterator[Argument]:
    """All arguments, those within tuples one by one."""
    for number, (kind, value) in enumerate(zip(types, values, strict=True)):
        if isinstance(kind, tuple):
            yield from flatten(kind, value, (*path, number))
        elif kind.startswith("tensordesc"):
            # A tensor descriptor is passed as a tensor map, its shape, and its strides.
            rank = len(value.shape)
            parts = ("tensormap", *["i32"] * rank, *["i64"] * rank)
            yield from flatten(parts, (value, *value.shape, *value.strides), (*path, number))
        else:
            yield (*path, number), kind, value


def pack(
    kernel: Kernel,
    source: Any,
    values: tuple[Any, ...],
    tensors: list[torch.Tensor],
    report: Callable[[str], None],
    maps: HostMaps | None = None,
    scratch: int = 0,
) -> dict[str, Array]:
    """The bits of every parameter.

    Args:
        kernel: the machine code.
        source: what Triton compiled, with the signature that it saw.
        values: the arguments in the order of the signature.
        tensors: the tensors whose addresses are among them.
        report: is told of arguments that do not fit.
        maps: is given the tensor descriptors.
        scratch: the address of memory that the kernel wants for itself.
    """
    maps = maps or HostMaps()
    arguments = list(flatten(tuple(source.signature.values()), values))
    _check_constants(source, arguments, report)
    passed = [argument for argument in arguments if argument[1] != "constexpr"]
    # Triton adds two addresses of scratch memory, of which no kernel here asks for the second.
    if len(passed) + 2 != len(kernel.parameters):
        raise PtxError(f"{len(passed)} arguments for {len(kernel.parameters) - 2} parameters")
    packed = {name: np.zeros((1, 1), np.uint64) for name, _ in kernel.parameters}
    packed[kernel.parameters[-2][0]] = np.full((1, 1), scratch, np.uint64)
    dtypes = {(tensor.data_ptr(), tensor.dtype) for tensor in tensors}
    for (name, _), (path, kind, value) in zip(kernel.parameters, passed, strict=False):
        if kind == "tensormap":
            packed[name] = np.full((1, 1), maps.add(value), np.uint64)
            continue
        packed[name] = _pack_one(_describe(source, path), kind, value, report)
        address = int(packed[name][0, 0])
        if kind in POINTERS and address and (address, POINTERS[kind]) not in dtypes:
            report(f"argument {_describe(source, path)} is compiled for elements of {kind[1:]}")
        for attribute, amount in source.attrs.get(path, ()):
            if attribute == "tt.divisibility" and int(packed[name][0, 0]) % amount:
                what = f"{value!r:.60} is compiled for multiples of {amount}"
                report(f"argument {_describe(source, path)}: {what}")
    return packed


def _describe(source: Any, path: tuple[int, ...]) -> str:
    name = list(source.signature)[path[0]]
    return name + "".join(f"[{number}]" for number in path[1:])


def _check_constants(source: Any, arguments: list[Argument], report: Callable[[str], None]) -> None:
    names = list(source.signature)
    for path, _, value in arguments:
        key = path if path in source.constants else names[path[0]] if len(path) == 1 else None
        if key not in source.constants:
            continue
        compiled = source.constants[key]
        # An absent tensor comes as None or as the address 0.
        absent = compiled is None and (value is None or (type(value) is int and value == 0))
        if not (absent or compiled is value or compiled == value):
            what = f"{value!r:.60}, compiled for {compiled!r:.60}"
            report(f"argument {_describe(source, path)} is {what}")


def _pack_one(name: str, kind: str, value: Any, report: Callable[[str], None]) -> Array:
    if kind[0] == "*":
        address = value.data_ptr() if isinstance(value, torch.Tensor) else value or 0
        return np.full((1, 1), address, np.uint64)
    if kind in FLOATS:
        number = np.full((1, 1), value, FLOATS[kind])
        return number.view(UNSIGNED[number.itemsize])
    if kind not in INTEGERS:
        raise PtxError(f"argument {name}: this machine takes no {kind}")
    if not isinstance(value, int):
        report(f"argument {name} is {value!r:.60}, compiled for the integer type {kind}")
    target = np.dtype(INTEGERS[kind])
    limits = np.iinfo(target)
    if kind not in ("i1", "u1") and not limits.min <= value <= limits.max:
        report(f"argument {name} is {value!r:.60}, which does not fit the type {kind}")
    mask = (1 << 8 * target.itemsize) - 1
    return np.full((1, 1), int(value) & mask, UNSIGNED[target.itemsize])


def find_tensors(
    source: Any, values: tuple[Any, ...], frame: FrameType | None
) -> list[torch.Tensor]:
    """The tensors among arguments, and those whose addresses are.

    A caller that takes a tensor's address itself has the tensor in one of its variables, or its
    caller has: that is where it is looked for, from `frame` on.
    """
    arguments = list(flatten(tuple(source.signature.values()), values))
    pointers = [value for _, kind, value in arguments if kind[0] == "*" and value is not None]
    tensors = [value for value in pointers if isinstance(value, torch.Tensor)]
    tensors += [value.base for _, kind, value in arguments if kind == "tensormap"]
    wanted = {value for value in pointers if isinstance(value, int) and value}
    while wanted and frame is not None:
        found = [
            tensor
            for tensor in _tensors_in(tuple(frame.f_locals.values()))
            if tensor.device.type == "cpu" and tensor.data_ptr() in wanted
        ]
        tensors += found
        wanted -= {tensor.data_ptr() for tensor in found}
        frame = frame.f_back
    if wanted:
        raise PtxError(f"no tensor of the caller's lies at the address {min(wanted)}")
    return tensors


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors_in(item)
