"""bench/gpu.sh walks all its steps without a GPU, and writes nothing into the checkout."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from bench.environment import ROOT
from fastattn.ops.core.backends import INTERPRETED

# A step has a part of the minutes given, and a busy machine takes longer for each.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(INTERPRETED, reason="the script chooses the interpreter by itself"),
]


def run(
    checkout: Path, *arguments: str, python: str | Path = sys.executable
) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": str(python), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [str(checkout / "bench" / "gpu.sh"), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def files(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.lstat().st_mtime_ns for path in folder.rglob("*")}


def test_a_dry_run_walks_every_step(tmp_path):
    checkout, out = tmp_path / "checkout", tmp_path / "out"
    shutil.copytree(
        ROOT,
        checkout,
        symlinks=True,
        ignore=shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info"),
    )
    before = files(checkout)
    done = run(checkout, str(out), "8", "--dry-run")
    summary = (out / "summary.txt").read_text()
    assert done.returncode == 0, summary
    assert files(checkout) == before

    left = sorted(path.name for path in out.iterdir())
    pictures = shutil.which("tar") is not None and "pictures: passed" in summary
    assert left == sorted(
        [
            "benchmarks.json",
            "benchmarks.txt",
            "check.txt",
            "environment.txt",
            "features.json",
            "features.md",
            "features.txt",
            "hopper.txt",
            *(["plots.tar.gz"] if pictures else []),
            "predicted.json",
            "predicted.txt",
            "races.txt",
            "summary.txt",
            "tests.txt",
        ]
    )
    steps = ("environment", "hopper", "check", "tests", "races", "features", "benchmarks")
    for step in (*steps, "predicted"):
        assert f"{step}: passed" in summary
    assert "tuner: " in summary
    assert "all passed" in (out / "check.txt").read_text()
    assert "torch" in (out / "environment.txt").read_text()
    for name in ("tests.txt", "races.txt"):
        assert " passed" in (out / name).read_text()
    assert json.loads((out / "benchmarks.json").read_text())["results"]
    pairs = json.loads((out / "predicted.json").read_text())["pairs"]
    assert {(pair["op"], pair["direction"]) for pair in pairs} == {
        ("dropout", "forward"),
        ("dropout", "backward"),
    }
    assert all(pair["measured"] > 0 and pair["predicted"][0] > 0 for pair in pairs)
    assert {row["kind"] for row in json.loads((out / "features.json").read_text())["results"]} == {
        "right"
    }
    if pictures:
        with tarfile.open(out / "plots.tar.gz") as packed:
            assert any(name.endswith(".png") for name in packed.getnames())


def test_a_step_that_fails_does_not_stop_the_next(tmp_path):
    # In place of Python, what fails at tests and else does nothing.
    python, out = tmp_path / "python", tmp_path / "out"
    python.write_text('#!/bin/sh\ncase "$*" in "-m pytest "*) exit 1 ;; esac\n')
    python.chmod(0o755)
    done = run(ROOT, str(out), "5", "--dry-run", python=python)
    summary = (out / "summary.txt").read_text()
    assert done.returncode == 1, summary
    for step in ("tests", "races"):
        assert f"{step}: FAILED with exit code 1" in summary
    for step in ("hopper", "check", "features", "benchmarks", "predicted", "tuner"):
        assert f"{step}: passed" in summary


@pytest.mark.parametrize(
    "arguments", [(), ("out",), ("out", "0"), ("out", "ten"), ("out", "1", "--dryrun")]
)
def test_wrong_arguments_say_how(arguments, tmp_path):
    done = run(ROOT, *(str(tmp_path / a) if a == "out" else a for a in arguments))
    assert done.returncode == 2
    assert done.stderr.startswith("usage: bench/gpu.sh OUT MINUTES")


def test_without_a_gpu_it_says_so(tmp_path):
    done = run(ROOT, str(tmp_path / "out"), "1")
    assert done.returncode == 2
    assert "no GPU" in done.stdout
