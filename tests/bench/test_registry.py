"""Every entry of the registry can be measured, and what is made of the measurements is sound."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.contenders import EAGER, OURS, TORCH, contender_names
from bench.environment import ROOT, commit
from bench.inputs import count_saved
from bench.op import BACKWARD, BOTH, DIRECTIONS, FORWARD
from bench.output import write
from bench.registry import OPS
from bench.timing import plots, results
from bench.timing.clock import Ceilings
from bench.timing.runner import Effort, measure_case, median_and_spread
from bench.timing.session import Session, default_target
from fastattn.ops.core.backends import INTERPRETED
from fastattn.ops.core.catalog import OPERATIONS

CPU = torch.device("cpu")
TIMED = [pytest.param(op, id=op.name) for op in OPS if op.benchmark is not None]
CEILINGS = Ceilings(copy=1e9, product=1e12)

pytestmark = pytest.mark.skipif(INTERPRETED, reason="times the reference backend")


def make_rows(op, shape, names=(OURS, EAGER, TORCH)):
    outcome = measure_case(op, shape, op.dtypes[0], CPU, names, Effort(rounds=3, seconds=0.1))
    return outcome, results.make_rows(
        op, shape, op.dtypes[0], outcome, CEILINGS, default_target(CPU), on_gpu=False
    )


@pytest.fixture(scope="module")
def document():
    op = next(op for op in OPS if op.name == "rms_norm")
    rows = [row for shape in ((8, 256), (4, 512)) for row in make_rows(op, shape)[1]]
    session = Session(ops=[op.name], device=CPU)
    session.document["results"] += rows
    return session.document


def test_every_file_of_ops_has_an_entry():
    measured = {op.call.__module__ for op in OPS}
    assert measured >= {operation.function.__module__ for operation in OPERATIONS.values()}
    assert len({op.name for op in OPS}) == len(OPS)


@pytest.mark.parametrize("op", TIMED)
def test_every_entry_is_measured(op):
    outcome, rows = make_rows(op, op.small)
    assert not outcome.failures
    assert {(row["contender"], row["direction"]) for row in rows} == {
        (name, direction) for name in (OURS, EAGER, TORCH) for direction in DIRECTIONS
    }
    for row in rows:
        assert row["milliseconds"] > 0
        assert 0 < row["bytes_least"] <= row["bytes_moved_by_fastattn"]
        floor = row["bytes_least"] / CEILINGS.copy
        assert math.isclose(row["share_of_ceiling"], floor / (row["milliseconds"] / 1e3))
        rate = op.timing.tokens(op.small) / (row["milliseconds"] / 1e3)
        assert math.isclose(row["tokens_per_second"] or 0.0, rate)
        assert row["goal"] is None
        assert row["calls"] >= 6
        if row["contender"] == OURS and row["direction"] != BOTH:
            assert row["error"] <= row["error_allowed"]
    json.dumps(rows, allow_nan=False)


@pytest.mark.parametrize("op", TIMED)
def test_sizes_are_larger_than_a_cache_and_have_bytes_and_goals(op):
    target = default_target(CPU)
    for shape in op.timing.sizes:
        for dtype in op.dtypes:
            traffic = op.timing.traffic(shape, dtype, target)
            # A product is bound by arithmetic long before its operands fill a cache.
            by_arithmetic = op.timing.flops(shape)[FORWARD] > 1e11
            assert by_arithmetic or traffic[FORWARD].least > 200e6
            for direction in (FORWARD, BACKWARD):
                assert traffic[direction].least <= traffic[direction].moved
        goal = op.timing.goal(FORWARD, shape)
        assert goal is None or 0 < goal < 1


def test_a_wrong_contender_is_seen_by_its_error():
    op = next(op for op in OPS if op.name == "rms_norm")
    benchmark = op.benchmark

    def wrong():
        return lambda x, weight, eps: op.reference(x, weight, 0.1)

    outcome = measure_with_rival(op, benchmark, wrong)
    found = outcome.measured["rival"].errors
    assert not found[FORWARD].passed
    assert not found[BACKWARD].passed
    assert outcome.measured[OURS].errors[FORWARD].passed


def test_a_contender_that_fails_is_reported_and_stops_nobody():
    op = next(op for op in OPS if op.name == "rms_norm")

    def missing():
        raise ImportError("no such package")

    def failing():
        def call(**arguments):
            raise RuntimeError("out of\nsomething")

        return call

    outcome = measure_with_rival(op, op.benchmark, missing)
    assert outcome.failures == {"rival": "not installed: no such package"}
    outcome = measure_with_rival(op, op.benchmark, failing)
    assert outcome.failures == {"rival": "RuntimeError: out of something"}
    assert outcome.measured[OURS].seconds[FORWARD]


def measure_with_rival(op, benchmark, rival):
    import dataclasses

    changed = dataclasses.replace(
        op, benchmark=dataclasses.replace(benchmark, rivals={"rival": rival})
    )
    assert contender_names(changed)[-1] == "rival"
    names = (OURS, "rival")
    return measure_case(changed, op.small, torch.float32, CPU, names, Effort(3, 0.1))


def test_a_contender_without_gradients_is_timed_forward(capsys):
    """flash-attn's attention to caches, which ours stands in for."""
    from fastattn.integrations.flash_attn import flash_attn_with_kvcache

    with pytest.MonkeyPatch.context() as patch:
        module = type(sys)("flash_attn")
        vars(module)["flash_attn_with_kvcache"] = flash_attn_with_kvcache
        patch.setitem(sys.modules, "flash_attn", module)
        for name in ("decode_attention", "decode_attention, pages"):
            op = next(op for op in OPS if op.name == name)
            outcome, rows = make_rows(op, op.small, (OURS, "flash-attn"))
            assert not outcome.failures
            own = [row for row in rows if row["contender"] == "flash-attn"]
            assert [row["direction"] for row in own] == [FORWARD]
            assert own[0]["error"] <= own[0]["error_allowed"]
            capsys.readouterr()
            results.print_case(rows, {})
            assert any(
                "flash-attn" in line and " - " in line
                for line in capsys.readouterr().out.splitlines()
            )


