"""Bulk copies (TMA): boxes of tensors, how they lie in shared memory, and what orders them."""

import pytest
import torch
from machine_support import MAP, address_of, run_ptx, tensor_map

from fastattn.machine.parser import PtxError
from fastattn.machine.schedule import POLICIES
from fastattn.machine.tensormap import TensorMap

ROWS, BYTES = 16, 16 * 128
"""Of the box; its rows have up to 128 bytes."""

START = f"""
    setp.eq.u32 %p2, %r0, 0; setp.lt.u32 %p1, %r0, 32; shl.b32 %r5, %r0, 4;
    mov.b32 %r20, {2 * BYTES}; mov.b32 %r21, 0; mov.b32 %r22, {BYTES};
    mov.b64 %rd8, {MAP}; mov.b64 %rd7, {MAP + 128};
    @%p2 mbarrier.init.shared::cta.b64 [%r20], 1; bar.sync 0;
"""
EXPECT = "@%p2 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r20], {};"
LOAD = (
    "@%p2 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes "
    "[%r21], [%rd8, {{{}, {}}}], [%r20];"
)
WAIT = """{
    .reg .pred complete;
    waitLoop:
    mbarrier.try_wait.parity.shared::cta.b64 complete, [%r20], 0;
    @!complete bra.uni waitLoop;
}"""
STORE = "@%p2 cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd7, {{{}, {}}}], [%r21];"
COMMIT, DONE = "cp.async.bulk.commit_group;", "cp.async.bulk.wait_group 0;"
FENCE = "fence.proxy.async.shared::cta;"
DUMP = "ld.shared.v4.b32 {{ %r10, %r11, %r12, %r13 }}, [ %r5 + {at} ];" + address_of(
    "%rd0", "%r5", 1, "%rd9"
)
DUMP += "st.global.v4.b32 [ %rd9 + {at} ], {{ %r10, %r11, %r12, %r13 }};"

every_policy = pytest.mark.parametrize("policy", POLICIES)


def dump(threads: int) -> str:
    """Instructions that write the box, as it lies in shared memory, to the first tensor."""
    return "".join(DUMP.format(at=at) for at in range(0, BYTES, 16 * threads))


