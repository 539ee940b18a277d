"""The kernels' predicted cost against its budget, and the table of what does not keep it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.compiled.cost.hardware import HARDWARE
from bench.compiled.cost.known import COVERED, KNOWN
from bench.registry import OPS

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.proof, pytest.mark.timeout(1800)]


def test_the_problems_are_exactly_the_known_ones(tmp_path: Path) -> None:
    result = tmp_path / "cost.json"
    command = [sys.executable, "-m", "bench.compiled", "--cost", "--quick", "--over"]
    command += ["--jobs", "2", "--time-limit", "1500", "--json", str(result), "--op", *COVERED]
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(result.read_text())["rows"]
    assert {(row["target"], row["op"], tuple(row["shape"])) for row in rows} == {
        (target, op.name, tuple(shape))
        for target in HARDWARE
        for op in OPS
        if op.name in COVERED
        for shape in op.quick_shapes
    }
    assert not any(loop["hazards"] for row in rows for loop in row["loops"])


def test_no_hazard_is_known() -> None:
    """A hazard is a wrong result; nothing may excuse one."""
    assert not any(problem.check == "hazard" for problem in KNOWN)


def test_a_target_without_a_model_is_refused() -> None:
    command = [sys.executable, "-m", "bench.compiled", "--cost", "--target", "gfx942"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "no model of gfx942" in done.stderr
