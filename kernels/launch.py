"""What launchers do on the host: preparing arguments, and starting a kernel at little cost."""

import functools
import inspect
import linecache
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import private
from .config import INTERPRETED

# Triton specialises on whether a pointer is divisible by this.
POINTER_ALIGNMENT = 16

# Launches remembered for a kernel. Feature sizes are few; more than this means that something that
# varies should be named in do_not_specialize.
MOST_HANDLES = 512

MOST_BOUND = 1024
"""Bound launches that whoever binds should keep, for the same reason."""

ON_AMD = torch.version.hip is not None

FUSES = False
"""Whether the compiler may make one operation of a product and a sum. What it fuses hangs on what
stands around them: the bits of one formula would differ between two variants of a kernel, and after
a reduction between the lanes that hold one row. Kernels write `tl.fma` where one is wanted."""

launch_hooks = private.launch_hooks()
"""What profilers ask Triton to call at each launch."""


@functools.cache
def several_gpus() -> bool:
    """Whether the current device may be another than a tensor's."""
    return torch.cuda.device_count() > 1


# The body of every `launch`, with a kernel's own parameters written out: a call then costs no loop
# and no dictionary, which is most of what Triton's own launch spends its time on.
LAUNCH = """
def launch(grid, {settings}, {parameters}):
    {unpacked}
    device = {first}.get_device()
    {other_device}
    key = ({settings_key}device, {key})
    {addresses}
    unaligned = {unaligned}
    handle = handles.get(key)
    if handle is None or unaligned or launch_hooks.calls:
        settings = {{"num_warps": num_warps, "num_stages": num_stages}}
        compiled = jitted[grid]({keywords}, **settings, enable_fp_fusion=FUSES)
        if not unaligned:
            remember(key, compiled)
        return
    run, function, metadata, current_stream = handle
    x, y, z = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
    # No launch metadata and no hooks: there are none, or Triton itself would have launched. From an
    # address it need not ask a tensor and the driver for one.
    run(x, y, z, current_stream(device), function, metadata, None, None, None, {given})
"""


OTHER_DEVICE = """if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(grid, {same})
        return"""


