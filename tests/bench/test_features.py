"""The probe of features tells right from wrong, refused and absent, and what crashes from both."""

import json
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from bench.environment import ROOT
from bench.features.case import Absent, Case
from bench.features.contenders import Answer, Contender, of_torch
from bench.features.features import CAUSAL, FEATURES, GQA, PLAIN, VARIANTS, Feature
from bench.features.judging import FORWARD, GRADIENTS, IMPRECISION, judge, reference
from bench.features.packages import CONTENDERS
from bench.features.probe import probe, try_features
from bench.features.table import markdown
from fastattn.ops.core.backends import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="nothing here launches kernels")

CPU = torch.device("cpu")


def feature(name: str) -> Feature:
    return next(feature for feature in FEATURES if feature.name == name)


def wrong(case: Case) -> Answer:
    """Takes a query's last key for one that it does not see."""
    return reference(replace(case, mask=torch.arange(case.k.shape[2]) < case.k.shape[2] - 1))


def raising(case: Case) -> Answer:
    raise ValueError("no heads like these\nand a trace")


def without_softcap(case: Case) -> Answer:
    case.only("causal")
    return reference(case)


def stolen_gradient(case: Case) -> Answer:
    """Right outputs, but the gradient of v is that of v / 2."""
    return reference(replace(case, v=case.v.detach() / 2 + case.v / 2))


def all_are(forward: str, gradients: str) -> dict[str, dict[str, str]]:
    return {variant: {FORWARD: forward, GRADIENTS: gradients} for variant in VARIANTS}


def kinds(name: str, attention) -> dict[str, dict[str, str]]:
    found = judge(feature(name), attention, CPU, torch.float32)
    return {v: {what: verdict.kind for what, verdict in found[v].items()} for v in found}


def test_every_verdict():
    assert kinds("plain", reference) == all_are("right", "right")
    assert kinds("plain", wrong) == all_are("wrong", "wrong")
    assert kinds("plain", raising) == all_are("refused", "refused")
    assert kinds("softcap", without_softcap) == all_are("absent", "absent")
    assert kinds("plain", stolen_gradient) == all_are("right", "wrong")


def test_messages_and_ways():
    refused = judge(feature("plain"), raising, CPU, torch.float32)[PLAIN][FORWARD]
    assert refused.message == "no heads like these"
    absent = judge(feature("softcap"), without_softcap, CPU, torch.float32)[GQA][GRADIENTS]
    assert "softcap" in absent.message
    found = judge(feature("ALiBi"), of_torch, CPU, torch.float32)[PLAIN][FORWARD]
    assert found.how == "by an M x N tensor"
    assert found.of_allowed is not None
    # PyTorch's fused attention may be another processor's less exact one, but never wrong.
    assert 0.0 < found.of_allowed < IMPRECISION


def test_outputs_are_judged_where_gradients_are_refused():
    def forward_only(case: Case) -> Answer:
        if case.q.requires_grad:
            raise NotImplementedError("no backward")
        return reference(case)

    for name in ("plain", "the same bits every time"):
        assert kinds(name, forward_only) == all_are("right", "refused")


def test_dropout_must_be_random_rescaled_and_repeatable():
    name = "dropout"

    def plain(case: Case) -> Answer:
        return of_torch(replace(case, dropout_p=0.0))

    def unscaled(case: Case) -> Answer:
        return Answer(of_torch(case).o * (1.0 - case.dropout_p))

    def forgetful(case: Case) -> Answer:
        torch.seed()
        return of_torch(case)

    assert kinds(name, of_torch)[CAUSAL] == {FORWARD: "right", GRADIENTS: "right"}
    for attention in (plain, unscaled, forgetful):
        assert kinds(name, attention)[CAUSAL][FORWARD] == "wrong", attention


def test_bits_that_change_are_wrong():
    def noisy(case: Case) -> Answer:
        return Answer(reference(case).o * (1.0 + 1e-6 * torch.rand(())))

    name = "the same bits every time"
    assert kinds(name, reference)[PLAIN] == {FORWARD: "right", GRADIENTS: "right"}
    assert kinds(name, noisy)[PLAIN] == {FORWARD: "wrong", GRADIENTS: "wrong"}


def test_a_gradient_that_is_not_given_is_absent():
    def constant_bias(case: Case) -> Answer:
        assert case.bias is not None
        return reference(replace(case, bias=case.bias.detach()))

    found = kinds("additive bias (1, H, M, N) and its gradient", constant_bias)
    assert found[PLAIN] == {FORWARD: "right", GRADIENTS: "absent"}


