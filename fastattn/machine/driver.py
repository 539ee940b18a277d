"""A Triton driver for a GPU that is not there: kernels are specialised, compiled, and not launched.

With this driver active, calling a public op on CPU tensors makes Triton do everything that a real
call does, argument binding and compilation included, up to the launch itself, which does nothing.
Only hooks that Triton offers are used (the active driver and the compilation listener), so whatever
path a library takes to its launch is the path that is seen.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from ..kernels import private


@dataclass(frozen=True)
class Target:
    """A GPU to compile for: what Triton must know, and what a kernel may use there.

    Attributes:
        name: The name on the command line, such as ``sm_90`` or ``gfx942``.
        gpu: Triton's own description of the target.
        shared_memory: The bytes of shared memory that one block may have.
        multiprocessors: Multiprocessors (compute units) of a common card of this kind.
    """

    name: str
    gpu: GPUTarget
    shared_memory: int
    multiprocessors: int


TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", GPUTarget("cuda", 80, 32), 166_912, 108),
        Target("sm_86", GPUTarget("cuda", 86, 32), 101_376, 82),
        Target("sm_89", GPUTarget("cuda", 89, 32), 101_376, 128),
        Target("sm_90", GPUTarget("cuda", 90, 32), 232_448, 132),
        Target("sm_100", GPUTarget("cuda", 100, 32), 232_448, 148),
        Target("sm_120", GPUTarget("cuda", 120, 32), 101_376, 170),
        Target("gfx942", GPUTarget("hip", "gfx942", 64), 65_536, 304),
        Target("gfx1100", GPUTarget("hip", "gfx1100", 32), 65_536, 96),
    )
}


@dataclass(frozen=True)
class Kernel:
    """One kernel as Triton compiled it: its metadata, and the files of each stage by suffix."""

    name: str
    metadata: dict[str, Any]
    files: dict[str, Path]


class Recorder:
    """Keeps the kernels that were made ready or launched since the last `take`, each once."""

    def __init__(self) -> None:
        self._compiled: dict[str, Kernel] = {}
        self._used: dict[str, Kernel] = {}

    def compiled(
        self, *, metadata: dict[str, Any], metadata_group: dict[str, str], **_: Any
    ) -> None:
        """Remember a kernel and its files (Triton's compilation listener)."""
        files = {Path(path).suffix.lstrip("."): Path(path) for path in metadata_group.values()}
        kernel = Kernel(metadata["name"], metadata, files)
        self._compiled[metadata["hash"]] = kernel

    def used(self, kernel_hash: str, *_launch_arguments: Any) -> None:
        """Note one use of a kernel that has been compiled."""
        self._used[kernel_hash] = self._compiled[kernel_hash]

    def take(self) -> list[Kernel]:
        """Return the kernels used since the last call, in the order of their first use."""
        kernels = list(self._used.values())
        self._used.clear()
        return kernels


class StubDriver(DriverBase):
    """Answers Triton's questions about the device with those of `target`, and launches nothing.

    Without a recorder the launch is an empty function, which is what measuring the host needs.
    """

    def __init__(self, target: Target, recorder: Recorder | None = None) -> None:
        super().__init__()
        self._target = target
        self._recorder = recorder
        self.utils = self

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return self._target.gpu

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        """There is one device."""

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Callable[..., list[float]]:
        """Return what gives every configuration one time, unseen: the first one then wins."""
        return lambda call, **_: [1.0, 1.0, 1.0]

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": self._target.shared_memory,
            "max_num_regs": 65_536,
            "multiprocessor_count": self._target.multiprocessors,
            "warpSize": self._target.gpu.warp_size,
        }

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, ...]:
        """Return a module, a function, registers, spills and the most threads a block may have."""
        return 1, 1, 0, 0, 1024

    def launcher_cls(self, src: Any, metadata: Any) -> Any:
        """Return what Triton calls to launch the kernel."""
        if self._recorder is None:
            return _launch_nothing
        # A kernel that asks for too much shared memory is refused after this point and before its
        # first launch, and must be reported all the same.
        self._recorder.used(metadata.hash)
        return functools.partial(self._recorder.used, metadata.hash)


def _launch_nothing(*_launch_arguments: Any) -> None:
    """Stand in for the launch."""


@contextlib.contextmanager
def stub_driver(target: Target, recorder: Recorder | None = None) -> Iterator[None]:
    """Make the stub the active driver for the length of a `with` block.

    Triton keeps compiled kernels by device index, so a process must use one target only.
    """
    previous = knobs.compilation.listener
    if recorder is not None:
        knobs.compilation.listener = recorder.compiled
    try:
        with private.use_driver(StubDriver(target, recorder)):
            yield
    finally:
        knobs.compilation.listener = previous
