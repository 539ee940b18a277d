"""The tool that times generation."""

import json
import subprocess
import sys

import pytest

from bench.environment import ROOT
from fastattn.ops.core.backends import INTERPRETED

SMALL = ["--layers", "2", "--width", "64", "--context", "24", "--new", "8"]


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="times the reference backend")
@pytest.mark.parametrize("sizes", [SMALL, ["--demo"]])
def test_greedy_ways_choose_the_same_tokens(tmp_path, sizes):
    file = tmp_path / "generation.json"
    command = [sys.executable, "-m", "bench.generation", *sizes, "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(file.read_text())
    assert document["same_tokens"]
    ways = ["with a cache", "without", "with a draft", "by 4 beams"]
    assert [row["way"] for row in document["rows"]] == ways
    assert all(row["seconds"] > 0 for row in document["rows"])