def tuple_key(arguments: tuple) -> tuple:
    """What Triton specialises a tuple on: dtypes and alignment of tensors, the width of integers,
    which are odd (see structures.py), and nothing of floats."""
    return tuple(
        (
            argument.dtype,
            argument.data_ptr() % POINTER_ALIGNMENT,
            ON_AMD and argument.untyped_storage().nbytes() >> 31,
        )
        if isinstance(argument, torch.Tensor)
        else tuple_key(argument)
        if isinstance(argument, tuple)
        else argument >> 31
        if type(argument) is int
        else type(argument)
        for argument in arguments
    )


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

    `launch` takes the grid (one to three numbers, three being fastest), `num_warps`, optionally
    `num_stages`, and all of the kernel's arguments by name. It launches on the device of the
    kernel's first argument, which must be a tensor or a view of one.

    A parameter whose name ends in `_args` is a tuple of tensors, floats, integers and such tuples.
    One whose name ends in `_view` is a view as structures.py has them, of the class that it is
    annotated with or a plain tuple like it, or None. Integers in either are odd, so that Triton
    asks for their width alone.

    Parameters named in `strides` come together, as one tuple of that name: a dozen keywords take
    longer than all else about a launch.

        @functools.partial(launchable, strides=("stride_xm", "stride_ym"))
    """

    def __init__(self, jitted: Any, strides: Sequence[str] = ()) -> None:
        self.jitted = jitted
        self.strides = strides
        self.__name__ = jitted.__name__
        self.__doc__ = jitted.__doc__
        self._handles: dict[tuple, Any] = {}

    @functools.cached_property
    def launch(self) -> Callable[..., None]:
        """Launch the kernel, see above."""
        return self._interpret if INTERPRETED else self._write_launch(self._handles)

    @functools.cached_property
    def parameters(self) -> frozenset[str]:
        """The names of the kernel's arguments."""
        return frozenset(inspect.signature(self.jitted.fn).parameters)

    @functools.cached_property
    def view_classes(self) -> dict[str, Any]:
        """The classes of the kernel's views, by their names."""
        annotations = self.jitted.fn.__annotations__
        return {name: annotations[name] for name in annotations if name.endswith("_view")}

    def bind(
        self, num_warps: int, num_stages: int = 3, fresh: Sequence[str] = (), **constants: Any
    ) -> Callable[..., None]:
        """`launch` with the settings and some arguments, but no tensors, given for good.

        What is given here is neither passed nor looked at again, which for a kernel of many
        arguments is most of a launch. Whoever binds remembers the result.

        Args:
            num_warps: as in `launch`.
            num_stages: as in `launch`.
            fresh: pointers or views that no launch looks at: always of memory just allocated, which
                is aligned, and of a dtype, or None, as follows from the constants, from what
                whoever binds remembers the result by, and from the other pointers.
            **constants: arguments by name.
        """
        if INTERPRETED:
            return functools.partial(self._interpret, num_warps=num_warps, **constants)
        constants |= {"num_warps": num_warps, "num_stages": num_stages}
        return self._write_launch({}, constants, fresh)

    def _interpret(self, grid: tuple[int, ...], num_warps: int, **arguments: Any) -> None:
        arguments.pop("num_stages", None)
        if self.strides:
            arguments |= zip(self.strides, arguments.pop("strides"), strict=True)
        for name, view_class in self.view_classes.items():
            if arguments[name] is not None:
                arguments[name] = view_class._make(arguments[name])
        self.jitted[grid](**arguments)

    def _write_launch(
        self,
        handles: dict[tuple, Any],
        constants: dict[str, Any] | None = None,
        fresh: Sequence[str] = (),
    ) -> Callable[..., None]:
        names = [parameter.name for parameter in self.jitted.params]
        constant = constants or {}
        passed = [name for name in names if name not in constant and name not in self.strides]
        # Each view as local variables: first its tensor, then its strides.
        views = {
            name: [f"{name}_{field}" for field in self.view_classes[name]._fields]
            for name in passed
            if name in self.view_classes
        }
        tensors = {name: name for name in passed if name.endswith("_ptr")}
        tensors |= {name: fields[0] for name, fields in views.items()}
        unpacked = [
            f"{', '.join(fields)} = {(None, *[3] * len(fields[1:]))} if {name} is None else {name}"
            for name, fields in views.items()
        ]
        if self.strides:
            passed.append("strides")
            unpacked.append(f"{', '.join(self.strides)}, = strides")
        key, integers = [], []
        for parameter in self.jitted.params:
            name = parameter.name
            if name in views:
                integers += views[name][1:]
            if name in constant or name in fresh:
                continue
            if name in tensors:
                key.append(f"None if {tensors[name]} is None else {tensors[name]}.dtype")
            elif name.endswith("_args"):
                key.append(f"{name} and tuple_key({name})")
            elif parameter.is_constexpr or not parameter.do_not_specialize:
                key.append(name)
            else:
                integers.append(name)
        if integers:
            # Together first: hardly ever does one of them need more than 32 bits.
            widths = ", ".join(f"{name} >> 31" for name in integers)
            key.append(f"({' | '.join(integers)}) >> 31 and ({widths},)")
        if ON_AMD:
            # There Triton addresses tensors of up to 2 GiB by 32-bit offsets.
            key += [
                f"{tensor} is not None and {tensor}.untyped_storage().nbytes() >> 31"
                for tensor in tensors.values()
            ]
        same = [f"{name}={name}" for name in passed]
        if constants is None:
            same += ["num_warps=num_warps", "num_stages=num_stages"]
        looked_at = [f"{name}_at" for name in tensors if name not in fresh]
        alignment = f"gcd(POINTER_ALIGNMENT, {', '.join(looked_at)}) != POINTER_ALIGNMENT"
        given = {name: f"{name}_at" for name in tensors}
        given |= {
            name: f"{name} and ({name}_at, {', '.join(fields[1:])})"
            for name, fields in views.items()
        }
        source = LAUNCH.format(
            settings="*" if constants else "num_warps, *, num_stages=3",
            settings_key="" if constants else "num_warps, num_stages, ",
            parameters=", ".join(passed),
            unpacked="; ".join(unpacked),
            first=tensors[names[0]],
            other_device=OTHER_DEVICE.format(same=", ".join(same)) if several_gpus() else "",
            keywords=", ".join(
                f"{name}={name} and {name}_class._make({name})"
                if name in views
                else f"{name}={name}"
                for name in names
            ),
            key=", ".join(key),
            addresses="; ".join(
                f"{name}_at = 0 if {tensor} is None else {tensor}.data_ptr()"
                for name, tensor in tensors.items()
            ),
            unaligned=alignment if looked_at else "False",
            given=", ".join(given.get(name, name) for name in names),
        )
        scope = {
            **constant,
            **{f"{name}_class": self.view_classes[name] for name in views},
            "FUSES": FUSES,
            "POINTER_ALIGNMENT": POINTER_ALIGNMENT,
            "gcd": math.gcd,
            "handles": handles,
            "jitted": self.jitted,
            "launch_hooks": launch_hooks,
            "remember": functools.partial(self._remember, handles),
            "torch": torch,
            "tuple_key": tuple_key,
        }
        # Under a name by which tracebacks and debuggers find its lines.
        file = f"<launch of {self.__name__}, {zlib.crc32(source.encode()):08x}>"
        linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file
        exec(compile(source, file, "exec"), scope)
        return scope["launch"]

    @staticmethod
    def _remember(handles: dict[tuple, Any], key: tuple, compiled: Any) -> None:
        if len(handles) >= MOST_HANDLES:
            handles.clear()
        handles[key] = private.launch_handle(compiled)


