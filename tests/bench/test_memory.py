"""The tool that measures memory tells an op that holds all logits from one that does not."""

import json
import subprocess
import sys

import pytest

from bench.environment import ROOT
from fastattn.ops.core.backends import INTERPRETED

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="runs the reference backend"),
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]


@pytest.mark.parametrize("op", ["linear_cross_entropy", "linear_log_prob"])
def test_logits_are_seen(op, tmp_path):
    file = tmp_path / "memory.json"
    command = [sys.executable, "-m", "bench.memory", "--op", op, "--shape", "2048", "32", "8192"]
    command += ["--contender", "fastattn", "torch", "--rounds", "1", "--threads", "1"]
    subprocess.run([*command, "--out", str(file)], cwd=ROOT, check=True)
    document = json.loads(file.read_text())
    assert document["op"] == op
    ours, plain = document["results"]
    assert (ours["contender"], plain["contender"]) == ("fastattn", "torch")
    assert plain["peak_bytes"] > 2048 * 8192 * 4
    assert ours["peak_share"] < 0.75
    assert plain["peak_share"] == plain["seconds_share"] == 1.0
    assert ours["seconds"] > 0.0
