"""Reading assembly: what is counted, and what is a loop."""

from __future__ import annotations

import pytest

from bench.compiled.assembly import (
    Instruction,
    MemoryAccess,
    memory_access,
    parse_amdgcn,
    parse_sass,
    uses_tensor_cores,
)
from bench.compiled.loops import innermost_loops
from bench.compiled.machine_code import amdgcn_usage, count, sass_usage

SASS = """
	code for sm_90a
		Function : some_kernel
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;        /* 0x00000a00ff017b82 */
                                                                 /* 0x000e300000000800 */
        /*0010*/                   MOV R2, RZ ;                  /* 0x0000000000000000 */
        /*0020*/                   LDG.E.128.CONSTANT R4, desc[UR6][R2.64] ; /* 0x0 */
        /*0030*/                   LDGSTS.E.BYPASS.128 [R9], desc[UR6][R2.64] ; /* 0x0 */
        /*0040*/                   STL [R1], R5 ;                /* 0x0 */
        /*0050*/                   HGMMA.64x128x16.F32 R24, gdesc[UR8], R24 ; /* 0x0 */
        /*0060*/              @!P2 BRA 0xc0 ;                    /* 0x0 */
        /*0070*/              @!P0 BRA 0x20 ;                    /* 0x0 */
        /*0080*/                   BRA.U UP0, 0x10 ;             /* 0x0 */
        /*0090*/                   STG.E.U16 desc[UR6][R2.64], R5 ; /* 0x0 */
        /*00a0*/                   HFMA2.MMA R2, -RZ, RZ, 0, 0 ; /* 0x0 */
        /*00b0*/                   EXIT ;                        /* 0x0 */
        /*00c0*/                   MOV R3, RZ ;                  /* 0x0 */
        /*00d0*/                   BRA 0x90 ;                    /* 0x0 */
        /*00e0*/                   BRA 0xe0;                     /* 0x0 */
        /*00f0*/                   NOP;                          /* 0x0 */
"""

AMDGCN = """
	.globl	some_kernel                     ; -- Begin function some_kernel
some_kernel:                            ; @some_kernel
.Lfunc_begin0:
	.loc	1 3 0 prologue_end
	s_load_dwordx4 s[0:3], s[0:1], 0x0
.LBB0_1:                                ; the loop
	buffer_load_dwordx4 v[2:5], v1, s[0:3], 0 offen
	v_mfma_f32_32x32x8_bf16 a[0:15], v[2:3], v[4:5], a[0:15]
	s_cbranch_scc1 .LBB0_1
; %bb.2:
	global_store_short v1, v2, s[0:1]
	s_endpgm
.Lfunc_end0:
	.amdgpu_metadata
amdhsa.kernels:
  - .agpr_count:     0
    .private_segment_fixed_size: 48
    .vgpr_count:     25
	.end_amdgpu_metadata
"""


def test_sass_is_counted() -> None:
    usage = sass_usage(" Function some_kernel:\n  REG:40 STACK:16 SHARED:0 LOCAL:0\n")
    code = count(parse_sass(SASS), *usage)
    assert (code.registers, code.spill_bytes) == (40, 16)
    assert code.instructions == 15, "all but the padding"
    assert code.tensor_core == 1, "HFMA2.MMA is no matrix product"
    assert code.loads == {128: 2}
    assert code.async_copies == 1
    assert code.stores == {16: 1}


def test_sass_loops() -> None:
    """The inner loop is found; the outer one, the jump back out of line and the trap are not."""
    (loop,) = count(parse_sass(SASS), 0, 0).loops
    assert (loop.instructions, loop.tensor_core, loop.spills) == (6, 1, 1)


def test_amdgcn_is_counted() -> None:
    assert amdgcn_usage(AMDGCN) == (25, 48)
    code = count(parse_amdgcn(AMDGCN), *amdgcn_usage(AMDGCN))
    assert code.instructions == 6
    assert code.tensor_core == 1
    assert code.loads == {128: 1}
    assert code.stores == {16: 1}
    assert [loop.instructions for loop in code.loops] == [3]


