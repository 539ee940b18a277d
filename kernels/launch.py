"""What launchers do on the host: preparing arguments, and starting a kernel at little cost."""

import functools
import math
from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import torch
import triton

from .config import INTERPRETED, device_target

# Triton specialises on whether a pointer is divisible by this.
POINTER_ALIGNMENT = 16

# Launches remembered for a kernel. Feature sizes are few; more than this means that something that
# varies should be named in do_not_specialize.
MOST_HANDLES = 512

launch_hooks = triton.knobs.runtime.launch_enter_hook
"""What profilers ask Triton to call at each launch."""


@functools.cache
def several_gpus() -> bool:
    """Whether the current device may be another than a tensor's."""
    return torch.cuda.device_count() > 1


class launchable:
    """A jitted kernel whose repeated launches skip Triton's binding of arguments.

    Triton looks at every argument of every launch to find the machine code that fits, which takes
    longer than most kernels here run. This remembers the compiled kernel by what Triton would have
    looked at: the dtypes of pointers, the values of constexprs and specialised integers, and the
    width of the others. Unaligned pointers, and whatever has not been launched yet, go through
    Triton itself.

        @launchable
        @triton.jit(do_not_specialize=["rows"])
        def some_kernel(x_ptr, rows, BLOCK: tl.constexpr): ...

        some_kernel.launch((programs,), num_warps=4, x_ptr=x, rows=rows, BLOCK=64)
    """

    def __init__(self, jitted: Any) -> None:
        self.jitted = jitted
        self.__name__ = jitted.__name__
        self.__doc__ = jitted.__doc__
        self._handles: dict[tuple, Any] = {}
        if INTERPRETED:
            return
        places: dict[str, list[int]] = {"pointers": [], "values": [], "widths": []}
        for place, parameter in enumerate(jitted.params):
            if parameter.name.endswith("_ptr"):
                places["pointers"].append(place)
            elif parameter.is_constexpr or not parameter.do_not_specialize:
                places["values"].append(place)
            else:
                places["widths"].append(place)
        self._names = tuple(parameter.name for parameter in jitted.params)
        self._pointers = _getter(places["pointers"])
        self._values = _getter(places["values"])
        self._widths = _getter(places["widths"])

    def launch(
        self, grid: tuple[int, ...], num_warps: int, num_stages: int = 3, **arguments: Any
    ) -> None:
        """Launch on the device of the first argument, which must be a tensor.

        Args:
            grid: programs along each axis, one to three.
            num_warps: warps of a program.
            num_stages: stages of software pipelining.
            arguments: all of the kernel's, by name, in its own order.
        """
        if INTERPRETED:
            self.jitted[grid](**arguments)
            return
        given = tuple(arguments.values())
        device = given[0].device
        if several_gpus() and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                self.launch(grid, num_warps, num_stages, **arguments)
            return
        pointers = self._pointers(given)
        address = 0
        for pointer in pointers:
            if pointer is not None:
                address |= pointer.data_ptr()
        key = (
            num_warps,
            num_stages,
            device.index,
            self._values(given),
            *[number >> 31 for number in self._widths(given)],
            *[None if pointer is None else pointer.dtype for pointer in pointers],
            *self._storage_classes(device, pointers),
        )
        handle = self._handles.get(key)
        if handle is None or address % POINTER_ALIGNMENT or launch_hooks.calls:
            compiled = self.jitted[grid](**arguments, num_warps=num_warps, num_stages=num_stages)
            if address % POINTER_ALIGNMENT == 0:
                self._remember(key, compiled, tuple(arguments))
            return
        run, function, metadata, current_stream = handle
        x, y, z = (*grid, 1, 1)[:3]
        stream = current_stream(device.index or 0)
        # No launch metadata and no hooks: there are none, or Triton itself would have launched.
        run(x, y, z, stream, function, metadata, None, None, None, *given)

    def _remember(self, key: tuple, compiled: Any, names: tuple[str, ...]) -> None:
        if names != self._names:
            raise TypeError(f"{self.__name__}: expected the arguments {self._names}, in this order")
        if len(self._handles) >= MOST_HANDLES:
            self._handles.clear()
        stream_of = triton.runtime.driver.active.get_current_stream
        self._handles[key] = compiled.run, compiled.function, compiled.packed_metadata, stream_of

    def _storage_classes(self, device: torch.device, pointers: tuple) -> tuple[int, ...]:
        """On AMD, Triton addresses tensors of up to 2 GiB by 32-bit offsets, so sizes matter."""
        if device_target(device.index or 0).backend != "hip":
            return ()
        return tuple(p.untyped_storage().nbytes() >> 31 for p in pointers if p is not None)


def rows_of(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """`x` (..., cols) as rows that a kernel can walk with one stride: (tensor, row stride).

    Rows with a unit last stride and a common distance are read in place, whatever that distance.
    Other layouts are copied once.
    """
    cols = x.shape[-1]
    if x.is_contiguous():
        return x, cols
    rows = x.reshape(-1, cols)
    if rows.stride(1) != 1 and cols > 1:
        rows = rows.contiguous()
    return rows, rows.stride(0)


def empty_rows(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised contiguous tensor shaped like x, by the cheapest call there is."""
    if x.dtype is dtype and x.is_contiguous():
        return torch.empty_like(x)
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def common_divisor(*sizes: int) -> int:
    """The largest power of two up to 16 that divides all sizes, for `divisible`."""
    return math.gcd(16, *sizes)


def dropout_scalars(p: float) -> tuple[int, float]:
    """The threshold that `dropout_keep` compares with, and the scale of what is kept."""
    return int(p * 2**31), 1.0 / (1.0 - p)


def _getter(places: Sequence[int]) -> Any:
    """A function from all arguments to the tuple of those at `places`."""
    if len(places) > 1:
        return itemgetter(*places)
    return lambda given: tuple(given[place] for place in places)
