"""python -m fastattn, info and check."""

import subprocess
import sys

import pytest
import torch

from fastattn import checking
from fastattn.__main__ import COMMANDS, main
from fastattn.commands import check
from fastattn.ops.core.catalog import OPERATIONS, Operation


def test_no_command_prints_what_there_is(capsys):
    assert main([]) == 2
    printed = capsys.readouterr().out
    assert all(name in printed for name in COMMANDS)


def test_unknown_command_is_refused(capsys):
    assert main(["dance"]) == 2
    assert "'dance'" in capsys.readouterr().err


def test_info_tells_versions_and_the_backend_of_each_device(capsys):
    assert main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = {line.split()[0]: line for line in lines}
    assert torch.__version__ in found["torch"]
    assert {"fastattn", "python", "triton", "cpu"} <= set(found)
    assert "backend" in found["cpu"]


def test_check_refuses_an_unknown_op(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["check", "--op", "dance"])
    assert stopped.value.code == 2
    assert "dance" in capsys.readouterr().err


@pytest.mark.slow
def test_check_runs_the_kernels_from_a_plain_process():
    command = [sys.executable, "-m", "fastattn", "check", "--quick", "--op", "dropout"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "all passed" in done.stdout
    assert "float32" in done.stdout


def wrong_by_a_thousandth(x, weight=None, **options):
    return OPERATIONS["rms_norm"].function(x, weight, **options) * 1.001


def wrong_gradient(x, weight=None, **options):
    y = OPERATIONS["rms_norm"].function(x, weight, **options)
    return y + (x - x.detach()) * 0.01


@pytest.mark.kernels
@pytest.mark.parametrize("wrong", [wrong_by_a_thousandth, wrong_gradient])
def test_check_fails_when_an_op_is_wrong(wrong, monkeypatch, capsys):
    right = OPERATIONS["rms_norm"]
    broken = Operation("rms_norm", wrong, right.reference, right.samples[1:2])
    monkeypatch.setattr(check, "OPERATIONS", {"rms_norm": broken})
    assert check.main(["--quick"]) == 1
    printed = capsys.readouterr().out
    assert "FAILED" in printed
    assert "1 failed" in printed or "2 failed" in printed


@pytest.mark.parametrize(
    ("value", "passes"),
    [(1.0, True), (1.0 + 2**-12, True), (1.0 + 2**-8, False), (float("nan"), False)],
)
def test_accuracy_rule(value, passes):
    truth = torch.ones(4, dtype=torch.float64)
    actual = torch.ones(4, dtype=torch.float16)
    actual[2] = value
    result = checking.compare_tensors("y", actual, [(truth.half(), truth)], checking.OUTPUT_FACTOR)
    assert result.passed is passes


def test_accuracy_rule_wants_infinities_in_their_places():
    truth = torch.tensor([1.0, float("inf")], dtype=torch.float64)
    good = checking.compare_tensors("y", truth.float(), [(truth.float(), truth)], 2.0)
    assert good.passed
    other = torch.tensor([1.0, -float("inf")])
    assert not checking.compare_tensors("y", other, [(truth.float(), truth)], 2.0).passed


def test_accuracy_rule_refuses_a_missing_result():
    truth = torch.ones(2, dtype=torch.float64)
    assert not checking.compare_tensors("dx", None, [(truth, truth)], 3.0).passed