def test_output_that_is_not_understood_is_an_error() -> None:
    with pytest.raises(ValueError, match="resource usage"):
        sass_usage("cuobjdump fatal: no such file")
    with pytest.raises(ValueError, match="vgpr_count"):
        amdgcn_usage("")


@pytest.mark.parametrize(
    ("opcode", "expected"),
    [
        ("LDG.E", MemoryAccess("load", 32)),
        ("LDG.E.U8.CONSTANT", MemoryAccess("load", 8)),
        ("LDG.E.64", MemoryAccess("load", 64)),
        ("LDG.E.ENL2.256", MemoryAccess("load", 256)),
        ("LD.E.128", MemoryAccess("load", 128)),
        ("LDGSTS.E", MemoryAccess("load", 32, asynchronous=True)),
        ("STG.E.128", MemoryAccess("store", 128)),
        ("RED.E.ADD.F32.FTZ.RN.STRONG.GPU", MemoryAccess("atomic", 0)),
        ("UTMALDG.2D", MemoryAccess("bulk", 0)),
        ("LDL.64", MemoryAccess("spill", 64)),
        ("LDGDEPBAR", None),
        ("LDS.128", None),
        ("global_load_dwordx4", MemoryAccess("load", 128)),
        ("global_load_b64", MemoryAccess("load", 64)),
        ("global_load_dword", MemoryAccess("load", 32)),
        ("buffer_load_ushort", MemoryAccess("load", 16)),
        ("buffer_load_d16_b16", MemoryAccess("load", 16)),
        ("buffer_load_u8", MemoryAccess("load", 8)),
        ("global_load_short_d16_hi", MemoryAccess("load", 16)),
        ("global_load_lds_dwordx4", MemoryAccess("load", 128, asynchronous=True)),
        ("buffer_store_b128", MemoryAccess("store", 128)),
        ("buffer_store_byte", MemoryAccess("store", 8)),
        ("global_atomic_add_f32", MemoryAccess("atomic", 0)),
        ("scratch_load_b128", MemoryAccess("spill", 128)),
        ("s_load_dwordx4", None),
        ("ds_read_b128", None),
        ("buffer_gl0_inv", None),
    ],
)
def test_memory_access(opcode: str, expected: MemoryAccess | None) -> None:
    assert memory_access(Instruction(opcode, "", None, True)) == expected


@pytest.mark.parametrize(
    "opcode",
    [
        "HMMA.16816.F32.BF16",
        "HGMMA.64x256x16.F32",
        "UTCHMMA",
        "UTCQMMA.2CTA",
        "QGMMA.64x64x32.F32.E4M3.E4M3",
        "v_mfma_f32_32x32x4_xf32",
        "v_wmma_f32_16x16x16_bf16",
    ],
)
def test_tensor_cores(opcode: str) -> None:
    assert uses_tensor_cores(Instruction(opcode, "", None, True))


@pytest.mark.parametrize("opcode", ["HFMA2.MMA", "FFMA", "HFMA2", "v_fma_f32", "UTCBAR"])
def test_not_tensor_cores(opcode: str) -> None:
    assert not uses_tensor_cores(Instruction(opcode, "", None, True))


def instructions(*jumps: int | None, opcode: str = "IADD3") -> list[Instruction]:
    """Instructions that fall through and may jump where stated; the last one ends the program."""
    return [
        Instruction(opcode, "", target, falls_through=i + 1 < len(jumps))
        for i, target in enumerate(jumps)
    ]


def test_only_innermost_loops() -> None:
    code = instructions(None, None, 1, None, 3, 0, None)
    assert innermost_loops(code) == [[1, 2], [3, 4]]


def test_two_ways_back_are_one_loop() -> None:
    assert innermost_loops(instructions(None, 0, None, 0, None)) == [[0, 1, 2, 3]]


def test_waiting_for_a_barrier_is_no_loop() -> None:
    """The loop around it, which does the work, is the innermost."""
    code = instructions(None, None, 1, *[None] * 8, 0, None)
    code[1] = Instruction("SYNCS.PHASECHK.TRANS64.TRYWAIT", "", None, True)
    assert innermost_loops(code) == [list(range(12))]
