"""Warps that wait for each other: mbarriers, barriers of some threads, registers, elections."""

import re
from itertools import pairwise

import pytest
import torch
from machine_support import address_of, run_ptx, write_kernel

from fastattn.machine.parser import PtxError, parse
from fastattn.machine.schedule import POLICIES, Schedule

START = """
    setp.lt.u32 %p1, %r0, 32; setp.eq.u32 %p2, %r0, 0; setp.eq.u32 %p3, %r0, 32;
    shl.b32 %r5, %r0, 2; and.b32 %r6, %r5, 127; mov.b32 %r4, 7; mov.b32 %r20, 1024;
    @%p2 mbarrier.init.shared::cta.b64 [%r20], {count}; bar.sync 0;
"""
"""%p1 holds in the first warp, %p2 in its first thread, %p3 in the second warp's.

The place of a thread's word is in %r5, and of its lane's word of the first warp in %r6.
"""

RESULT = address_of("%rd0", "%r0", 4, "%rd9") + "st.global.b32 [ %rd9 + 0 ], { %r4 };"
ARRIVE = "@%p2 mbarrier.arrive.shared::cta.b64 _, [%r20];"


def wait(parity: int) -> str:
    """Wait for a phase of the mbarrier, as Triton writes it."""
    return f"""{{
        .reg .pred complete;
        waitLoop:
        mbarrier.try_wait.parity.shared::cta.b64 complete, [%r20], {parity};
        @!complete bra.uni waitLoop;
    }}"""


def two_warps(first: str, second: str, count: int = 1) -> str:
    """Instructions for the first warp and for the second, around an mbarrier."""
    start = START.format(count=count)
    return f"{start} @!%p1 bra $SECOND; {first} bra $END; $SECOND: {second} $END: {RESULT}"


def run(
    first: str, second: str, count: int = 1, *, schedule: str = "random", directives: str = ""
) -> tuple[list[str], list[int]]:
    """The faults, and what is in %r4 of all threads at the end."""
    output = torch.zeros(64, dtype=torch.int32)
    body = two_warps(first, second, count)
    faults = run_ptx(
        body, output, threads=64, shared=2048, schedule=schedule, directives=directives
    )
    return faults, output.tolist()


WRITE, READ = "st.shared.b32 [ %r5 + 0 ], %r0;", "ld.shared.b32 %r4, [ %r6 + 0 ];"
NUMBERS = [7] * 32 + list(range(32))

every_policy = pytest.mark.parametrize("policy", POLICIES)


# mbarriers.


@every_policy
def test_a_warp_reads_what_another_wrote_before_it_arrived(policy: str):
    assert run(WRITE + ARRIVE, wait(0) + READ, schedule=policy) == ([], NUMBERS)


@every_policy
@pytest.mark.parametrize(
    ("first", "second"),
    [
        (WRITE + ARRIVE, READ),
        (WRITE + ARRIVE, wait(1) + READ),
        (ARRIVE + WRITE, wait(0) + READ),
    ],
    ids=["no wait", "wait for the phase before", "arrival before the write"],
)
def test_what_nothing_orders_is_seen_whoever_comes_first(first: str, second: str, policy: str):
    try:
        (fault, *_), _ = run(first, second, schedule=policy)
    except PtxError as error:
        fault = str(error)
    # Who comes late to a phase whose parity is that of the next one waits for good.
    assert fault.startswith("race: " if wait(1) not in second else ("race: ", "deadlock: "))


def test_a_reader_orders_what_is_written_over_what_it_read():
    again = wait(0) + "st.shared.b32 [ %r5 + 0 ], %r4;"
    back = "@%p3 mbarrier.arrive.shared::cta.b64 _, [%r20];"
    read = "ld.shared.b32 %r4, [ %r6 + 0 ];"
    assert run(again, read + back)[0] == []
    faults, _ = run(again, back + read)
    assert "overwrites what warp 1 reads" in faults[0] or "reads what warp 0 writes" in faults[0]


def test_a_phase_needs_as_many_arrivals_as_the_count_says():
    both = ARRIVE + "@%p2 mbarrier.arrive.shared::cta.b64 _, [%r20];"
    assert run(WRITE + both, wait(0) + READ, 2) == ([], NUMBERS)
    all_of_them = "mbarrier.arrive.shared::cta.b64 _, [%r20];"
    assert run(WRITE + all_of_them, wait(0) + READ, 32) == ([], NUMBERS)
    at_once = "@%p2 mbarrier.arrive.shared::cta.b64 _, [%r20], 32;"
    assert run(WRITE + at_once, wait(0) + READ, 32) == ([], NUMBERS)