@pytest.mark.parametrize("name", [feature.name for feature in FEATURES])
def test_pytorchs_plain_way_is_never_wrong_but_for_nan(name):
    """Also a test of the rows: what PyTorch can say, it says as the float64 reference does."""

    def attention(case: Case) -> Answer:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return of_torch(case)

    found = {kind for pair in kinds(name, attention).values() for kind in pair.values()}
    assert ("wrong" in found) == ("NaN" in name)


def test_the_page_has_every_verdict():
    rows = []
    for name, attention in (("right", reference), ("wrong", wrong), ("raising", raising)):
        for found in try_features(name, attention, FEATURES[:2], CPU, torch.float32):
            rows += found
    page = markdown(
        {
            "device": {"type": "cpu", "name": "a processor"},
            "versions": {"torch": torch.__version__},
            "when": "2026-01-01T00:00:00",
            "dtype": "float32",
            "commit": "unknown",
            "remarks": {"right": "as it should be"},
            "not_tried": {"other": "is not installed there", "Third": "is another thing"},
            "results": rows,
        }
    )
    assert "| plain | `✓✓✓✓` | `✗✗✗✗` | `rrrr` |" in page
    assert "- no heads like these" in page
    assert "Here: as it should be." in page
    assert "other is not installed" in page
    assert "Third is another thing" in page


def test_a_crash_costs_one_feature(monkeypatch):
    """Processes are real, and the first one ends in the midst of its second feature."""
    code = """
import json, os, sys
for name in sys.argv[sys.argv.index("--feature") + 1 : sys.argv.index("--rows")]:
    if name == "softcap":
        os.kill(os.getpid(), 11)
    with open(sys.argv[-1], "a") as file:
        print(json.dumps([{"feature": name}]), file=file)
"""
    real = subprocess.run

    def run(command, **options):
        return real([command[0], "-c", code, *command[3:]], **options)

    monkeypatch.setattr(subprocess, "run", run)
    chosen = [feature(name) for name in ("plain", "softcap", "ALiBi")]
    contender = Contender("someone", lambda: of_torch)
    rows = probe(contender, chosen, [], time.monotonic() + 60)
    assert [row["feature"] for row in rows] == ["plain", *["softcap"] * 6, "ALiBi"]
    assert {row.get("kind") for row in rows[1:-1]} == {"crashed"}
    assert rows[1]["message"] == "ended by SIGSEGV"
    assert {row["kind"] for row in probe(contender, chosen, [], time.monotonic())} == {"not tried"}


@pytest.mark.slow
def test_the_command(tmp_path):
    file, page = tmp_path / "features.json", tmp_path / "features.md"
    command = [sys.executable, "-m", "bench.features", "--contender", "fastattn", "SDPA math"]
    command += ["--feature", "plain", "softcap", "--out", str(file), "--table", str(page)]
    subprocess.run([*command, "--device", "cpu"], cwd=ROOT, check=True)
    document = json.loads(file.read_text())
    found = {(row["contender"], row["feature"]): row["kind"] for row in document["results"]}
    assert found == {
        ("fastattn", "plain"): "right",
        ("fastattn", "softcap"): "right",
        ("SDPA math", "plain"): "right",
        ("SDPA math", "softcap"): "absent",
    }
    assert document["dtype"] == "float32"
    assert "its reference in PyTorch" in document["remarks"]["fastattn"]
    assert "| softcap | `✓✓✓✓` | `----` |" in page.read_text()


def test_on_a_cpu_only_those_have_columns_that_compute_there():
    """Whoever says to be one of them takes the plainest call, and nobody else does."""
    for contender in CONTENDERS:
        if contender.installed:
            found = kinds("plain", contender.load())[PLAIN][FORWARD]
            assert (found == "right") == (contender.obstacle(CPU) is None), contender.name
        else:
            assert contender.obstacle(CPU) == "is not installed there"


def test_names_and_what_is_asked():
    assert len({feature.name for feature in FEATURES}) == len(FEATURES)
    assert len({contender.name for contender in CONTENDERS}) == len(CONTENDERS)
    case = feature("LSE as output, and its gradient").case(CAUSAL, False)
    assert case.asked() == {"causal", "return_lse"}
    with pytest.raises(Absent, match="LSE"):
        case.only("causal")
