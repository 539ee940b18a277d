"""Kernels are compiled once, whatever the number of rows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from fastattn.ops.core.catalog import OPERATIONS
from support import DEVICE

ROOT = Path(__file__).parents[2]


@pytest.mark.proof
def test_row_counts_do_not_compile_again():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    script = Path(__file__).with_name("count_compilations.py")
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert {name.split(":")[0] for name in counts} == set(OPERATIONS)
    for name, count in counts.items():
        assert count["first"] >= 1, name
        # A choice that chooses nothing would excuse what it should not.
        assert (count["chosen"] > count["first"]) is (count["choices"] > 1), f"{name}: {count}"
        assert count["all"] == count["chosen"], f"{name}: {count}"


@pytest.mark.kernels
@pytest.mark.parametrize("name", ["rms_norm", "layer_norm", "dropout"])
def test_dynamo_traces_at_most_twice_while_rows_vary(name):
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(OPERATIONS[name].function, backend=counter, fullgraph=True)
    for rows in (2, 3, 5, 8, 13, 21):
        compiled(torch.randn(rows, 32, device=DEVICE))
    # Once for the first size, and once more for sizes in general.
    assert counter.frame_count <= 2