def test_a_deadlock_tells_who_waits_for_what():
    with pytest.raises(PtxError) as caught:
        run(WRITE + ARRIVE, wait(0) + READ, 2)
    text = str(caught.value)
    assert "deadlock: CTA 0" in text
    assert "warps [1] wait at line " in text
    assert "phase 0 of the mbarrier at 1024, which lacks 1 of 2 arrivals and 0 bytes" in text


def test_too_many_arrivals():
    faults, _ = run(ARRIVE.replace(";", ", 2;"), wait(0))
    assert faults[0].startswith("mbarrier: more arrivals than the count of 1")


def test_phases_are_told_apart_by_their_parity():
    # The first warp arrives for two phases, and waits for an answer in between.
    answer = "@%p3 mbarrier.arrive.shared::cta.b64 _, [%r20];"
    first = ARRIVE + wait(1) + WRITE + ARRIVE
    second = wait(0) + answer + wait(0) + READ
    assert run(first, second) == ([], NUMBERS)
    with pytest.raises(PtxError, match="deadlock"):
        run(first, second.replace("[%r20], 0", "[%r20], 1"))


def test_only_the_lowest_bit_of_a_parity_counts():
    assert run(WRITE + ARRIVE, wait(-2) + READ) == ([], NUMBERS)


def test_bytes_that_do_not_come():
    expect = ARRIVE.replace("arrive", "arrive.expect_tx").replace(";", ", 64;")
    with pytest.raises(PtxError, match="lacks 0 of 1 arrivals and 64 bytes"):
        run(WRITE + expect, wait(0) + READ)


def test_an_mbarrier_that_is_not_there():
    for body in (ARRIVE, wait(0)):
        text = START.format(count=1).replace("@%p2 mbarrier.init", "@%p9 mbarrier.init")
        with pytest.raises(PtxError, match="mbarrier: there is none at 1024"):
            run_ptx("setp.lt.u32 %p9, %r0, 0;" + text + body, threads=64, shared=2048)


def test_an_mbarrier_that_no_barrier_makes_known():
    text = two_warps(ARRIVE, wait(0)).replace("bar.sync 0;", "")
    seen = []
    for seed in range(8):
        output = torch.zeros(64, dtype=torch.int32)
        try:
            seen += run_ptx(text, output, threads=64, shared=2048, schedule=f"random:{seed}")
        except PtxError as error:
            seen.append(str(error))
    assert all("there is none at 1024" in s or "race: reads what warp 0" in s for s in seen)
    assert len(seen) >= 8


def test_an_mbarrier_is_no_place_for_numbers():
    overwrite = "bar.sync 5, 64; @%p2 st.shared.b32 [ %r20 + 4 ], %r0;"
    faults, _ = run(ARRIVE + overwrite, wait(0) + "bar.sync 5, 64;")
    assert faults[0].startswith("mbarrier: overwrites the one at 1024, in use")
    gone = overwrite.replace("@", "@%p2 mbarrier.inval.shared::cta.b64 [%r20]; @", 1)
    assert run(ARRIVE + gone, wait(0) + "bar.sync 5, 64;")[0] == []


# Barriers of some of the threads.


@every_policy
def test_named_barriers(policy: str):
    first, second = WRITE + "bar.sync 3, 64;", "bar.sync 3, 64;" + READ
    assert run(first, second, schedule=policy) == ([], NUMBERS)
    assert run(first.replace("sync", "arrive"), second, schedule=policy) == ([], NUMBERS)


def test_a_named_barrier_of_one_warp_orders_nothing():
    faults, _ = run(WRITE + "bar.sync 3, 32;", "bar.sync 4, 32;" + READ)
    assert faults[0].startswith("race: ")


def test_warps_at_different_barriers():
    with pytest.raises(PtxError) as caught:
        run("bar.sync 3, 64;", "bar.sync 4, 64;")
    assert "64 threads at barrier 3, where warps [0] are" in str(caught.value)
    assert "64 threads at barrier 4, where warps [1] are" in str(caught.value)


def test_a_barrier_with_two_numbers_of_threads():
    seen, _ = run("bar.sync 3, 64;", "bar.sync 3, 32;")
    assert seen[0].startswith("barrier: barrier 3 for")


def test_a_barrier_that_some_threads_of_a_warp_miss():
    skip = "and.b32 %r9, %r0, 1; setp.eq.u32 %p5, %r9, 0; @%p5 bra $SKIP; bar.sync 3, 64; "
    with pytest.raises(PtxError, match="a barrier that some threads of a warp do not come to"):
        run(skip + "$SKIP: mov.b32 %r9, 0;", "bar.sync 3, 64;")


