"""The tool that measures the cost on the host."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.registry import OPS

ROOT = Path(__file__).parents[2]


# It compiles a kernel or more for each of them.
@pytest.mark.timeout(900)
def test_ops_are_timed(tmp_path: Path) -> None:
    result = tmp_path / "cost.json"
    # One of each family: every other one compiles kernels of its own.
    names = ("attention causal", "gated_linear", "cross_entropy", "rms_norm", "linear", "softmax")
    ops = [op for op in OPS if op.name in names]
    assert len(ops) == len(names)
    command = [sys.executable, "-m", "bench.host_cost", "--repeats", "3", "--seconds", "0.001"]
    command += ["--op", *(op.name for op in ops)]
    subprocess.run(
        [*command, "--json", str(result)], check=True, cwd=ROOT, stdout=subprocess.DEVNULL
    )
    costs = {
        (cost["op"], cost["who"], cost["mode"]): cost["microseconds"]
        for cost in json.loads(result.read_text())["costs"]
    }
    # How long they take is for a quiet machine to say.
    for op in ops:
        for who in ("fastattn", "torch") if op.torch else ("fastattn",):
            assert costs[op.name, who, "forward"] > 0
            assert costs[op.name, who, "forward+backward"] > 0
    assert costs["this machine", "a Triton launch", "forward"] > 0
