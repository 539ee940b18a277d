"""Tensor maps: what a bulk copy must know of a tensor to copy a box of it by coordinates.

The host writes them, 128 opaque bytes each, or a kernel does, field by field. A box lies in shared
memory row by row, its pieces of 16 bytes swizzled: exchanged by the number of the line of 128 bytes
that they lie in, so that a column of them lies in different banks.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .arithmetic import Array
from .parser import PtxError

SIZES = {0: 1, 1: 2, 2: 4, 3: 4, 4: 8, 5: 8, 6: 2, 7: 4, 8: 4, 9: 8, 10: 2, 11: 4, 12: 4}
"""The bytes of an element by the number of its type."""

SWIZZLES = {0: 0, 1: 32, 2: 64, 3: 128}
"""The bytes of a swizzled row by the number of the mode."""

NBYTES = 128
"""The bytes of a tensor map."""

FIRST_ADDRESS = 0x7E00_0000_0000
"""Where the host's maps seem to lie; no tensor does."""


@dataclass(frozen=True)
class TensorMap:
    """A tensor and a box to copy of it, the outermost dimension first.

    Attributes:
        base: The address of the first element.
        size: The bytes of an element.
        shape: How many elements there are; what a box has beyond them is zero.
        strides: The bytes from one to the next along each dimension but the innermost.
        box: How many elements are copied.
        swizzle: The bytes of a swizzled row: 0, 32, 64 or 128.
    """

    base: int
    size: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int

    def __post_init__(self) -> None:
        """Refuse what CUDA refuses."""
        inner = self.box[-1] * self.size
        if self.base % 16 or any(stride % 16 for stride in self.strides):
            raise PtxError(f"a tensor map whose base or strides are no multiples of 16: {self}")
        if max(self.box) > 256 or inner % 16 or (self.swizzle and inner > self.swizzle):
            raise PtxError(f"a tensor map of a box that no GPU takes: {self}")

    @classmethod
    def of_descriptor(cls, descriptor: Any, form: dict[str, Any]) -> TensorMap:
        """The map of a host's TensorDescriptor, in the form that a kernel was compiled for."""
        if descriptor.padding != "zero" or form["fp4_padded"]:
            raise PtxError("this machine fills up with zeros only")
        size = form["elem_size"]
        strides = tuple(stride * size for stride in descriptor.strides[:-1])
        shape, box = tuple(descriptor.shape), tuple(form["block_size"])
        swizzle = SWIZZLES[form["swizzle"]]
        return cls(descriptor.base.data_ptr(), size, shape, strides, box, swizzle)

    @classmethod
    def of_fields(cls, fields: dict[str, dict[int, int]]) -> TensorMap:
        """The map of what a kernel has written, where the innermost dimension is the first."""

        def outermost_first(name: str, count: int) -> tuple[int, ...]:
            return tuple(fields[name][number] for number in reversed(range(count)))

        rank = fields["rank"][0] + 1
        plain = fields["interleave_layout"][0] == 0 and fields["fill_mode"][0] == 0
        if not plain or set(outermost_first("element_stride", rank)) != {1}:
            raise PtxError(f"this machine knows no such tensor map: {fields}")
        return cls(
            fields["global_address"][0],
            SIZES[fields["elemtype"][0]],
            outermost_first("global_dim", rank),
            outermost_first("global_stride", rank - 1),
            outermost_first("box_dim", rank),
            SWIZZLES[fields["swizzle_mode"][0]],
        )

    @property
    def nbytes(self) -> int:
        """The bytes of a box."""
        return int(np.prod(self.box)) * self.size

    def addresses(self, coordinates: Sequence[int]) -> tuple[Array, Array]:
        """The address of each element of the box at some coordinates, and whether there is one."""
        at, inside = np.full((1,) * len(self.box), self.base, np.int64), np.array(True)
        dimensions = zip(self.box, coordinates, self.shape, (*self.strides, self.size), strict=True)
        for number, (count, first, end, stride) in enumerate(dimensions):
            index = np.arange(first, first + count, dtype=np.int64)
            index = index.reshape([-1 if n == number else 1 for n in range(len(self.box))])
            at, inside = at + index * stride, inside & (index >= 0) & (index < end)
        return at.reshape(-1), np.broadcast_to(inside, self.box).reshape(-1)

    def places(self, first: int) -> Array:
        """Where each element lies in shared memory that the box begins at."""
        return _places(first, self.nbytes, self.size, self.swizzle)


@functools.lru_cache(1024)
def _places(first: int, nbytes: int, size: int, swizzle: int) -> Array:
    at = np.arange(first, first + nbytes, size)
    return at ^ (at >> 7 & max(swizzle // 16 - 1, 0)) << 4


class HostMaps:
    """The tensor maps that a launch passes, which are told apart by addresses of nothing.

    Attributes:
        by_address: All of them.
    """

    def __init__(self, forms: Sequence[dict[str, Any]] = ()) -> None:
        self.by_address: dict[int, TensorMap] = {}
        self._forms = list(forms)

    def add(self, descriptor: Any) -> int:
        """The address of the map of the next descriptor among the arguments."""
        number = len(self.by_address)
        if number >= len(self._forms):
            raise PtxError("tensor descriptors, for a target without bulk copies")
        address = FIRST_ADDRESS + NBYTES * number
        self.by_address[address] = TensorMap.of_descriptor(descriptor, self._forms[number])
        return address
