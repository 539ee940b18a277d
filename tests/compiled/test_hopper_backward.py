"""The warp-specialised backward's machine code: registers, products, and its predicted speed.

Nothing here ran on a GPU; the shares are the model's, with its errors (docs/speed.md).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastattn.kernels import tuning
from fastattn.kernels.attention.hopper.backward_config import (
    KEYS,
    QUERIES,
    RULES,
    hopper_backward_config,
)
from fastattn.kernels.config import Target

FLOORS = {
    KEYS: {(64, 64): 0.60, (96, 96): 0.60, (128, 128): 0.80, (192, 128): 0.65},
    QUERIES: {(64, 64): 0.55, (96, 96): 0.60, (128, 128): 0.80, (192, 128): 0.70},
}
"""The least share of the tensor cores' peak that is predicted for causal attention, in the loop
over whole blocks of each consumer."""

FULL_LOOP = 0.8
"""A loop without masks has at most this share of the instructions of one with masks."""

MOST_SPILLED = {(KEYS, (128, 128)): 64, (KEYS, (192, 128)): 16}
"""Bytes that a thread keeps in local memory while it is in a loop; 0 where none stands here."""

MOST_RELOADED = {(KEYS, (128, 128), "window"): 1}
"""How many loads from it loops have, all of them with masks; 0 where none stands here."""


def compile_kernels() -> list[dict[str, Any]]:
    """What a process of its own says of each kernel: Triton keeps compiled kernels by device."""
    script = Path(__file__).with_name("hopper_backward_code.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check_machine_code(compiled: list[dict[str, Any]]) -> None:
    cases = {(kernel["kernel"], tuple(kernel["dims"])) for kernel in compiled}
    assert cases == {(kernel, dims) for kernel, rule in RULES.items() for dims in rule}
    for kernel in compiled:
        name = kernel["kernel"], tuple(kernel["dims"])
        case = *name, kernel["case"]
        assert kernel["spill_bytes"] <= MOST_SPILLED.get(name, 0), case
        assert all(used <= limit for limit, used in kernel["registers"]), (case, kernel)
        # One with masks and one without for each of two consumers.
        assert len(kernel["loops"]) == 4, case
        for loop in kernel["loops"]:
            assert not loop["hazards"], case
            assert not loop["serialized"], case
        reloaded = sum(loop["spills"] for loop in kernel["loops"])
        assert reloaded <= MOST_RELOADED.get(case, 0), case


def check_predicted_share(compiled: list[dict[str, Any]]) -> None:
    for kernel in (kernel for kernel in compiled if kernel["case"] == "causal"):
        most = max(loop["instructions"] for loop in kernel["loops"])
        full = [x for x in kernel["loops"] if x["instructions"] < FULL_LOOP * most]
        assert len(full) == 2
        floor = FLOORS[kernel["kernel"]][tuple(kernel["dims"])]
        assert min(loop["share"][0] for loop in full) >= floor, kernel


@pytest.mark.proof
def test_the_machine_code() -> None:
    compiled = compile_kernels()
    check_machine_code(compiled)
    check_predicted_share(compiled)


def test_no_table_that_ships_turns_it_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuning.forget_tables()
    target = Target("cuda", 90, 32, 132, 232_448)
    for kernel, rule in RULES.items():
        for dims, config in rule.items():
            assert hopper_backward_config(kernel, *dims, target) == config
            assert not config.used
    monkeypatch.undo()
    tuning.forget_tables()
