"""The machine code of every op, for GPUs that are not there, and proof that the checks can fail."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from bench.compiled.budget import ALLOWANCES, Allowance, problems
from bench.compiled.machine_code import Loop, MachineCode
from bench.compiled.measure import Row
from bench.registry import OPS

ROOT = Path(__file__).parents[2]
TARGETS = {"sm_80": ("bfloat16", "float32"), "sm_90": ("bfloat16",), "gfx942": ("bfloat16",)}
"""What is compiled here, and in which dtypes: `make compiled` has the rest."""

pytestmark = [pytest.mark.proof, pytest.mark.timeout(1800)]


@dataclass(frozen=True)
class Run:
    """What one run of the tool left behind."""

    exit_code: int
    output: str
    rows: list[dict[str, Any]]
    failures: list[dict[str, Any]]

    def problems(self, op: str) -> list[str]:
        return [problem for row in self.rows if row["op"] == op for problem in row["problems"]]


def run_tool(folder: Path, *options: str) -> Run:
    result = folder / "compiled.json"
    command = [sys.executable, "-m", "bench.compiled", "--json", str(result), *options]
    folders = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, folders))}
    done = subprocess.run(
        command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.exists(), done.stdout + done.stderr
    document = json.loads(result.read_text())
    return Run(done.returncode, done.stdout, document["rows"], document["failures"])


def run_once(factory: pytest.TempPathFactory, name: str, *options: str) -> Run:
    """What one run of the tool left behind, whichever of xdist's workers its tests are on."""
    folder = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    file = folder / f"{name}.json"
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.exists():
            run = run_tool(factory.mktemp(name), *options)
            file.write_text(json.dumps(asdict(run)))
    return Run(**json.loads(file.read_text()))


@pytest.fixture(scope="module")
def ops(tmp_path_factory: pytest.TempPathFactory) -> Run:
    runs = []
    for dtypes in dict.fromkeys(TARGETS.values()):
        targets = [target for target, own in TARGETS.items() if own == dtypes]
        options = ["--quick", "--over", "--jobs", "2", "--target", *targets, "--dtype", *dtypes]
        runs.append(run_once(tmp_path_factory, f"ops {' '.join(dtypes)}", *options))
    return Run(
        max(run.exit_code for run in runs),
        "".join(run.output for run in runs),
        [row for run in runs for row in run.rows],
        [failure for run in runs for failure in run.failures],
    )


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Run:
    # The time limit is there for the op that never ends.
    options = ("--cases", "faulty_kernels", "--jobs", "2", "--time-limit", "30")
    return run_once(tmp_path_factory, "faulty", *options, "--target", "sm_86")


def test_every_kernel_is_within_budget(ops: Run) -> None:
    assert ops.exit_code == 0, ops.output


def test_every_quick_case_was_compiled_forward_and_backward(ops: Run) -> None:
    """Had an op fallen back on the reference, its rows would be missing."""
    measured = {
        (row["op"], tuple(row["shape"]), row["dtype"], row["target"], row["phase"])
        for row in ops.rows
    }
    assert measured == {
        (op.name, shape, dtype, target, phase)
        for op in OPS
        for shape in op.quick_shapes
        for dtype in (str(dtype).removeprefix("torch.") for dtype in op.dtypes)
        for target, own in TARGETS.items()
        if dtype in own
        for phase in ("forward", *(("backward",) if op.own_gradients else ()))
    }


def test_every_allowance_has_a_reason() -> None:
    assert all(len(allowance.reason.split()) > 3 for allowance in ALLOWANCES)


def test_a_sound_kernel_passes(faulty: Run) -> None:
    assert [row["kernel"] for row in faulty.rows if row["op"] == "sound"] == ["sound_kernel"] * 2
    assert faulty.problems("sound") == []
    assert faulty.problems("product") == []


def test_an_odd_width_is_not_asked_for_wide_accesses(faulty: Run) -> None:
    (row, _) = (row for row in faulty.rows if row["op"] == "odd width")
    assert set(row["code"]["loads"]) == {"16"}
    assert row["problems"] == []


@pytest.mark.parametrize(
    ("op", "problems"),
    [
        ("empty", ("instructions", "stores")),
        ("spilling", ("spill bytes",)),
        ("scalar access", ("wide loads", "wide stores")),
        ("large product", ("shared memory",)),
    ],
)
def test_a_fault_is_found(faulty: Run, op: str, problems: tuple[str, ...]) -> None:
    found = faulty.problems(op)
    for problem in problems:
        assert any(text.startswith(problem) for text in found), found
    assert faulty.exit_code == 1


def test_a_product_off_the_tensor_cores_is_found() -> None:
    code = MachineCode(32, 0, 200, 1, {128: 4}, {128: 2}, 0, 0, 0, [Loop(60, 1, 0)])
    row = Row("op", "forward", "kernel", (64, 64), "bfloat16", "sm_90", 4, 0, 1, 2, 1, code)
    assert problems(row) == []
    assert problems(replace(row, tensor_core_dots=2)) == ["tensor-core instructions 1 < 2"]


def test_an_allowance_moves_one_limit_of_the_rows_that_it_names() -> None:
    code = MachineCode(255, 48, 200, 0, {128: 4}, {128: 2}, 0, 0, 0, [])
    row = Row("op", "forward", "kernel", (64, 64), "bfloat16", "sm_90", 4, 0, 1, 0, 0, code)
    for target, limit, found in (
        ("sm_*", 48, []),
        ("sm_*", 47, ["spill bytes 48 > 47"]),
        ("gfx*", 48, ["spill bytes 48 > 0"]),
    ):
        allowance = Allowance("spill bytes", limit, "a reason for the test", target=target)
        assert problems(row, [allowance]) == found


@pytest.mark.parametrize(
    ("op", "reason"),
    [
        ("large product", "out of resource: shared memory"),
        ("nothing backward", "no kernel was launched"),
        ("dies", "exit code 3"),
        ("never ends", "longer than 30 s"),
    ],
)
def test_a_failure_is_reported(faulty: Run, op: str, reason: str) -> None:
    (failure,) = (failure for failure in faulty.failures if failure["op"] == op)
    assert reason in failure["reason"]


def test_an_unknown_op_is_named() -> None:
    command = [sys.executable, "-m", "bench.compiled", "--op", "no_such_op"]
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "no_such_op" in done.stderr
