"""Attention's machine code: composed terms are free, and full blocks know of no mask."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.proof


def printed_by(script: str, *arguments: str) -> Any:
    """What a script beside this file prints as JSON, compiling in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(script)), *arguments],
        check=False,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return printed_by("attention_code.py")


def test_composed_terms_cost_no_instruction(report):
    counted = report["composition"]
    assert counted["by_terms_kernel"] == counted["by_hand_kernel"] > 100


@pytest.mark.parametrize("case", ["full", "causal", "window"])
def test_products_are_hoppers_and_copies_asynchronous(report, case):
    code = report[case]
    assert code["hopper_products"] >= 2 * len(code["loops"])
    assert code["async_copies"] > 0
    # A window's three loops leave the code between them short of a few registers.
    assert code["spill_bytes"] <= (16 if case == "window" else 0)


def test_the_loop_over_full_blocks_carries_no_mask(report):
    full_blocks, last_block = sorted(report["full"]["loops"])
    assert full_blocks < last_block
    # Triton 3.6 moves one instruction in or out.
    assert abs(sorted(report["causal"]["loops"])[0] - full_blocks) <= 1
    # With a window a third loop takes registers and moves a few instructions.
    unmasked, *masked = sorted(report["window"]["loops"])
    assert unmasked <= 1.05 * full_blocks
    assert len(masked) == 2
    assert min(masked) > 1.3 * unmasked


def test_a_term_that_was_edited_is_compiled_again(tmp_path):
    # Triton keeps what it compiled on disk, and of functions in a tuple it looks at names alone.
    assert printed_by("edited_term.py", str(tmp_path)) == [0, 1, 2, 0]
