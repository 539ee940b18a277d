"""A Triton driver whose GPU is this machine.

    with execute("sm_90") as execution:
        y = fastattn.rms_norm(x, weight)  # compiled for sm_90, and run here on CPU tensors
    execution.reports                     # faults that did not show in numbers

Triton does what it does for a GPU, down to the launch, save that its compiler stops at PTX.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from triton import knobs

from ..kernels import private
from . import (  # noqa: F401 (handlers)
    arguments,
    bulk,
    control,
    cta,
    group,
    movement,
    products,
    scalar,
)
from .driver import TARGETS, StubDriver, Target
from .memory import Memory
from .parser import Instruction, Kernel, PtxError, parse
from .schedule import DEFAULT_SCHEDULE, Schedule
from .tensormap import NBYTES, HostMaps
from .translator import Translator
from .variation import Variation

MACHINE_TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_120")
"""The targets whose instructions this machine knows."""


@dataclass
class Execution:
    """What has been executed, and what was found.

    Attributes:
        variation: How to compute what PTX leaves open, see there.
        schedule: In which order warps run, where they are run one by one.
        reports: Faults that did not stop a kernel, each once.
        notes: What the compiler does though PTX does not promise it to work, each once.
        launches: How often each kernel was launched.
        seconds: How long each kernel ran here.
        programs: What was executed last for each kernel, by its PTX.
        edit: Is given the PTX of each kernel and returns what is executed instead.
    """

    variation: Variation | None = None
    schedule: Schedule = DEFAULT_SCHEDULE
    reports: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    launches: Counter[str] = field(default_factory=Counter)
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    programs: dict[str, Translator] = field(default_factory=dict)
    edit: Callable[[str], str] | None = None

    def report(self, text: str) -> None:
        """Note a fault."""
        if text not in self.reports:
            self.reports.append(text)

    def note(self, text: str) -> None:
        """Note what is no fault of the kernel's."""
        if text not in self.notes:
            self.notes.append(text)


class Loaded:
    """A kernel as `load_binary` returns it: its PTX, which stands in for machine code."""

    def __init__(self, text: str, shared_bytes: int) -> None:
        self.text, self.shared_bytes = text, shared_bytes
        self._key: Any = None
        self._program: Translator | None = None

    def program(self, execution: Execution) -> Translator:
        """The kernel's steps, as an execution wants them."""
        text = execution.edit(self.text) if execution.edit else self.text
        if self._program is None or self._key != (text, execution.variation):
            self._program = Translator(parse(text), execution.variation)
            self._key = text, execution.variation
        return self._program


class MachineDriver(StubDriver):
    """Answers Triton as a GPU's driver would, and runs what it launches."""

    def __init__(self, target: Target, execution: Execution) -> None:
        super().__init__(target)
        self.execution = execution

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        """Return a module, a function, registers, spills and the most threads a block may have."""
        return 1, Loaded(binary.decode(), shared), 0, 0, 1024

    def launcher_cls(self, src: Any, metadata: Any) -> Any:
        """Return what Triton calls to launch the kernel."""

        def launch(
            x: int, y: int, z: int, stream: int, loaded: Loaded, packed: Any,
            launch_metadata: Any, enter: Any, leave: Any, *values: Any,
        ) -> None:  # fmt: skip
            # Triton keeps launchers for the life of the process, and drivers come and go.
            driver = private.triton_driver()
            if not isinstance(driver, MachineDriver):
                raise RuntimeError("this kernel was compiled for fastattn.machine, which has ended")
            if enter is not None:
                enter(launch_metadata)
            tensors = arguments.find_tensors(src, values, sys._getframe(1))
            run(driver.execution, loaded, src, (x, y, z), values, tensors, metadata)
            if leave is not None:
                leave(launch_metadata)

        return launch


def run(
    execution: Execution,
    loaded: Loaded,
    source: Any,
    grid: tuple[int, int, int],
    values: tuple[Any, ...],
    tensors: list[torch.Tensor],
    metadata: Any,
) -> None:
    """Launch a kernel.

    Its warps are run one by one, as the schedule says, if they do not all do the same
    (`Kernel.by_warp`), and else in lockstep.
    """
    started = time.perf_counter()
    program = execution.programs[loaded.text] = loaded.program(execution)
    kernel = program.kernel
    order = f" (--schedule {execution.schedule})" if kernel.by_warp else ""

    def report(text: str) -> None:
        execution.report(f"{kernel.name}: {text}")

    def report_at(i: Instruction, text: str) -> None:
        report(f"{i.place}: {text}: {i}{order}")

    def note_at(i: Instruction, text: str) -> None:
        execution.note(f"{kernel.name}: {i.place}: {text}: {i}")

    try:
        if not (0 <= grid[0] < 2**31 and 0 <= grid[1] < 2**16 and 0 <= grid[2] < 2**16):
            raise PtxError(f"no GPU takes a grid of {grid}")
        maps = HostMaps(getattr(metadata, "tensordesc_meta", None) or ())
        # A slice of scratch memory for each CTA, which tensor maps must be able to lie in.
        nbytes = metadata.global_scratch_size * grid[0] * grid[1] * grid[2]
        scratch = torch.empty(nbytes + NBYTES, dtype=torch.uint8)
        scratch = scratch[-scratch.data_ptr() % NBYTES :]
        launch = group.Launch(
            program,
            arguments.pack(kernel, source, values, tensors, report, maps, scratch.data_ptr()),
            Memory([*tensors, scratch] if nbytes else tensors, report_at),
            grid,
            loaded.shared_bytes,
            report_at,
            note_at,
            maps.by_address,
            execution.schedule,
        )
        (cta if kernel.by_warp else group).run(launch)
    except PtxError as error:
        raise PtxError(f"{kernel.name}: {error}{order}") from None
    execution.launches[kernel.name] += 1
    execution.seconds[kernel.name] += time.perf_counter() - started


def _stop_at_ptx(*arguments: Any) -> tuple[str, str] | None:
    """Have Triton's compiler leave PTX as it is (Triton's hook for its stages).

    Without arguments it is asked for what tells apart what it compiles from what others do.
    """
    if not arguments:
        name = "fastattn.machine"
        return name, hashlib.sha256(name.encode()).hexdigest()
    stages: dict[str, Any] = arguments[1]
    stages["cubin"] = lambda ptx, metadata: ptx.encode()
    return None


@contextlib.contextmanager
def execute(
    target: str, variation: Variation | None = None, schedule: Schedule | None = None
) -> Iterator[Execution]:
    """Run what is launched in a `with` block on this machine.

    Triton keeps compiled kernels by device index, so a process must use one target only.
    """
    if target not in MACHINE_TARGETS:
        raise ValueError(f"expected one of {', '.join(MACHINE_TARGETS)}, got {target!r}")
    execution = Execution(variation, schedule or DEFAULT_SCHEDULE)
    previous = knobs.runtime.add_stages_inspection_hook
    knobs.runtime.add_stages_inspection_hook = _stop_at_ptx  # type: ignore[assignment]
    try:
        with private.use_driver(MachineDriver(TARGETS[target], execution)):
            yield execution
    finally:
        knobs.runtime.add_stages_inspection_hook = previous


__all__ = ["MACHINE_TARGETS", "Execution", "Kernel", "MachineDriver", "execute"]
