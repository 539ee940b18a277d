"""Tensor cores' instructions, held against torch's products of matrices laid out by hand."""

import pytest
import torch
from machine_support import address_of, run_ptx

from fastattn.machine.parser import PtxError

LANES = torch.arange(32)
ROW, PLACE = LANES // 4, LANES % 4


def registers(base: str, count: int, to: int, stride: int) -> str:
    """Instructions that load a thread's `count` words, which lie `stride` words apart."""
    text = address_of(base, "%r0", 4, "%rd9")
    for n in range(count):
        text += f"ld.global.b32 {{ %r{to + n} }}, [ %rd9 + {4 * stride * n} ];"
    return text


def names(first: int, count: int) -> str:
    return "{" + ", ".join(f"%r{first + n}" for n in range(count)) + "}"


def words(*halves: torch.Tensor) -> torch.Tensor:
    """Pairs of 16-bit numbers as 32-bit words."""
    return torch.stack(halves, -1).contiguous().view(torch.int32).squeeze(-1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_product_in_a_warp(dtype: torch.dtype):
    a, b, c = torch.randn(16, 16), torch.randn(16, 8), torch.randn(16, 8)
    a, b = a.to(dtype), b.to(dtype)
    k = 2 * PLACE
    left = torch.stack(
        [
            words(a[r, k + j], a[r, k + j + 1])
            for j, r in ((0, ROW), (0, ROW + 8), (8, ROW), (8, ROW + 8))
        ]
    )
    right = torch.stack([words(b[k + j, ROW], b[k + j + 1, ROW]) for j in (0, 8)])
    place = [(r, 2 * PLACE + j) for r in (ROW, ROW + 8) for j in (0, 1)]
    accumulator = torch.stack([c[r, n] for r, n in place])
    output = torch.zeros(4, 32)
    name = "f16" if dtype is torch.float16 else "bf16"
    body = registers("%rd0", 4, 10, 32) + registers("%rd1", 2, 14, 32)
    body += registers("%rd2", 4, 16, 32)
    body += f"mma.sync.aligned.m16n8k16.row.col.f32.{name}.{name}.f32 {names(20, 4)}, "
    body += f"{names(10, 4)}, {names(14, 2)}, {names(16, 4)};" + address_of(
        "%rd3", "%r0", 4, "%rd9"
    )
    for n in range(4):
        body += f"st.global.b32 [ %rd9 + {128 * n} ], {{ %r{20 + n} }};"
    assert run_ptx(body, left, right, accumulator, output) == []
    expected = (a.double() @ b.double() + c.double()).float()
    for (r, n), found in zip(place, output, strict=True):
        torch.testing.assert_close(found, expected[r, n], rtol=1e-6, atol=1e-6)


def test_a_product_in_a_warp_in_tf32():
    a, b = torch.randn(16, 8), torch.randn(8, 8)
    left = torch.stack(
        [a[r, PLACE + j] for j, r in ((0, ROW), (0, ROW + 8), (4, ROW), (4, ROW + 8))]
    )
    right = torch.stack([b[PLACE + j, ROW] for j in (0, 4)])
    output = torch.zeros(4, 32)
    body = registers("%rd0", 4, 10, 32) + registers("%rd1", 2, 14, 32)
    body += "mov.b32 %r16, 0; mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
    body += f"{names(20, 4)}, {names(10, 4)}, {names(14, 2)}, {{%r16, %r16, %r16, %r16}};"
    body += address_of("%rd2", "%r0", 4, "%rd9")
    for n in range(4):
        body += f"st.global.b32 [ %rd9 + {128 * n} ], {{ %r{20 + n} }};"
    assert run_ptx(body, left, right, output) == []

    def cut(x: torch.Tensor) -> torch.Tensor:
        return (x.view(torch.int32) & ~0x1FFF).view(torch.float32).double()

    expected = (cut(a) @ cut(b)).float()
    assert torch.equal(output[0], expected[ROW, 2 * PLACE])
    assert torch.equal(output[3], expected[ROW + 8, 2 * PLACE + 1])


@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_to_and_from_shared_memory(transposed: bool):
    matrices = torch.arange(4 * 64, dtype=torch.int16).reshape(4, 8, 8)
    output = torch.zeros(4, 32, 2, dtype=torch.int16)
    again = torch.zeros(4, 8, 8, dtype=torch.int16)
    trans = ".trans" * transposed
    # Thread n copies row n, 16 bytes, and gives its address to the instruction.
    body = address_of("%rd0", "%r0", 16, "%rd9") + "shl.b32 %r3, %r0, 4;"
    body += "ld.global.v4.b32 { %r4, %r5, %r6, %r7 }, [ %rd9 + 0 ];"
    body += "st.shared.v4.b32 [ %r3 + 0 ], { %r4, %r5, %r6, %r7 };"
    body += f"ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {names(10, 4)}, [%r3];"
    body += address_of("%rd1", "%r0", 4, "%rd9")
    for n in range(4):
        body += f"st.global.b32 [ %rd9 + {128 * n} ], {{ %r{10 + n} }};"
    body += f"stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%r3+512], {names(10, 4)};"
    body += "ld.shared.v4.b32 { %r4, %r5, %r6, %r7 }, [ %r3 + 512 ];"
    body += address_of("%rd2", "%r0", 16, "%rd9")
    body += "st.global.v4.b32 [ %rd9 + 0 ], { %r4, %r5, %r6, %r7 };"
    assert run_ptx(body, matrices, output, again, shared=1024) == []
    seen = matrices.transpose(1, 2) if transposed else matrices
    assert torch.equal(output, seen.reshape(4, 32, 2))
    assert torch.equal(again, matrices)


# Products of a warpgroup.

N, K = 64, 16


def lay_out(matrix: torch.Tensor, width: int, transposed: bool) -> torch.Tensor:
    """The bytes of a 16-bit matrix (rows, 16) in shared memory, swizzled over `width` bytes.

    Written as NVIDIA draws it: rows of `width` bytes in blocks of eight, in which piece p of 16
    bytes of row r stands at place p xor r (by as many bits as there are pieces).
    """
    rows, depth = matrix.shape
    memory = torch.zeros(16384, dtype=torch.int16)
    pieces = width // 16
    for r in range(rows):
        for k in range(depth):
            line, along = (k, r) if transposed else (r, k)
            block, inside = divmod(along * 2, width)
            piece = inside // 16
            # Lines of one block of 8 lie `width` apart, blocks along the other way follow.
            address = block * LEAD if transposed else 0
            address += line // 8 * STRIDE + line % 8 * width
            number = address // 128 % pieces
            address += (piece ^ number) * 16 + inside % 16
            memory[address // 2] = matrix[r, k]
    return memory


LEAD, STRIDE = 8192, 1024
SWIZZLES = {128: 1, 64: 2, 32: 3}


def descriptor(start: int, width: int) -> int:
    return start >> 4 | LEAD >> 4 << 16 | STRIDE >> 4 << 32 | SWIZZLES[width] << 62


def product_body(
    width: int, transposed: bool, *, wait: str, fence: str, order: str, barrier: str
) -> str:
    """A kernel that copies two matrices to shared memory and multiplies them by a warpgroup."""
    accumulators = names(100, N // 2)
    body = "mov.b32 %r5, 0; $COPY: shl.b32 %r6, %r5, 7; add.s32 %r6, %r6, %r0;"
    body += address_of("%rd0", "%r6", 16, "%rd9") + "shl.b32 %r7, %r6, 4;"
    body += "ld.global.v4.b32 { %r10, %r11, %r12, %r13 }, [ %rd9 + 0 ];"
    body += "st.shared.v4.b32 [ %r7 + 0 ], { %r10, %r11, %r12, %r13 };"
    body += "add.s32 %r5, %r5, 1; setp.lt.s32 %p1, %r5, 32; @%p1 bra $COPY;"
    body += f"{fence} {barrier}"
    body += "".join(f"mov.b32 %r{100 + n}, 0f3F800000;" for n in range(N // 2))
    body += f"{order} wgmma.mma_async.sync.aligned.m64n{N}k{K}.f32.bf16.bf16 {accumulators}, "
    body += f"{descriptor(0, width)}, {descriptor(32768, width)}, 1, 1, 1, {int(transposed)}, "
    body += f"{int(transposed)}; wgmma.commit_group.sync.aligned; {wait}"
    body += address_of("%rd1", "%r0", 4, "%rd9")
    for n in range(N // 2):
        body += f"st.global.b32 [ %rd9 + {512 * n} ], {{ %r{100 + n} }};"
    return body


GOOD = {
    "wait": "wgmma.wait_group.sync.aligned 0;",
    "fence": "fence.proxy.async.shared::cta;",
    "order": "wgmma.fence.sync.aligned;",
    "barrier": "bar.sync 0;",
}


def run_product(
    width: int, transposed: bool, notes: list[str] | None = None, **parts: str
) -> tuple[list[str], torch.Tensor]:
    a, b = (torch.randn(rows, K).to(torch.bfloat16) for rows in (64, N))
    both = torch.cat([lay_out(x.view(torch.int16), width, transposed) for x in (a, b)])
    output = torch.zeros(N // 2, 128)
    body = product_body(width, transposed, **GOOD | parts)
    faults = run_ptx(body, both, output, threads=128, shared=65536, notes=notes)
    # Warp w has rows 16 w to 16 w + 15, whose parts lie over threads as those of a warp's product.
    found = output.reshape(N // 8, 2, 2, 4, 8, 4).permute(3, 1, 4, 0, 5, 2).reshape(64, N)
    expected = (a.double() @ b.double().T + 1.0).float()
    return faults, (found - expected).abs().max()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("width", [128, 64, 32])
def test_a_product_of_a_warpgroup(width: int, transposed: bool):
    faults, error = run_product(width, transposed)
    assert faults == []
    assert error < 1e-5


# An election has warps run one by one; it changes nothing else.
BY_WARP = "elect.sync %r3|%p3, -1; bar.sync 0;"


@pytest.mark.parametrize(("width", "transposed"), [(128, False), (64, True), (32, False)])
def test_a_product_of_warps_that_go_their_own_ways(width: int, transposed: bool):
    faults, error = run_product(width, transposed, barrier=BY_WARP)
    assert faults == []
    assert error < 1e-5


STORE = "shl.b32 %r7, %r0, 4; st.shared.b32 [ %r7 + 0 ], %r0;"


@pytest.mark.parametrize(
    ("parts", "kind"),
    [
        ({"fence": ""}, "proxy: reads what warp"),
        ({"barrier": BY_WARP.replace("bar.sync 0;", "")}, "race: reads what warp"),
        ({"order": ""}, "registers: "),
        ({"wait": STORE + GOOD["wait"]}, "race: overwrites what a product of warp"),
        ({"wait": GOOD["wait"] + STORE}, "race: overwrites what a product of warp"),
        ({"wait": "mov.b32 %r100, 0;" + GOOD["wait"]}, "registers: an accumulator was written"),
        ({"wait": ""}, "end: a product"),
    ],
    ids=["fence", "barrier", "order", "store", "store of others", "accumulator", "wait"],
)
def test_faults_of_warps_that_go_their_own_ways(parts: dict[str, str], kind: str):
    faults, _ = run_product(128, False, **{"barrier": BY_WARP} | parts)
    assert any(fault.startswith(kind) for fault in faults), faults


def test_the_four_warps_of_a_product_multiply_the_same():
    body = BY_WARP + "shr.u32 %r3, %r0, 5; cvt.u64.u32 %rd5, %r3;"
    body += f"add.s64 %rd5, %rd5, {descriptor(0, 128)}; mov.b32 %r100, 0; {GOOD['order']}"
    body += "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r100, %r101, %r102, %r103}, "
    body += f"%rd5, {descriptor(0, 128)}, 0, 1, 1, 0, 0; wgmma.commit_group.sync.aligned;"
    faults = run_ptx(body + GOOD["wait"], threads=128, shared=65536)
    assert any(fault.startswith("product: another warp of the warpgroup") for fault in faults)
    skip = "setp.lt.u32 %p2, %r0, 32; @%p2 bra $END; "
    body = body.replace(GOOD["order"], skip + GOOD["order"]).replace(
        "add.s64 %rd5, %rd5", "mov.b64 %rd5"
    )
    faults = run_ptx(body + GOOD["wait"] + "$END: mov.b32 %r2, 0;", threads=128, shared=65536)
    assert "product: warp 0 of the warpgroup has not come here" in faults[0]


def test_accumulators_hold_nothing_before_they_are_waited_for():
    _, error = run_product(128, False, wait="")
    assert error.isnan()
    _, error = run_product(128, False, wait="wgmma.wait_group.sync.aligned 1;")
    assert error.isnan()


def test_what_was_stored_needs_a_proxy_fence():
    faults, _ = run_product(128, False, fence="")
    assert "no fence.proxy.async" in faults[0]


def test_what_other_warps_stored_needs_a_barrier():
    faults, _ = run_product(128, False, barrier="")
    assert "reads what another warp writes" in faults[0]


def test_registers_need_a_fence():
    faults, _ = run_product(128, False, order="")
    assert "no wgmma.fence" in faults[0]


def test_an_accumulator_needs_a_fence_behind_what_wrote_it():
    late = GOOD["order"] + "mov.b32 %r100, 0f3F800000;"
    faults, _ = run_product(128, False, order=late)
    assert "an accumulator was written with no wgmma.fence since" in faults[0]


def test_an_accumulator_copied_behind_the_fence_is_noted():
    late = GOOD["order"] + "mov.b32 %r100, %r101;"
    notes: list[str] = []
    assert run_product(128, False, order=late, notes=notes)[0] == []
    assert notes == ["an accumulator is a copy that was made after wgmma.fence"]


@pytest.mark.parametrize("late", [False, True])
def test_operands_that_are_written_behind_the_fence_are_noted(late: bool):
    write = "".join(f"mov.b32 %r{10 + n}, 0;" for n in range(4))
    order = GOOD["order"] + write if late else write + GOOD["order"]
    body = "".join(f"mov.b32 %r{100 + n}, 0;" for n in range(4)) + order
    body += f"wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {names(100, 4)}, "
    body += f"{names(10, 4)}, {descriptor(0, 128)}, 1, 1, 1, 0;"
    body += "wgmma.commit_group.sync.aligned;" + GOOD["wait"]
    notes: list[str] = []
    assert run_ptx(body, threads=128, shared=65536, notes=notes) == []
    noted = ["a product reads registers that were written after wgmma.fence"]
    assert notes == (noted if late else [])


def test_a_store_under_a_running_product():
    store = "shl.b32 %r7, %r0, 4; st.shared.b32 [ %r7 + 0 ], %r0;"
    faults, error = run_product(128, False, wait=store + GOOD["wait"])
    assert "a running product may still read" in faults[0]
    assert error > 1 or error.isnan(), "operands are read as late as they may be"
    faults, error = run_product(128, False, wait=GOOD["wait"] + "bar.sync 0;" + store)
    assert faults == []
    assert error < 1e-5


def test_an_accumulator_written_under_a_running_product():
    faults, _ = run_product(128, False, wait="mov.b32 %r100, 0;" + GOOD["wait"])
    assert "an accumulator was written" in faults[0]


def test_a_product_that_not_all_warps_come_to():
    skip = "setp.lt.u32 %p2, %r0, 32; @%p2 bra $END; "
    with pytest.raises(PtxError, match="not all threads come to"):
        run_product(
            128, False, order=skip + GOOD["order"], wait=GOOD["wait"] + "$END: mov.b32 %r2, 0;"
        )