def test_what_is_kept_for_a_backward_is_counted():
    x = torch.randn(4, 8, requires_grad=True)
    for call, expected in ((torch.exp, 128), (torch.square, 0), (torch.neg, 0)):
        assert count_saved(lambda x, call=call: call(x), {"x": x}) == expected
    op = next(op for op in OPS if op.name == "mixture")
    _, rows = make_rows(op, op.small)
    pairs = op.small[0] * op.small[-1]
    for row in rows:
        assert row["saved_bytes"] >= 2 * pairs * op.small[2] * 2, "gate and up of each pair"


def test_shapes_of_ones_own():
    shapes = [(1, 32, 8, 1024, 128, 128), (128, 32, 8, 131072, 128, 128)]
    session = Session(ops=["decode_attention"], shapes=shapes, device=CPU)
    assert [case.shape for case in session.cases] == shapes
    with pytest.raises(ValueError, match=r"a shape of rms_norm has 2 numbers, as .*, got 4x5x6"):
        Session(ops=["rms_norm"], shapes=[(4, 5, 6)], device=CPU)


def test_the_median_and_the_spread():
    assert median_and_spread([1.0, 2.0, 3.0, 4.0, 100.0]) == (3.0, pytest.approx(25.25))


def test_a_file_says_where_it_comes_from(document, tmp_path):
    assert document["backend"] == "reference"
    assert document["device"]["type"] == "cpu"
    assert document["versions"]["torch"]
    assert document["commit"] == commit()
    path = tmp_path / "folder" / "results.json"
    write(path, document)
    assert json.loads(path.read_text()) == json.loads(json.dumps(document))
    assert [path] == list(path.parent.iterdir())


def test_the_comparison_tells_changes_from_noise(document, capsys):
    faster = json.loads(json.dumps(document))
    for row in faster["results"]:
        row["milliseconds"] = row["milliseconds"] * 0.5
        row["spread"] = 0.0
    for row in document["results"]:
        row["spread"] = 0.0
    results.print_comparison(document, faster)
    printed = capsys.readouterr().out
    assert printed.count("faster") == len(document["results"])
    results.print_comparison(document, document)
    printed = capsys.readouterr().out
    assert printed.count("within the spread") == len(document["results"])


def test_plots_are_drawn(document, tmp_path):
    pytest.importorskip("matplotlib")
    (picture,) = plots.draw(document, tmp_path, "stem")
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_command(tmp_path):
    out = tmp_path / "results.json"
    command = [sys.executable, "-m", "bench", "--quick", "--op", "dropout", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert results.CPU_NOTE in done.stdout
    written = json.loads(out.read_text())
    assert {row["op"] for row in written["results"]} == {"dropout"}
    assert len({tuple(row["shape"]) for row in written["results"]}) == 2

    same = [sys.executable, "-m", "bench", "--compare", str(out), str(out)]
    done = subprocess.run(same, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.count("within the spread") == len(written["results"])


def test_the_bytes_need_no_gpu():
    command = [sys.executable, "-m", "bench", "--bytes"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for parameter in TIMED:
        assert str(parameter.id) in done.stdout


@pytest.mark.slow
def test_pytest_benchmark_gets_the_alternated_rounds(tmp_path: Path):
    pytest.importorskip("pytest_benchmark")
    out = tmp_path / "stats.json"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["bench/timing/test_benchmarks.py", f"--benchmark-json={out}"]
    command += [f"--benchmark-storage=file://{tmp_path}"]
    command += ["-k", "dropout-512x1024 and not add and forward"]
    # pytest-benchmark does nothing in what it takes for a worker of pytest-xdist.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())["benchmarks"]
    assert {entry["extra_info"]["contender"] for entry in found} == {OURS, EAGER, TORCH}
    assert len({entry["stats"]["rounds"] for entry in found}) == 1
    assert all(0 < entry["stats"]["min"] < entry["stats"]["median"] < 1 for entry in found)
