"""python -m fastattn tune: what it says without a GPU, its dry run, and the tables it writes."""

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from fastattn.commands import tune
from fastattn.commands.tunables import TUNABLES
from fastattn.ops.core.backends import INTERPRETED
from support import DEVICE

MATMUL = next(tunable for tunable in TUNABLES if tunable.kernel == "matmul")
ATTENTION = [t for t in TUNABLES if t.kernel.startswith("attention") and t.tiny_shapes]
TINY = (40, 33, 70, torch.float32, "ieee", "kk")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "fastattn", "tune", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.skipif(INTERPRETED, reason="the command chooses the interpreter by itself")
def test_without_a_gpu_it_says_why_nothing_is_timed():
    done = run()
    assert done.returncode == 2
    assert "there is no GPU here" in done.stderr
    assert "--dry-run" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="the command chooses the interpreter by itself")
def test_a_dry_run_checks_candidates_of_every_kernel(tmp_path):
    done = run("--dry-run", "--out", str(tmp_path / "table.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "nothing was timed, and no table was written"
    shapes = sum(len(tunable.tiny_shapes) for tunable in TUNABLES)
    assert len(lines) == 1 + shapes * (1 + tune.DRY_CANDIDATES)
    assert all(line.endswith(": right") for line in lines[:-1])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "soon"])
def test_a_time_that_is_none_is_refused(minutes, capsys):
    with pytest.raises(SystemExit) as ended:
        tune.main(["--minutes", minutes])
    assert ended.value.code == 2
    assert "--minutes" in capsys.readouterr().err


