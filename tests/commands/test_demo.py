"""The command `demo`, as a user starts it."""

import importlib.util
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastattn import models
from fastattn.commands import demo
from fastattn.ops.core.backends import HAS_TRITON

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("safetensors")

SMALL = ["--width", "16", "--layers", "1", "--context", "16", "--batch", "2", "--device", "cpu"]


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.py"
    path.write_text("def area(self):\n    return self.width * self.height\n\n" * 400)
    return path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps"),
        (["--batch", "many"], "--batch"),
        (["--seed", "-1"], "--seed"),
        (["--unknown"], "--unknown"),
        (["--dtype", "int8"], "--dtype"),
        (["--model", "mamba"], "--model"),
        (["--device", "cpu", "--context", "1"], "--context 1"),
        (["--device", "toaster"], "--device toaster is unknown"),
        (["--device", "meta"], "--device meta is not supported"),
        (["--device", "cuda:99"], "--device cuda:99 is not there"),
        (["--device", "cpu", "--width", "30", "--heads", "4"], "4 heads"),
        (["--device", "cpu", "--width", "7"], "--width 7"),
        (["--data", "no-such-file"], "no-such-file: No such file"),
        (["--data", "short.txt"], "short.txt has 5 bytes"),
        (["--data", "empty"], "empty has 0 bytes"),
        (["--out", "short.txt"], "short.txt: File exists"),
    ],
)
def test_bad_use_is_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("short")
    Path("empty").mkdir()
    assert demo.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert message in captured.err


def test_missing_packages_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "rich" else find_spec(name)
    )
    assert demo.main([]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "rich" in error
    assert 'pip install "fastattn[demo]"' in error


def start(arguments: list[str], prelude: str = "pass") -> subprocess.Popen[str]:
    """Start the command as a user would, after some Python of the test's own."""
    code = (
        f"{prelude}; import sys; from fastattn.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, "demo", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_use_part_leaves_all_results(text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--part", "use", "--steps", "4", "--data", str(text_file)]
    with start([*arguments, "--out", str(out), *SMALL]) as process:
        output, errors = process.communicate()
    assert (process.returncode, errors) == (0, "")
    assert "LlamaForCausalLM of fastattn.models" in output
    assert "proves nothing about the kernels" in " ".join(output.split())
    names = sorted(path.name for path in out.iterdir())
    assert names == ["use-model", "use.json", "use.png", "use.txt"]

    content = json.loads((out / "use.json").read_text())
    assert list(content["runs"]) == ["fused"]
    assert content["largest_loss_difference"] is None
    assert len(content["runs"]["fused"]["steps"]) == 4
    assert content["arguments"]["width"] == 16
    assert content["versions"]["torch"].startswith(torch.__version__)
    assert (out / "use.png").read_bytes().startswith(b"\x89PNG")
    assert content["model"] == "fastattn.models.llama"
    assert models.from_pretrained(out / "use-model").config.hidden_size == 16


@pytest.mark.slow
def test_another_family_is_trained(text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--part", "use", "--model", "bert", "--steps", "2", "--data", str(text_file)]
    with start([*arguments, "--out", str(out), *SMALL]) as process:
        output, errors = process.communicate()
    assert (process.returncode, errors) == (0, "")
    assert "Held-out text with masked bytes" in output
    assert type(models.from_pretrained(out / "use-model")).__name__ == "BertForMaskedLM"


@pytest.mark.skipif(not HAS_TRITON, reason="the kernels need triton")
@pytest.mark.slow
def test_evidence_part_compares_interpreted_kernels(text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--part", "evidence", "--steps", "3", "--data", str(text_file)]
    with start([*arguments, "--out", str(out), *SMALL]) as process:
        output, errors = process.communicate()
    assert (process.returncode, errors) == (0, "")
    assert "plain PyTorch" in output
    assert "fastattn (interpreted)" in output
    content = json.loads((out / "evidence.json").read_text())
    plain, fused = content["runs"]["plain"], content["runs"]["fused"]
    assert plain["job"]["backend"] == "reference"
    assert fused["job"]["backend"] == "triton"
    assert len(plain["steps"]) == len(fused["steps"]) == 3
    assert content["largest_loss_difference"]["compared_steps"] == 3
    assert content["largest_loss_difference"]["value"] < 1e-5


@pytest.mark.slow
def test_ctrl_c_stores_what_there_is(text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--part", "use", "--steps", "1000000", "--data", str(text_file)]
    with start([*arguments, "--out", str(out), *SMALL]) as process:
        assert process.stdout is not None
        read = ""
        while "at step 0" not in read:
            read += process.stdout.read(1)
            assert process.poll() is None
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate()
    assert (process.returncode, errors) == (130, "")
    assert "Ended by Ctrl-C" in output
    fused = json.loads((out / "use.json").read_text())["runs"]["fused"]
    assert fused["interrupted"] is True
    assert 0 < len(fused["steps"]) < 1_000_000
    assert fused["validations"][-1]["step"] == len(fused["steps"])
    assert (out / "use-model" / "model.safetensors").exists()


@pytest.mark.slow
def test_full_disk_keeps_earlier_results(text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "use-model").mkdir(parents=True)
    earlier = [out / "use.json", out / "use-model" / "model.safetensors"]
    for path in earlier:
        path.write_text("earlier")
    arguments = ["--part", "use", "--steps", "2", "--data", str(text_file)]
    # The text fits under the limit on a file's size and the checkpoint does not.
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))"
    with start([*arguments, "--out", str(out), *SMALL, "--width", "64"], limit) as process:
        output, errors = process.communicate()
    assert process.returncode == 2
    assert len(errors.splitlines()) == 1
    assert "File too large" in errors
    assert "earlier results are kept" in errors
    # The numbers are shown all the same.
    assert "validation loss" in output
    assert "parameters" in output
    assert sorted(path for path in out.rglob("*") if path.is_file()) == sorted(earlier)
    assert all(path.read_text() == "earlier" for path in earlier)