def load(tensor: torch.Tensor, swizzle: int, column: int, row: int) -> torch.Tensor:
    """A box at some place as it lies in shared memory, in lines of 128 bytes of 16-bit numbers."""
    width = 64 if swizzle == 0 else swizzle // 2
    form = tensor_map(tensor, (ROWS, width), swizzle)
    seen = torch.zeros(BYTES // 2, dtype=torch.int16)
    body = START + EXPECT.format(form.nbytes) + LOAD.format(column, row) + WAIT + dump(32)
    assert run_ptx(body, seen, tensor, shared=2 * BYTES + 8, maps=[form]) == []
    return seen[: form.nbytes // 2].reshape(-1, 64)


def numbers(rows: int, columns: int) -> torch.Tensor:
    return torch.arange(1, 1 + rows * columns, dtype=torch.int16).reshape(rows, columns)


@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
def test_how_a_box_lies_in_shared_memory(swizzle: int):
    tensor = numbers(20, 64)
    lines = load(tensor, swizzle, 0, 2)
    width = 64 if swizzle == 0 else swizzle // 2
    rows = tensor[2 : 2 + ROWS, :width]
    # As NVIDIA draws it: rows one after the other in lines of 128 bytes, that is eight pieces of 16
    # bytes; within a swizzled row the piece p of line n stands at place p xor n, by as many bits as
    # the row has pieces.
    pieces = rows.reshape(-1, 8, 8)
    per_row = max(swizzle // 16, 1)
    for n, line in enumerate(lines.reshape(-1, 8, 8)):
        for p in range(8):
            if swizzle == 0:
                assert torch.equal(line[p], pieces[n, p])
            else:
                assert torch.equal(line[p ^ n % per_row], pieces[n, p])


@pytest.mark.parametrize(("column", "row"), [(-8, -3), (8, 12), (-100, 0), (0, 100)])
def test_what_a_box_has_beyond_the_tensor_is_zero(column: int, row: int):
    tensor = numbers(20, 64)
    padded = torch.zeros(20 + 200, 64 + 200, dtype=torch.int16)
    padded[100:120, 100:164] = tensor
    expected = padded[100 + row : 100 + row + ROWS, 100 + column : 164 + column]
    assert torch.equal(load(tensor, 0, column, row), expected)


@every_policy
@pytest.mark.parametrize(("column", "row"), [(0, 0), (-8, 12)])
def test_a_box_is_stored_as_far_as_the_tensor_goes(column: int, row: int, policy: str):
    source, to = numbers(16, 64), torch.zeros(20, 64, dtype=torch.int16)
    maps = [tensor_map(x, (ROWS, 64), 128) for x in (source, to)]
    body = START + EXPECT.format(BYTES) + LOAD.format(0, 0) + WAIT
    body += STORE.format(column, row) + COMMIT + DONE
    assert run_ptx(body, source, to, shared=2 * BYTES + 8, maps=maps, schedule=policy) == []
    expected = torch.zeros_like(to)
    columns = slice(0, 64 + column), slice(-column, 64)
    expected[row : row + ROWS, columns[0]] = source[: 20 - row, columns[1]]
    assert torch.equal(to, expected)


# What orders them.


def found(body: str, *, maps: int = 1, threads: int = 64, policy: str = "random") -> list[str]:
    """The faults, an error among them."""
    tensors = [numbers(16, 64), numbers(16, 64)]
    forms = [tensor_map(x, (ROWS, 64), 128) for x in tensors]
    seen = torch.zeros(BYTES // 2, dtype=torch.int16)
    shared = 2 * BYTES + 8
    try:
        return run_ptx(
            START + body, seen, *tensors, shared=shared, maps=forms, threads=threads,
            schedule=policy,
        )  # fmt: skip
    except PtxError as error:
        return [str(error)]


GOOD_LOAD = EXPECT.format(BYTES) + LOAD.format(0, 0) + WAIT + dump(64)


@every_policy
def test_a_load_is_read_when_its_bytes_have_come(policy: str):
    assert found(GOOD_LOAD, policy=policy) == []
    for body, kind in (
        (GOOD_LOAD.replace(WAIT, ""), "race: reads what a bulk load writes"),
        (GOOD_LOAD.replace(f", {BYTES};", f", {BYTES // 2};"), ("race: ", "deadlock: ")),
        (GOOD_LOAD.replace(f", {BYTES};", f", {BYTES + 16};"), "deadlock: "),
        (GOOD_LOAD.replace(EXPECT.format(BYTES), ""), "deadlock: "),
        (GOOD_LOAD.replace("@%p2 cp", "@%p1 cp"), ("copy: 32 threads", "line ")),
    ):
        assert any(fault.startswith(kind) for fault in found(body, policy=policy)), kind


def test_a_load_over_what_a_warp_still_reads():
    read = "ld.shared.b32 %r10, [ %r5 + 0 ];"
    body = EXPECT.format(BYTES) + LOAD.format(0, 0) + WAIT
    assert found(read + "bar.sync 0;" + body) == []
    faults = found(read + body)
    assert any(f.startswith("race: overwrites what warp 1 reads") for f in faults) or any(
        f.startswith("race: reads what a bulk load writes") for f in faults
    )


WRITE = "st.shared.v4.b32 [ %r5 + 0 ], { %r0, %r0, %r0, %r0 };"
GOOD_STORE = WRITE + FENCE + "bar.sync 0;" + STORE.format(0, 0) + COMMIT + DONE


@every_policy
def test_a_store_of_what_threads_wrote(policy: str):
    again = GOOD_STORE + "bar.sync 0;" + WRITE
    assert found(again, policy=policy) == []
    late = FENCE + "bar.sync 0;"
    for body, kind in (
        (again.replace(FENCE, ""), "proxy: reads what warp"),
        (again.replace(late, "bar.sync 0;"), "proxy: reads what warp"),
        (again.replace(late, FENCE), ("race: ", "proxy: ")),
        (again.replace(DONE, ""), "race: overwrites what a bulk store of warp 0 reads"),
        (again.replace(COMMIT, ""), "race: overwrites what a bulk store of warp 0 reads"),
        (again.replace("0;bar.sync 0;", "0;"), "race: "),
        (GOOD_STORE.replace(DONE, ""), "end: a bulk store that is never waited for"),
    ):
        assert any(fault.startswith(kind) for fault in found(body, policy=policy)), (kind, body)


def test_a_fence_covers_no_more_than_what_comes_before_it():
    body = GOOD_STORE.replace(FENCE, FENCE + WRITE)
    assert found(body)[0].startswith("proxy: reads what warp")


def test_a_fence_behind_the_barrier_covers_what_the_barrier_made_known():
    assert found(GOOD_STORE.replace(FENCE + "bar.sync 0;", "bar.sync 0;" + FENCE)) == []


def test_a_map_that_is_not_there():
    (fault,) = found(GOOD_LOAD.replace("[%rd8", "[%rd0"))
    assert "there is no tensor map at 0x" in fault


def test_where_a_box_may_lie():
    (fault,) = found("mov.b32 %r21, 64;" + GOOD_LOAD)
    assert "a box cannot lie in 2048 bytes at 64 of" in fault


@pytest.mark.parametrize(
    "wrong",
    [{"base": 8}, {"strides": (24,)}, {"box": (512, 8)}, {"box": (8, 4)}, {"box": (8, 128)}],
    ids=str,
)
def test_maps_that_no_gpu_takes(wrong: dict):
    right = {
        "base": 16, "size": 2, "shape": (64, 64), "strides": (128,), "box": (8, 64), "swizzle": 128
    }  # fmt: skip
    TensorMap(**right)
    with pytest.raises(PtxError, match="a tensor map"):
        TensorMap(**right | wrong)