@pytest.mark.kernels
@pytest.mark.skipif(not INTERPRETED, reason="about the interpreter")
def test_the_interpreter_is_not_timed(capsys):
    assert tune.main([]) == 2
    assert "the interpreter is on" in capsys.readouterr().err


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What a stand-in for timing gives, one after another: the rule, candidates, PyTorch."""
    import triton.testing

    milliseconds: list[float] = []
    monkeypatch.setattr(triton.testing, "do_bench", lambda call, **_: milliseconds.pop(0))

    @contextlib.contextmanager
    def shared_memory(kernel: str) -> Any:
        assert kernel == "matmul_kernel"
        yield [1000, 2000]

    monkeypatch.setattr(tune, "_shared_memory", shared_memory)
    return milliseconds


def with_candidates(count: int) -> Any:
    return replace(MATMUL, candidates=lambda *a, **f: MATMUL.candidates(*a, **f)[:count])


@pytest.mark.kernels
@pytest.mark.skipif(not INTERPRETED, reason="needs no GPU")
def test_the_fastest_is_kept(measured):
    measured += [3.0, 2.0, 1.0, 4.0, 0.5]
    entry, wrong = tune.measure(with_candidates(3), TINY, "cpu", {}, float("inf"))
    assert entry is not None
    assert not measured
    assert wrong == 0
    second = MATMUL.candidates(tune_target(), **entry["features"])[1]
    assert entry["config"] == vars(second)
    assert entry["microseconds"] == 1000.0
    assert entry["rule_microseconds"] == 3000.0
    assert entry["torch_microseconds"] == 500.0
    assert entry["shared_memory"] == 2000


@pytest.mark.kernels
@pytest.mark.skipif(not INTERPRETED, reason="needs no GPU")
def test_past_the_deadline_the_rule_stands(measured):
    measured += [3.0, 0.5]
    entry, _ = tune.measure(with_candidates(3), TINY, "cpu", {}, 0.0)
    assert entry is not None
    assert entry["microseconds"] == entry["rule_microseconds"] == 3000.0


@pytest.mark.kernels
@pytest.mark.skipif(not INTERPRETED, reason="needs no GPU")
def test_wrong_numbers_are_never_the_fastest(measured, capsys):
    measured += [3.0, 0.5]

    def case(*shape: Any) -> Any:
        right = MATMUL.case(*shape)
        rule = MATMUL.rule(tune_target(), **right.features)

        def launch(config: Any) -> torch.Tensor:
            return right.launch(config) + (0.0 if config == rule else 1e-3)

        return replace(right, launch=launch)

    entry, wrong = tune.measure(
        replace(with_candidates(2), case=case), TINY, "cpu", {}, float("inf")
    )
    assert wrong == 2
    assert entry is not None
    assert entry["microseconds"] == 3000.0
    assert capsys.readouterr().out.count("WRONG") == 2


def tune_target() -> Any:
    from fastattn.kernels.config import INTERPRETER

    return INTERPRETER


def test_entries_replace_those_of_the_same_features(tmp_path):
    path = tmp_path / "new" / "sm90.json"
    for n, block in ((1, 16), (2, 32), (1, 64)):
        entry = {"features": {"n": n}, "config": {"block": block}, "shared_memory": 0}
        tune.write_entry(path, "kernel", entry)
    tune.write_entry(path, "other", entry)
    table = json.loads(path.read_text())
    blocks = {e["features"]["n"]: e["config"]["block"] for e in table["kernels"]["kernel"]}
    assert blocks == {1: 64, 2: 32}
    assert len(table["kernels"]["other"]) == 1
    assert {"gpu", "triton", "torch", "date", "format"} <= set(table)
    assert [p.name for p in path.parent.iterdir()] == ["sm90.json"]


def test_a_written_table_is_chosen_from(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    from fastattn.kernels import tuning
    from fastattn.kernels.config import Target
    from fastattn.kernels.matmul.config import MatmulConfig, matmul_config

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuning.forget_tables()
    target = Target("cuda", 90, 32, multiprocessors=132, shared_memory=232448)
    best = MatmulConfig(64, 256, 64, num_warps=8, num_stages=3, persistent=True)
    features = {"m": 4096, "n": 4096, "k": 4096, "batch": 1, "dtype": "bfloat16"}
    features |= {"precision": "ieee", "units": "kk", "fused": False}
    entry = {"features": features, "config": vars(best), "shared_memory": 200_000}
    tune.write_entry(tuning.user_tables() / "sm90.json", "matmul", entry)
    sizes = (4000, 4096, 4096, 1, "bfloat16", "ieee")
    assert matmul_config(*sizes, "kk", False, target) == best
    assert matmul_config(*sizes, "kn", False, target) != best
    tuning.forget_tables()


@pytest.mark.kernels
@pytest.mark.parametrize("tunable", ATTENTION, ids=lambda tunable: tunable.kernel)
def test_candidates_of_attention_compute_the_same(tunable):
    from fastattn.kernels.config import find_target

    case = tunable.case(*tunable.tiny_shapes[-1], DEVICE)
    target = find_target(torch.empty(0, device=DEVICE))
    rule = tunable.rule(target, **case.features)
    candidates = tunable.candidates(target, **case.features)
    assert rule not in candidates
    assert len(set(candidates)) == len(candidates) > 10
    for config in (rule, *candidates[:4]):
        assert tune._check(case, config) is None, config


def test_a_table_has_its_say_in_attention(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    from fastattn.kernels import tuning
    from fastattn.kernels.attention.config import AttentionConfig, attention_forward_config
    from fastattn.kernels.attention.plan import bound_launch
    from fastattn.kernels.config import Target

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuning.forget_tables()
    assert bound_launch.cache_info().currsize == 0
    target = Target("cuda", 90, 32, multiprocessors=132, shared_memory=232448)
    best = AttentionConfig(64, 64, num_warps=4, num_stages=4)
    features = {"key_dim": 64, "value_dim": 64, "operands": "16 bits", "term_class": "plain"}
    entry = {"features": features, "config": vars(best), "shared_memory": 100_000}
    tune.write_entry(tuning.user_tables() / "sm90.json", "attention_forward", entry)
    rest = (torch.bfloat16, "ieee", "plain", target)
    assert attention_forward_config(64, 64, *rest) == best
    assert attention_forward_config(128, 128, *rest) != best
    tuning.forget_tables()


def test_kernels_take_turns():
    order = list(tune.take_turns(TUNABLES))
    assert [tunable for tunable, _ in order[: len(TUNABLES)]] == list(TUNABLES)
    assert len(order) == sum(len(tunable.shapes) for tunable in TUNABLES)
    for tunable in TUNABLES:
        assert [shape for other, shape in order if other is tunable] == list(tunable.shapes)
