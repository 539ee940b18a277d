"""Small PTX kernels run by fastattn.machine: what its tests share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

import fastattn.machine.execution  # noqa: F401 (every instruction is registered)
from fastattn.machine import cta, group
from fastattn.machine.group import Launch
from fastattn.machine.memory import Memory
from fastattn.machine.parser import Instruction, parse
from fastattn.machine.schedule import Schedule
from fastattn.machine.tensormap import TensorMap
from fastattn.machine.translator import Translator
from fastattn.machine.variation import Variation

MAP = 1 << 40
"""The address of the first tensor map of `run_ptx`."""

HEADER = """
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(
{parameters}
)
.reqntid {threads}
{directives}
{{
.reg .pred %p<32>;
.reg .b16 %rs<64>;
.reg .b32 %r<512>;
.reg .b64 %rd<64>;
{loads}
mov.u32 %r0, %tid.x;
mov.u32 %r1, %ctaid.x;
{body}
ret;
}}
"""


def write_kernel(body: str, arguments: int, threads: int = 32, directives: str = "") -> str:
    """A kernel around some instructions, with the addresses of tensors in %rd0, %rd1, ...

    The thread's number is in %r0 and the CTA's in %r1.
    """
    parameters = [f".param .u64 .ptr .global .align 1 kernel_param_{n}" for n in range(arguments)]
    loads = [f"ld.param.b64 %rd{n}, [kernel_param_{n}];" for n in range(arguments)]
    return HEADER.format(
        parameters=",\n".join(parameters),
        loads="\n".join(loads),
        body=body,
        threads=threads,
        directives=directives,
    )


def run_ptx(
    body: str,
    *tensors: torch.Tensor,
    threads: int = 32,
    ctas: int = 1,
    shared: int = 0,
    variation: Variation | None = None,
    lanes: int = 4096,
    schedule: str = "random",
    maps: Sequence[TensorMap] = (),
    directives: str = "",
    notes: list[str] | None = None,
) -> list[str]:
    """Run instructions on tensors, and return the faults that were reported.

    The address of the first tensor map is MAP, and so on. `notes` gets what is no fault.
    """
    reports: list[str] = []

    def report(i: Instruction, what: str) -> None:
        reports.append(f"{what}: {i}")

    def note(i: Instruction, what: str) -> None:
        if notes is not None:
            notes.append(what)

    text = write_kernel(body, len(tensors), threads, directives)
    program = Translator(parse(text), variation)
    parameters: dict[str, Any] = {
        f"kernel_param_{n}": np.full((1, 1), tensor.data_ptr(), np.uint64)
        for n, tensor in enumerate(tensors)
    }
    launch = Launch(
        program,
        parameters,
        Memory(tensors, report),
        (ctas, 1, 1),
        shared,
        report,
        note,
        maps={MAP + 128 * number: one for number, one in enumerate(maps)},
        schedule=Schedule.parse(schedule),
    )
    if program.kernel.by_warp:
        cta.run(launch)
    else:
        group.run(launch, lanes)
    return reports


def tensor_map(tensor: torch.Tensor, box: tuple[int, ...], swizzle: int = 0) -> TensorMap:
    """The map by which boxes of a tensor are copied."""
    size = tensor.element_size()
    strides = tuple(size * stride for stride in tensor.stride()[:-1])
    return TensorMap(tensor.data_ptr(), size, tuple(tensor.shape), strides, box, swizzle)


def address_of(base: str, index: str, size: int, to: str) -> str:
    """Instructions for an address: base + size * index."""
    return f"mul.wide.u32 {to}, {index}, {size}; add.s64 {to}, {to}, {base};"
