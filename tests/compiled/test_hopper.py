"""The warp-specialised forward's machine code: registers, products, and its predicted speed.

Nothing here ran on a GPU; the shares are the model's, with its errors (docs/speed.md).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.compiled.cost.listing import parse_body
from bench.compiled.cost.simulate import Turn
from bench.compiled.cost.specialised import find_turn, most_registers

FLOORS = {(64, 64): 0.55, (96, 96): 0.50, (128, 128): 0.67, (192, 128): 0.60}
"""The least share of the tensor cores' peak that is predicted for causal attention, in the loop
over whole blocks of each consumer."""

FULL_LOOP = 0.8
"""A loop without masks has at most this share of the instructions of one with masks."""


def test_the_turn_is_found_where_consumers_take_turns() -> None:
    wait = "1:-:-:- SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR5], R9"
    arrive = "1:-:-:- SYNCS.ARRIVE.TRANS64.A1T0 RZ, [UR5], RZ"
    done = "1:-:-:- WARPGROUP.DEPBAR.LE gsb0, 0x1"
    assert find_turn(parse_body(f"{wait}\n{wait}\n{arrive}\n{done}\n{arrive}")) == Turn(0, 2)
    assert find_turn(parse_body(f"{wait}\n{done}\n{arrive}")) is None


def test_registers_are_counted_by_their_limit() -> None:
    code = parse_body(
        "1:-:-:- MOV R7, RZ\n1:-:-:- USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xf0\n"
        "1:-:-:- HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24, gsb0\n"
        "1:-:-:- USETMAXREG.DEALLOC.CTAPOOL 0x18\n1:-:-:- LDS.128 R4, [R8]"
    )
    assert most_registers(code, 168) == [(168, 8), (240, 88), (24, 9)]


def compile_kernels() -> list[dict[str, Any]]:
    """What a process of its own says of each head: Triton keeps compiled kernels by device."""
    script = Path(__file__).with_name("hopper_code.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check_machine_code(compiled: list[dict[str, Any]]) -> None:
    assert {tuple(kernel["dims"]) for kernel in compiled} == set(FLOORS)
    for kernel in compiled:
        case = kernel["dims"], kernel["case"]
        assert kernel["kernel"] == "attention_hopper_forward_kernel", case
        assert kernel["spill_bytes"] == 0, case
        assert all(used <= limit for limit, used in kernel["registers"]), (case, kernel)
        assert not any(loop["hazards"] or loop["serialized"] for loop in kernel["loops"]), case
        # A loop with masks and one without for each consumer, or with a window two with masks.
        assert len(kernel["loops"]) == kernel["consumers"] * kernel["loops_of_consumer"], case


def check_predicted_share(compiled: list[dict[str, Any]]) -> None:
    for kernel in (kernel for kernel in compiled if kernel["case"] == "causal"):
        most = max(loop["instructions"] for loop in kernel["loops"])
        full = [x for x in kernel["loops"] if x["instructions"] < FULL_LOOP * most]
        assert len(full) == kernel["consumers"]
        floor = FLOORS[tuple(kernel["dims"])]
        assert min(loop["share"][0] for loop in full) >= floor, kernel


@pytest.mark.proof
def test_the_machine_code() -> None:
    compiled = compile_kernels()
    check_machine_code(compiled)
    check_predicted_share(compiled)