# Copies (cp.async).


@every_policy
def test_copies_are_read_when_they_are_waited_for_and_known_of(policy: str):
    copy = address_of("%rd0", "%r0", 4, "%rd9") + "mov.b32 %r4, 0;"
    copy += "cp.async.ca.shared.global [ %r5 + 0 ], [ %rd9 + 0 ], 0x4, 4; cp.async.commit_group;"
    body = START.format(count=1) + "xor.b32 %r6, %r5, 128;" + copy + "{} ld.shared.b32 %r4, "
    body += "[ %r6 + 0 ]; bar.sync 0;" + RESULT

    def found(text: str) -> tuple[list[str], list[int]]:
        tensor = torch.arange(64, dtype=torch.int32)
        faults = run_ptx(body.replace("{}", text), tensor, threads=64, shared=2048, schedule=policy)
        return faults, tensor.tolist()

    assert found("cp.async.wait_group 0; bar.sync 0;") == ([], [*range(32, 64), *range(32)])
    for bad in ("cp.async.wait_group 1; bar.sync 0;", "bar.sync 0; cp.async.wait_group 0;"):
        faults, _ = found(bad)
        assert faults[0].startswith("race: reads what a copy of warp"), bad


# Registers.


def test_registers_wait_until_others_give_some():
    moves = "setmaxnreg.dec.sync.aligned.u32 24;", "setmaxnreg.inc.sync.aligned.u32 {};"
    for policy in POLICIES:
        first, second = moves[0], moves[1].format(56)
        assert run(first, second, schedule=policy, directives=".maxnreg 40")[0] == []
    with pytest.raises(PtxError, match=r"wait at line \d+ for 768 registers, of which the pool"):
        run(moves[0], moves[1].format(64), directives=".maxnreg 40")
    with pytest.raises(PtxError, match="registers: from 40 of them to 48"):
        run(moves[0].replace("24", "48"), "", directives=".maxnreg 40")


# Elections.


def test_one_thread_is_elected_and_not_always_the_first():
    leaders = set()
    for seed in range(6):
        output = torch.zeros(32, dtype=torch.int32)
        body = "elect.sync %r4|%p1, -1; selp.b32 %r5, 100, 0, %p1; add.s32 %r4, %r4, %r5;" + RESULT
        assert run_ptx(body, output, schedule=f"random:{seed}") == []
        (leader,) = output.ge(100).nonzero().flatten().tolist()
        assert output.tolist() == [leader + 100 * (n == leader) for n in range(32)]
        leaders.add(leader)
    assert len(leaders) > 1


# Which machine, where, and in which order.


def test_what_needs_warps_that_go_their_own_ways():
    for body, expected in (
        ("bar.sync 0;", False),
        ("bar.warp.sync -1;", False),
        ("bar.sync 1, 64;", True),
        (START.format(count=1), True),
    ):
        assert parse(write_kernel(body, 0)).by_warp == expected


def test_blocks_end_behind_what_waits():
    kernel = parse(write_kernel(two_warps(ARRIVE, wait(0)), 1, 64))
    targets = dict(kernel.labels)
    first = {name: kernel.blocks[target][:1] for name, target in targets.items()}
    kernel.cut_behind(re.compile("mbarrier"))
    for block in kernel.blocks:
        assert not any(i.opcode == "mbarrier" for i, _ in pairwise(block))
    assert {name: kernel.blocks[n][:1] for name, n in kernel.labels.items()} == first


def test_an_indexed_branch():
    body = """
        shr.u32 %r3, %r0, 4;
        $TABLE: .branchtargets $ONE, $TWO;
        brx.idx %r3, $TABLE;
        $ONE: mov.b32 %r4, 1; bra $END;
        $TWO: mov.b32 %r4, 2;
        $END: mov.b32 %r5, 0;
    """
    output = torch.zeros(32, dtype=torch.int32)
    assert run_ptx(body + RESULT, output) == []
    assert output.tolist() == [1] * 16 + [2] * 16


def test_a_line_of_the_source_is_named():
    text = write_kernel(".loc 1 42 7\nfrobnicate.b32 %r1;", 0) + '.file 1 "/a/b/kernel.py"'
    (i,) = (i for block in parse(text).blocks for i in block if i.opcode == "frobnicate")
    assert i.place.endswith(" (kernel.py:42)")


def test_a_schedule_is_written_and_read():
    assert str(Schedule.parse("late:3")) == "late:3"
    assert Schedule.parse("early") == Schedule("early", 0)
    with pytest.raises(ValueError, match="expected one of random, priorities"):
        Schedule.parse("soon")
