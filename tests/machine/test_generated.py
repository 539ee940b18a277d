"""Random calls and repeated launches as compiled for GPUs: a part of what tests/ops has of them.

Every other op is called as compiled for sm_80 and the rest for sm_90, and the other way round with
an odd seed. In full: `pytest --compiled sm_90 -m kernels --examples 20
tests/ops/test_random_calls.py`, and the same with tests/ops/test_repeated_launches.py.
"""

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from support import OPERATIONS, Seed

# Compiling takes as long again where other work is done as well.
pytestmark = [pytest.mark.proof, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
TARGETS = ("sm_80", "sm_90")


def run(target: str, file: str, *options: str, tests: Iterable[str] = ("",)) -> None:
    """Run a file of tests, or some of them, on compiled code."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "kernels"]
    command += ["--compiled", target, *options]
    command += [f"tests/ops/{file}.py{test}" for test in tests]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=580, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("target", TARGETS)
def test_random_calls(target: str):
    ops = list(OPERATIONS)[(TARGETS.index(target) + Seed.value) % 2 :: 2]
    calls = [f"::test_any_call_in_any_layout[{op}]" for op in ops]
    run(target, "test_random_calls", "--examples", "1", tests=calls)


@pytest.mark.parametrize("op", ["rms_norm", "linear"])
def test_repeated_launches(op: str):
    run("sm_80", "test_repeated_launches", "-k", f"[{op}]")
