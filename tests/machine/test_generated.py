"""Random calls and repeated launches as compiled for GPUs: a part of what tests/ops has of them.

In full: `pytest --compiled sm_90 -m kernels --examples 20 tests/ops/test_random_calls.py`, and the
same with tests/ops/test_repeated_launches.py.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(target: str, file: str, *options: str) -> None:
    """Run a file of tests on compiled code."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "kernels"]
    command += ["--compiled", target, *options, f"tests/ops/{file}.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=280, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_random_calls(target: str):
    run(target, "test_random_calls", "--examples", "1")


@pytest.mark.slow
@pytest.mark.parametrize("op", ["rms_norm", "softmax", "linear"])
def test_repeated_launches(op: str):
    run("sm_80", "test_repeated_launches", "-k", f"[{op}]")
