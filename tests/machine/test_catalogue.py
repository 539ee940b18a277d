"""A part of the catalogue as compiled for GPUs, executed: what `check --compiled` does in full."""

import subprocess
import sys

import pytest

from fastattn.ops.core.catalog import OPERATIONS

GROUPS = {
    "attention": ["attention"],
    "attention's kin": ["attention_varlen", "attention_weights"],
    "norms": ["rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm"],
    "products": ["matmul", "linear", "gated_linear"],
    "losses": ["cross_entropy", "linear_cross_entropy", "softmax", "log_softmax"],
}
GROUPS["the others"] = [
    name for name in OPERATIONS if not any(name in group for group in GROUPS.values())
]
"""Ops that one process checks; the start of a process takes as long as some of them."""


KNOWN = ["cross_entropy_forward_kernel: line"]
"""Faults that are known: lanes of one row disagree by a unit in the last place after a reduction,
whose first step the compiler contracts, so that which of their values is stored is open."""


def check(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "fastattn", "check", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=280)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("group", GROUPS)
def test_compiled_code_is_right(group: str, target: str):
    ops = [word for name in GROUPS[group] for word in ("--op", name)]
    dtypes = ["--dtype", "float32", "--dtype", "bfloat16"]
    done = check("--compiled", target, "--samples", "2", *dtypes, *ops)
    assert "FAILED" not in done.stdout, done.stdout
    faults = [line for line in done.stdout.splitlines() if "FAULT" in line]
    unknown = [line for line in faults if not any(known in line for known in KNOWN)]
    assert not unknown, done.stdout
    assert done.returncode == (1 if faults else 0), done.stdout + done.stderr


def test_a_target_that_the_machine_does_not_know():
    done = check("--compiled", "gfx942")
    assert done.returncode == 2
    assert "sm_80, sm_86, sm_89, sm_90, sm_120" in done.stderr