def flatten_rows(x: torch.Tensor, cols: int) -> tuple[torch.Tensor, int]:
    """`x` (..., cols) as rows that a kernel can walk with one stride: (tensor, row stride).

    Rows with a unit last stride and a common distance are read in place, whatever that distance.
    Other layouts are copied once.
    """
    if x.is_contiguous():
        return x, cols
    rows = x.reshape(-1, cols)
    if rows.stride(1) != 1 and cols > 1:
        rows = rows.contiguous()
    return rows, rows.stride(0)


def empty_rows(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised contiguous tensor shaped like x."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def prepare_rows(
    x: torch.Tensor, cols: int, dtype: torch.dtype
) -> tuple[torch.Tensor, int, torch.Tensor]:
    """`flatten_rows(x, cols)` and `empty_rows(x, dtype)`, faster than both for the usual x."""
    if not x.is_contiguous():
        return *flatten_rows(x, cols), empty_rows(x, dtype)
    return x, cols, torch.empty_like(x) if x.dtype is dtype else torch.empty_like(x, dtype=dtype)


Allocate = Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], torch.Tensor]
"""Makes an uninitialised tensor of a shape, strides and dtype."""


@functools.cache
def allocator(device: torch.device) -> Allocate:
    """The fastest `torch.empty_strided` on a device: past PyTorch's dispatcher, in half the time.

    Inductor's code allocates its tensors so.
    """
    if device.type == "cpu" or (device.type == "cuda" and not several_gpus()):
        return private.unseen_allocation(device.type)
    return lambda shape, strides, dtype: torch.empty_strided(
        shape, strides, dtype=dtype, device=device
    )


@functools.lru_cache(MOST_BOUND)
def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a contiguous tensor of this shape."""
    strides, stride = [], 1
    for size in reversed(shape):
        strides.append(stride)
        stride *= max(size, 1)
    return tuple(reversed(strides))


common_divisor = functools.partial(math.gcd, 16)
"""The largest power of two up to 16 that divides all sizes, for `divisible`."""


def dropout_scalars(p: float) -> tuple[int, float]:
    """The threshold that `dropout_keep` compares with, and the scale of what is kept."""
    return int(p * 2**31), 1.0 / (1.0 - p)
