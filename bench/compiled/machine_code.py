"""What a kernel makes of the machine: registers, spills, memory accesses, tensor cores."""

from __future__ import annotations

import bisect
import itertools
import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from triton import knobs
from triton.backends.nvidia.compiler import sm_arch_from_capability

from fastattn.machine.driver import Kernel

from .assembly import Instruction, memory_access, parse_amdgcn, parse_sass, uses_tensor_cores
from .loops import innermost_loops


@dataclass(frozen=True)
class Loop:
    """An innermost loop: how many instructions it holds, and how many of two kinds."""

    instructions: int
    tensor_core: int
    spills: int


@dataclass(frozen=True)
class MachineCode:
    """Counts taken from a kernel's machine code.

    Attributes:
        registers: Registers of a thread.
        spill_bytes: The bytes of stack that a thread needs, which is what did not fit.
        instructions: All instructions, padding left out.
        tensor_core: Matrix instructions on the tensor cores.
        loads: Global loads by width in bits, those to shared memory among them.
        stores: Global stores by width in bits.
        async_copies: Global loads that go to shared memory without waiting in registers.
        bulk_copies: Copies by the copy engine (TMA).
        atomics: Atomic operations on global memory.
        loops: The innermost loops.
    """

    registers: int
    spill_bytes: int
    instructions: int
    tensor_core: int
    loads: dict[int, int]
    stores: dict[int, int]
    async_copies: int
    bulk_copies: int
    atomics: int
    loops: list[Loop]


def inspect(kernel: Kernel) -> MachineCode:
    """Disassemble a kernel and count."""
    return inspect_all([kernel])[0]


def inspect_all(kernels: Sequence[Kernel]) -> list[MachineCode]:
    """Disassemble kernels of one target and count."""
    if all("cubin" in kernel.files for kernel in kernels):
        return [
            count(
                parse_sass(text),
                *sass_usage(_output_of("cuobjdump", "-res-usage", kernel.files["cubin"])),
            )
            for kernel, text in zip(kernels, disassemble(kernels), strict=True)
        ]
    texts = [kernel.files["amdgcn"].read_text() for kernel in kernels]
    return [count(parse_amdgcn(text), *amdgcn_usage(text)) for text in texts]


def disassemble(kernels: Sequence[Kernel], *options: str) -> list[str]:
    """The text of each kernel, from one call of a tool that needs half a second to start."""
    if not kernels:
        return []
    codes = [machine_code_of(kernel.files["cubin"].read_bytes()) for kernel in kernels]
    ends = list(itertools.accumulate(map(len, codes)))
    architecture = sm_arch_from_capability(kernels[0].metadata["target"].arch)
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"".join(codes))
        file.flush()
        processor = architecture.replace("sm_", "SM")
        text = _output_of("nvdisasm", *options, "--binary", processor, file.name)
    lines: list[list[str]] = [["Function :"] for _ in kernels]
    owner = 0
    for line in text.splitlines():
        if address := SASS_ADDRESS.match(line):
            owner = bisect.bisect(ends, int(address[1], 16))
        lines[owner].append(line)
    return ["\n".join(found) for found in lines]


SASS_ADDRESS = re.compile(r"\s*/\*([0-9a-f]{4,})\*/")


def machine_code_of(cubin: bytes) -> bytes:
    """What the sections named .text of an ELF file hold."""
    (sections,) = struct.unpack_from("<Q", cubin, 40)
    size, number, of_names = struct.unpack_from("<HHH", cubin, 58)
    # A section's name, type, flags, address, place and size.
    headers = [struct.unpack_from("<IIQQQQ", cubin, sections + i * size) for i in range(number)]
    names = headers[of_names][4]
    return b"".join(
        cubin[place : place + length]
        for name, _, _, _, place, length in headers
        if cubin.startswith(b".text.", names + name)
    )


def _output_of(tool: str, *arguments: object) -> str:
    command = [getattr(knobs.nvidia, tool).path, *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def sass_usage(text: str) -> tuple[int, int]:
    """Registers and bytes of stack from what `cuobjdump -res-usage` prints, the most of any."""
    found = re.findall(r"REG:(\d+) STACK:(\d+)", text)
    if not found:
        raise ValueError(f"no resource usage in: {text[:200]!r}")
    return max(int(registers) for registers, _ in found), max(int(stack) for _, stack in found)


def amdgcn_usage(text: str) -> tuple[int, int]:
    """Vector registers and bytes of stack from the metadata at the end of AMD assembly."""

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        if found is None:
            raise ValueError(f"no {name} in the kernel's metadata")
        return int(found[1])

    return field("vgpr_count"), field("private_segment_fixed_size")


def count(code: Sequence[Instruction], registers: int, spill_bytes: int) -> MachineCode:
    """Count the instructions of each kind."""
    accesses = [access for access in map(memory_access, code) if access is not None]
    kinds = Counter(access.kind for access in accesses)
    return MachineCode(
        registers=registers,
        spill_bytes=spill_bytes,
        instructions=len(code),
        tensor_core=sum(map(uses_tensor_cores, code)),
        loads=_widths(access.bits for access in accesses if access.kind == "load"),
        stores=_widths(access.bits for access in accesses if access.kind == "store"),
        async_copies=sum(access.asynchronous for access in accesses),
        bulk_copies=kinds["bulk"],
        atomics=kinds["atomic"],
        loops=[_loop([code[i] for i in body]) for body in innermost_loops(code)],
    )


def _widths(bits: Iterable[int]) -> dict[int, int]:
    return dict(sorted(Counter(bits).items(), reverse=True))


def _loop(body: Sequence[Instruction]) -> Loop:
    accesses = map(memory_access, body)
    spills = sum(access is not None and access.kind == "spill" for access in accesses)
    return Loop(len(body), sum(map(uses_tensor_cores, body)), spills)
