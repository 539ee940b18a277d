"""What the demo does on each kind of machine."""

import pytest
import torch

from fastattn.demo import DemoError, plan
from fastattn.demo.data import Corpus
from fastattn.demo.model import make_model
from fastattn.demo.plan import EVIDENCE, GPU, USE, choose_parts


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(plan, "device_obstacle", lambda *_: None)


def test_cpu_has_two_parts_and_sizes_go_to_the_larger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "HAS_TRITON", True)
    evidence, use = choose_parts("cpu", None, {"width": 256, "steps": 7})
    assert evidence == EVIDENCE
    assert use.sizes.family == "llama"
    assert (use.sizes.width, use.sizes.heads, use.sizes.steps) == (256, 4, 7)
    assert use.sizes.context == USE.sizes.context


def test_only_the_evidence_interprets_and_only_its_second_run() -> None:
    corpus = Corpus("corpus", "text", "\n", 1, 1000, 100)
    jobs = [EVIDENCE.job(variant, corpus, 0, "file") for variant in EVIDENCE.variants]
    assert [job.threads for job in jobs] == [1, 1]
    assert [(job.variant, job.interpreted, job.backend) for job in jobs] == [
        ("plain", False, "reference"),
        ("fused", True, "triton"),
    ]
    assert [job.checkpoint for job in jobs] == [None, "file"]
    assert USE.variants == ("fused",)
    assert USE.job("fused", corpus, 0, "file").backend == "reference"


def test_without_triton_there_is_no_evidence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "HAS_TRITON", False)
    assert choose_parts("cpu", None, {}) == [USE]
    with pytest.raises(DemoError, match="needs triton"):
        choose_parts("cpu", "evidence", {})


@pytest.mark.usefixtures("gpu")
def test_gpu_does_everything_in_one_part_on_compiled_kernels() -> None:
    for device in ("auto", "cuda", "cuda:0"):
        (part,) = choose_parts(device, None, {})
        assert part.device == "cuda:0"
        assert (part.backend, part.variants) == ("triton", ("plain", "fused"))
        assert not part.job("fused", Corpus("", "", "", 0, 0, 0), 0, "").interpreted
        assert part.sizes.dtype == "bfloat16"
    with pytest.raises(DemoError, match="--part is for a CPU"):
        choose_parts("auto", "use", {})


@pytest.mark.usefixtures("gpu")
def test_gpu_without_kernels_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "device_obstacle", lambda *_: "it is too old")
    assert choose_parts("auto", "use", {})[0].device == "cpu"
    with pytest.raises(DemoError, match="--device cuda cannot run the kernels: it is too old"):
        choose_parts("cuda", None, {})


def test_gpu_model_has_about_100_million_parameters() -> None:
    with torch.device("meta"):
        model = make_model(GPU.sizes, "fused")
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(
        1e8, rel=0.05
    )


def test_the_family_is_trained_in_every_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "HAS_TRITON", True)
    corpus = Corpus("corpus", "text", "\n", 1, 1000, 100)
    for part in choose_parts("cpu", None, {}, "t5"):
        for variant in part.variants:
            assert part.job(variant, corpus, 0, "folder").sizes.family == "t5"
