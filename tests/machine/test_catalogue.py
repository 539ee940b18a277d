"""A part of the catalogue as compiled for GPUs, executed: what `check --compiled` does in full."""

import subprocess
import sys

import pytest

from fastattn.ops.core.catalog import OPERATIONS

GROUPS = {
    "attention": ["attention"],
    "attention's kin": ["attention_varlen", "attention_weights"],
    "norms": [
        "rms_norm",
        "add_rms_norm",
        "layer_norm",
        "add_layer_norm",
        "gated_rms_norm",
        "modulated_layer_norm",
        "modulated_rms_norm",
    ],
    "products": ["matmul", "linear", "gated_linear"],
    "losses": ["cross_entropy", "linear_cross_entropy", "softmax", "log_softmax"],
    "log-probabilities": ["log_prob", "linear_log_prob", "linear_jsd", "linear_top_k_kl"],
}
GROUPS["the others"] = [
    name for name in OPERATIONS if not any(name in group for group in GROUPS.values())
]
"""Ops that one process checks; the start of a process takes as long as some of them."""


def check(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "fastattn", "check", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=280)


@pytest.mark.proof
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("group", GROUPS)
def test_compiled_code_is_right(group: str, target: str):
    ops = [word for name in GROUPS[group] for word in ("--op", name)]
    dtypes = ["--dtype", "float32", "--dtype", "bfloat16"]
    done = check("--compiled", target, "--samples", "2", *dtypes, *ops)
    assert "FAILED" not in done.stdout, done.stdout
    assert "FAULT" not in done.stdout, done.stdout
    assert done.returncode == 0, done.stdout + done.stderr


PROMISED = """
import torch

import fastattn
from fastattn.machine.execution import execute
from fastattn.ops.core.backends import assume_gpu

LENGTH = 37


def attend(tensors, **options):
    leaves = [x.clone().requires_grad_() for x in tensors[:3]]
    with fastattn.batch_invariant():
        o, lse = fastattn.attention(*leaves, return_lse=True, **options)
    return [o, lse, *torch.autograd.grad(o, leaves, tensors[3])]


def unaligned(x):
    wide = x.new_zeros(x.numel() + 1)
    wide[1:] = x.flatten()
    return wide[1:].view(x.shape)


with execute({target!r}) as execution, assume_gpu():
    torch.manual_seed(0)
    q, k, v, do = (torch.randn(1, h, 64, 16).to(torch.float16) for h in (2, 1, 1, 2))
    do[:, :, LENGTH:] = 0.0
    mask = (torch.arange(64) < LENGTH)[None, None, None]
    alone = attend([x[:, :, :LENGTH] for x in (q, k, v, do)])
    for own, other in zip(attend((q, k, v, do), mask=mask), alone, strict=True):
        assert torch.equal(own[:, :, :LENGTH], other)
    fused = [text for text in execution.programs if "attention_delta_kernel" in text]
    assert fused and not any("fma." in text for text in fused)
    q, k, v = (torch.randn(1, 1, 256, 64).to(torch.bfloat16) for _ in range(3))
    assert torch.equal(fastattn.attention(q, unaligned(k), v), fastattn.attention(q, k, v))
assert not execution.reports, execution.reports
"""


@pytest.mark.proof
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_a_mask_and_an_unaligned_key_leave_bits_as_they_are(target: str):
    """In 16 bits, where a mask's bytes may change the order of tensor cores' sums.

    Of keys that are not aligned, beside values that are, a copy is multiplied: for sm_90 Triton
    puts no fence between what `cp.async` wrote and the second product.
    """
    program = PROMISED.format(target=target)
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_target_that_the_machine_does_not_know():
    done = check("--compiled", "gfx942")
    assert done.returncode == 2
    assert "sm_80, sm_86, sm_89, sm_90, sm_120" in done.stderr
