"""Faults planted in small kernels: each must be seen, and the same kernel without it must pass."""

import pytest
import torch
from machine_support import address_of, run_ptx

from fastattn.machine.parser import PtxError

THREAD = address_of("%rd0", "%r0", 4, "%rd9")
"""The address in %rd9 of a thread's element of the first tensor."""

STORE = THREAD + "st.global.b32 [ %rd9 + 0 ], { %r0 };"
LOAD = THREAD + "ld.global.b32 { %r2 }, [ %rd9 + 0 ];"


def ints(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


# Global memory.


def test_behind_the_end_of_a_tensor():
    assert run_ptx(STORE, ints(32)) == []
    with pytest.raises(PtxError, match="4 bytes behind the end of a storage of 124"):
        run_ptx(STORE, ints(31))


def test_before_all_tensors():
    with pytest.raises(PtxError, match="outside of all tensors"):
        run_ptx("mov.b64 %rd9, 64; ld.global.b32 { %r2 }, [ %rd9 + 0 ];", ints(32))


def test_between_the_elements_of_a_strided_tensor():
    whole = ints(32, 2)
    with pytest.raises(PtxError, match="between the elements of a tensor, at byte 4 "):
        run_ptx(LOAD, whole[:, 0])
    every_other = address_of("%rd0", "%r0", 8, "%rd9") + "ld.global.b32 { %r2 }, [ %rd9 + 0 ];"
    assert run_ptx(every_other, whole[:, 0]) == []


def test_two_tensors_that_share_a_storage_are_both_accessible():
    whole = ints(32, 2)
    assert run_ptx(LOAD, whole[:, 0], whole[:, 1]) == []


def test_a_masked_thread_accesses_nothing():
    masked = "setp.lt.u32 %p1, %r0, 31;" + THREAD + "@%p1 st.global.b32 [ %rd9 + 0 ], { %r0 };"
    assert run_ptx(masked, ints(31)) == []


def test_misaligned():
    vector = "ld.global.v2.b32 { %r2, %r3 }, [ %rd9 + 0 ];"
    with pytest.raises(PtxError, match="misaligned access of 8 bytes"):
        run_ptx(THREAD + vector, ints(40))


def test_ctas_that_write_one_element():
    body = "st.global.b32 [ %rd0 + 0 ], { %r1 };"
    assert run_ptx(body, ints(1)) == []
    for lanes in (32, 4096):  # One CTA after the other, and both at once.
        (fault, *_) = run_ptx(body, ints(1), ctas=2, lanes=lanes)
        assert "writes what another CTA writes" in fault or "at once" in fault
    same = "mov.b32 %r1, 7; " + body
    assert run_ptx(same, ints(1), ctas=2) == []


def test_a_cta_that_reads_what_another_writes():
    body = """
        setp.eq.s32 %p1, %r1, 1;
        @%p1 ld.global.b32 { %r2 }, [ %rd0 + 0 ];
        @!%p1 st.global.b32 [ %rd0 + 0 ], { %r0 };
    """
    body = body.replace("%r0 }", "%r5 }")
    assert any("another CTA" in fault for fault in run_ptx(body, ints(1), ctas=2))


def test_threads_that_write_different_values_at_once():
    (fault,) = run_ptx("st.global.b32 [ %rd0 + 0 ], { %r0 };", ints(1))
    assert "different values" in fault


# Shared memory.

OWN = "shl.b32 %r3, %r0, 2;"
NEIGHBOUR = "xor.b32 %r4, %r3, 128;"
EXCHANGE = OWN + NEIGHBOUR + "st.shared.b32 [ %r3 + 0 ], %r0; {} ld.shared.b32 %r2, [ %r4 + 0 ];"
RESULT = THREAD + "st.global.b32 [ %rd9 + 0 ], { %r2 };"


def test_a_barrier_between_warps():
    output = ints(64)
    assert run_ptx(EXCHANGE.format("bar.sync 0;") + RESULT, output, threads=64, shared=256) == []
    assert output.tolist() == [*range(32, 64), *range(32)]
    (fault,) = run_ptx(EXCHANGE.format(""), threads=64, shared=256)
    assert "reads what another warp writes" in fault


def test_a_barrier_before_memory_is_written_again():
    body = EXCHANGE.format("bar.sync 0;") + "{} st.shared.b32 [ %r3 + 0 ], %r2;"
    assert run_ptx(body.format("bar.sync 0;"), threads=64, shared=256) == []
    (fault,) = run_ptx(body.format(""), threads=64, shared=256)
    assert "overwrites what another warp reads" in fault


def test_warps_that_store_the_same_number():
    body = "mov.b32 %r3, 8; mov.b32 %r2, {}; st.shared.b32 [ %r3 + 0 ], %r2;"
    assert run_ptx(body.format("5"), threads=64, shared=256) == []
    assert run_ptx(body.format("%tid.x"), threads=64, shared=256) != []


def test_a_barrier_that_some_threads_miss():
    body = "setp.lt.u32 %p1, %r0, 40; @%p1 bra $SKIP; bar.sync 0; $SKIP: mov.b32 %r2, 0;"
    with pytest.raises(PtxError, match="a barrier that not all threads come to"):
        run_ptx(body, threads=64)


def test_a_shuffle_that_some_threads_of_a_warp_miss():
    body = "setp.lt.u32 %p1, %r0, {}; @%p1 bra $SKIP; "
    body += "shfl.sync.bfly.b32 %r2, %r0, 1, 31, -1; $SKIP: mov.b32 %r2, 0;"
    assert run_ptx(body.format(32), threads=64) == []
    with pytest.raises(PtxError, match="some threads of a warp"):
        run_ptx(body.format(40), threads=64)


def test_outside_of_shared_memory():
    with pytest.raises(PtxError, match="access at 0 to 256 of 252 shared bytes"):
        run_ptx(EXCHANGE.format("bar.sync 0;"), threads=64, shared=252)


def test_shared_memory_that_was_never_written_is_poison():
    output = torch.zeros(32)
    assert run_ptx(OWN + "ld.shared.b32 %r2, [ %r3 + 0 ];" + RESULT, output, shared=128) == []
    assert output.isnan().all()


# Asynchronous copies.

COPY = (
    OWN + LOAD.partition("ld")[0] + "cp.async.ca.shared.global [ %r3 + 0 ], [ %rd9 + 0 ], 0x4, 4;"
)
COMMIT = "cp.async.commit_group;"
READ = "bar.sync 0; xor.b32 %r4, %r3, 128; ld.shared.b32 %r2, [ %r4 + 0 ];"


def test_copies_arrive_when_waited_for():
    result = RESULT.replace("%rd0", "%rd1")
    numbers, output = torch.arange(64, dtype=torch.int32), ints(64)
    good = COPY + COMMIT + "cp.async.wait_group 0;" + READ + result
    assert run_ptx(good, numbers, output, threads=64, shared=256) == []
    assert output.tolist() == [*range(32, 64), *range(32)]
    for bad in ("", "cp.async.wait_group 1;"):
        text = good.replace("cp.async.wait_group 0;", bad)
        faults = run_ptx(text, numbers, output, threads=64, shared=256)
        assert any("has yet to deliver" in fault for fault in faults)


def test_what_a_copy_delivers_others_read_after_a_barrier():
    body = COPY + COMMIT + "cp.async.wait_group 0;" + READ.replace("bar.sync 0;", "")
    (fault,) = run_ptx(body, ints(64), threads=64, shared=256)
    assert "reads what another warp writes" in fault


def test_writes_under_a_running_copy():
    body = COPY + COMMIT + "st.shared.b32 [ %r3 + 0 ], %r0; cp.async.wait_group 0;"
    assert any("asynchronous copy is to arrive" in f for f in run_ptx(body, ints(32), shared=128))


def test_copies_to_what_others_are_reading():
    body = EXCHANGE.format("bar.sync 0;") + "{}" + COPY + COMMIT + "cp.async.wait_group 0;"
    assert run_ptx(body.format("bar.sync 0;"), ints(64), threads=64, shared=256) == []
    faults = run_ptx(body.format(""), ints(64), threads=64, shared=256)
    assert any("copies to what another warp reads" in fault for fault in faults)


def test_a_copy_of_no_bytes_reads_nothing_and_writes_zeros():
    body = COPY.replace("0x4, 4;", "0x4, 0;") + COMMIT + "cp.async.wait_group 0;"
    body += "ld.shared.b32 %r2, [ %r3 + 0 ];" + address_of("%rd0", "%r0", 4, "%rd9")
    body = body.replace("add.s64 %rd9, %rd9, %rd0;", "add.s64 %rd9, %rd9, 4096;", 1)
    output = torch.full((32,), 7, dtype=torch.int32)
    assert run_ptx(body + "st.global.b32 [ %rd9 + 0 ], { %r2 };", output, shared=128) == []
    assert output.eq(0).all()
