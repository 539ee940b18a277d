"""The tool that measures models of transformers."""

import json
import os
import subprocess
import sys

import pytest

from bench.environment import ROOT
from fastattn.ops.core.backends import INTERPRETED


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED or sys.platform != "linux", reason="measures the reference backend")
def test_contenders_compute_the_same(tmp_path):
    pytest.importorskip("transformers")
    file = tmp_path / "models.json"
    command = [sys.executable, "-m", "bench.hugging_face", "--model", "llama", "--rounds", "1"]
    command += ["--layers", "1", "--width", "64", "--vocabulary", "256", "--length", "16"]
    command += ["--contender", "sdpa", "liger", "fastattn", "--threads", "1", "--out", str(file)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(file.read_text())
    assert result["not_run"] == {"liger": "its kernels need a GPU"}
    assert "liger: not run here" in done.stdout
    rows = result["results"]
    found = {(row["what"], row["contender"]): row for row in rows}
    assert set(found) == {
        (w, c) for w in ("prefill", "training step") for c in ("sdpa", "fastattn")
    }
    assert all(row["tokens_per_second"] > 0 for row in rows)
    for what in ("prefill", "training step"):
        theirs, ours = (found[what, contender]["number"] for contender in ("sdpa", "fastattn"))
        # The numbers are near 5, where a unit of float32 is 2^-21.
        assert abs(theirs - ours) <= 16 * 2.0**-21
