"""What the demo is made of: its text, its model, its training loop and its results."""

import json
import math
import resource
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from fastattn import models, nn
from fastattn.demo import DemoError
from fastattn.demo import plain as plain_model
from fastattn.demo.data import Corpus, Windows, gather_corpus, load_splits
from fastattn.demo.experts import balancing_loss, describe_load, shares, watched_routers
from fastattn.demo.model import FAMILIES, VARIANTS, Sizes, make_model, make_task
from fastattn.demo.report import largest_loss_difference, loss_plot, store_results
from fastattn.demo.tasks import (
    END,
    FIRST_SENTINEL,
    MASK,
    MaskedBytes,
    SpanCorruption,
    continued,
    predicted,
)
from fastattn.demo.training import (
    Job,
    RunRecord,
    learning_rate_factor,
    make_optimizer,
    sample_text,
    train,
)

families = pytest.mark.parametrize("family", FAMILIES)
TEXT = b"def area(self):\n    return self.width * self.height\n\n" * 400


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    source = tmp_path / "text.py"
    source.write_bytes(TEXT)
    return gather_corpus(source, tmp_path / "corpus", shortest_split=17)


def sizes_of(family: str) -> Sizes:
    return Sizes(steps=60, width=32, layers=2, heads=2, context=16, batch=8, family=family)


def job_on(corpus: Corpus, variant: str = "fused", steps: int = 12) -> Job:
    return Job(
        variant=variant,
        backend="reference",
        sizes=replace(sizes_of("llama"), steps=steps),
        device="cpu",
        seed=3,
        threads=None,
        corpus=corpus,
        sample_bytes=0,
        checkpoint=None,
    )


def test_a_run_keeps_to_its_threads(corpus: Corpus) -> None:
    seen = []
    job = replace(job_on(corpus, steps=1), threads=1)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        train(job, lambda event: seen.append(torch.get_num_threads()), lambda: False)
    finally:
        torch.set_num_threads(before)
    assert set(seen) == {1}


def run(job: Job) -> RunRecord:
    record = RunRecord(job)
    train(job, record.add, lambda: False)
    return record


def test_folder_is_gathered_in_one_order_and_without_binary_files(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "site-packages").mkdir(parents=True)
    for index in range(20):
        (folder / f"{index}.txt").write_bytes(f"file {index}\n".encode() * 30)
    (folder / "image.png").write_bytes(b"\x89PNG\0" * 100)
    (folder / "zeros.txt").write_bytes(b"\0" * 1000)
    (folder / "site-packages" / "other.txt").write_bytes(b"another project's" * 100)

    first = gather_corpus(folder, tmp_path / "first", shortest_split=1)
    second = gather_corpus(folder, tmp_path / "second", shortest_split=1)

    content = (tmp_path / "first").read_bytes()
    assert content == (tmp_path / "second").read_bytes()
    assert (first.files, second.files) == (20, 20)
    assert sorted(set(content.splitlines())) == sorted(f"file {i}".encode() for i in range(20))
    assert len(content) == first.train_bytes + first.validation_bytes


def test_standard_library_is_there(tmp_path: Path) -> None:
    corpus = gather_corpus(None, tmp_path / "corpus", shortest_split=1000)
    assert corpus.files > 200
    assert corpus.train_bytes > 2_000_000


def test_splits_share_no_byte(corpus: Corpus) -> None:
    training_text, validation_text = load_splits(corpus)
    assert bytes(training_text.tolist()) + bytes(validation_text.tolist()) == TEXT
    assert len(validation_text) == len(TEXT) // 20


def test_windows_are_pieces_of_the_text_and_repeatable() -> None:
    tokens = torch.arange(50, dtype=torch.uint8)
    windows, again = (Windows(tokens, context=8, batch=64, seed=1) for _ in range(2))
    drawn = windows.draw()
    assert drawn.shape == (64, 8)
    assert torch.equal(drawn - drawn[:, :1], torch.arange(8).expand(64, 8))
    assert torch.equal(drawn, again.draw())
    assert not torch.equal(drawn, windows.draw())
    # The first and the last window that fit are both drawn.
    starts = torch.cat([windows.draw()[:, 0] for _ in range(20)])
    assert (starts.min(), starts.max()) == (0, 42)


@families
def test_both_variants_start_from_the_same_state_and_agree(family: str) -> None:
    models, sizes = [], sizes_of(family)
    for variant in VARIANTS:
        torch.manual_seed(0)
        models.append(make_model(sizes, variant))
    generator = torch.Generator().manual_seed(0)
    batch = make_task(sizes).batch(torch.randint(256, (2, 16), generator=generator), generator)
    outputs = [model(**batch) for model in models]
    torch.testing.assert_close(outputs[0].loss, outputs[1].loss)
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits)
    for output in outputs:
        output.loss.backward()
    plain, fused = (dict(model.named_parameters()) for model in models)
    assert plain.keys() == fused.keys()
    for name, parameter in plain.items():
        assert torch.equal(parameter, fused[name]), name
        torch.testing.assert_close(parameter.grad, fused[name].grad, msg=name)


def test_the_plain_llama_has_nothing_of_fastattn() -> None:
    kinds = {type(module) for module in make_model(sizes_of("llama"), "plain").modules()}
    assert {kind.__module__.partition(".")[0] for kind in kinds} == {"torch", "fastattn"}
    ours = {kind for kind in kinds if kind.__module__.startswith("fastattn")}
    assert {kind.__module__ for kind in ours} == {"fastattn.demo.plain"}


@families
def test_the_family_is_the_one_asked_for(family: str) -> None:
    kind = type(make_model(sizes_of(family), "fused"))
    assert kind.__module__ == f"fastattn.models.{family}"


@families
def test_predictions_see_what_they_may(family: str) -> None:
    sizes = sizes_of(family)
    model = make_model(sizes, "fused").eval()
    tokens = torch.randint(256, (1, 16))
    changed = tokens.clone()
    changed[0, 7] = (changed[0, 7] + 1) % 256
    inputs = {"decoder_input_ids": torch.arange(8)[None]} if family == "t5" else {}
    before, after = (predicted(model, input_ids=x, **inputs)[0] for x in (tokens, changed))
    seen = (before - after).abs().amax(-1).gt(1e-7)
    causal = family not in ("bert", "t5")
    assert seen[7:].all()
    assert causal is not bool(seen[:7].any())


def test_masked_bytes_are_the_labels() -> None:
    task, generator = MaskedBytes(), torch.Generator().manual_seed(0)
    windows = torch.randint(256, (50, 200), generator=generator)
    batch = task.batch(windows, generator)
    tokens, labels = batch["input_ids"], batch["labels"]
    labeled = labels >= 0
    assert torch.equal(labels[labeled], windows[labeled])
    assert torch.equal(tokens[~labeled], windows[~labeled])
    assert labeled.float().mean().item() == pytest.approx(0.15, abs=0.01)
    assert (tokens[labeled] == MASK).float().mean().item() == pytest.approx(0.8, abs=0.03)
    kept = (tokens[labeled] == windows[labeled]).float().mean().item()
    assert kept == pytest.approx(0.1, abs=0.03)
    # However short a window is, it has a label.
    short = task.batch(torch.randint(256, (500, 2), generator=generator), generator)
    assert (short["labels"] >= 0).any(dim=1).all()


@pytest.mark.parametrize("context", [2, 3, 16, 128])
def test_spans_fit_into_the_text_they_were_cut_out_of(context: int) -> None:
    task, generator = SpanCorruption(context), torch.Generator().manual_seed(0)
    windows = torch.randint(256, (8, context), generator=generator)
    batch = task.batch(windows, generator)
    assert batch["labels"].shape == (8, task.cut + task.spans + 1)
    for window, inputs, labels in zip(windows, batch["input_ids"], batch["labels"], strict=True):
        spans: dict[int, list[int]] = {}
        for token in labels.tolist()[:-1]:
            if token >= FIRST_SENTINEL:
                spans[token] = []
            else:
                next(reversed(spans.values())).append(token)
        assert len(spans) == task.spans
        assert all(spans.values())
        whole = [byte for token in inputs.tolist()[:-1] for byte in spans.get(token, [token])]
        assert whole == window.tolist()
        assert inputs[-1] == labels[-1] == END


def test_generated_text_depends_on_the_seed_alone() -> None:
    model = make_model(Sizes(steps=1, width=16, layers=1, heads=1, context=8, batch=1), "fused")
    texts = [continued(model, b"ab", 20, 8, temperature=1.0, seed=seed) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith(b"ab")
    assert len(texts[0]) == 22


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_in_bfloat16(corpus: Corpus, variant: str) -> None:
    job = job_on(corpus, variant, steps=60)
    record = run(replace(job, sizes=replace(job.sizes, dtype="bfloat16")))
    assert record.losses[-1] < 2.5
    # The loss itself is not rounded to bfloat16.
    assert record.losses[-1] != torch.tensor(record.losses[-1]).bfloat16().item()


@families
def test_every_family_learns_and_shows_it(corpus: Corpus, family: str, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    job = replace(
        job_on(corpus, steps=60),
        sizes=sizes_of(family),
        sample_bytes=30,
        checkpoint=str(tmp_path / "model"),
    )
    record = run(job)
    assert record.losses[0] == pytest.approx(math.log(256), abs=0.6)
    assert record.losses[-1] < 0.75 * record.losses[0]
    assert record.sample
    model = models.from_pretrained(tmp_path / "model")
    assert type(model) is type(make_model(job.sizes, "fused"))


def test_training_learns_and_reports_every_step(corpus: Corpus) -> None:
    record = run(job_on(corpus, steps=60))
    assert len(record.steps) == 60
    assert record.losses[0] == pytest.approx(math.log(256), abs=0.3)
    assert record.losses[-1] < 2.5
    assert record.validations[0]["step"] == 0
    assert record.validations[-1]["step"] == 60
    assert record.validations[-1]["loss"] < 2.5
    assert record.tokens_per_second is not None
    assert record.peak_memory_bytes is None or record.peak_memory_bytes > 2**20
    json.dumps(record.steps, allow_nan=False)


def test_the_same_job_gives_the_same_losses(corpus: Corpus) -> None:
    assert run(job_on(corpus)).losses == run(job_on(corpus)).losses


def test_a_gradient_that_is_off_by_a_percent_shows(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison of losses is evidence only if a slightly wrong kernel would change it."""
    swiglu = plain_model.F.silu

    def wrong(x: torch.Tensor) -> torch.Tensor:
        y = swiglu(x)
        if y.requires_grad:
            y.register_hook(lambda gradient: 1.01 * gradient)
        return y

    plain, fused = run(job_on(corpus, "plain")), run(job_on(corpus, "fused"))
    # Only the plain model calls it by this name.
    monkeypatch.setattr(plain_model, "F", SimpleNamespace(**{**vars(F), "silu": wrong}))
    wrong_difference = largest_loss_difference([run(job_on(corpus, "plain")), fused])
    right_difference = largest_loss_difference([plain, fused])
    assert right_difference is not None
    assert wrong_difference is not None
    assert right_difference["value"] < 1e-5
    assert wrong_difference["value"] > 3 * right_difference["value"]


def test_a_loss_that_is_no_number_ends_training(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(logits: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return logits.sum() * float("nan")

    monkeypatch.setattr(plain_model, "F", SimpleNamespace(**{**vars(F), "cross_entropy": broken}))
    with pytest.raises(DemoError, match="loss nan"):
        run(job_on(corpus, "plain"))


def test_both_variants_make_up_the_same(corpus: Corpus) -> None:
    """One from a cache, and the other by reading all again; beyond the context, from any prompt."""
    sizes = replace(job_on(corpus).sizes, context=8)
    options = {"temperature": 0.6, "seed": 3}
    models_of_both = [make_model(sizes, variant) for variant in VARIANTS]
    plain = models_of_both[0]
    models_of_both[1].load_state_dict(plain.state_dict())
    for prompt in (b"a", b"a longer prompt than the context"):
        first, second = (continued(m, prompt, 19, 8, **options) for m in models_of_both)
        assert first == second
        assert len(first) == len(prompt) + 19
        assert first.startswith(prompt)


def test_sample_obeys_no_terminal(corpus: Corpus) -> None:
    job = replace(job_on(corpus), sample_bytes=500)
    held_out = torch.randint(256, (100,))
    sample = sample_text(make_model(job.sizes, "fused"), held_out, job)
    assert len(sample) > 200
    assert all(character.isprintable() or character in "\n\t" for character in sample)


def test_learning_rate_rises_then_falls() -> None:
    factors = [learning_rate_factor(step, 200) for step in range(200)]
    assert factors[0] == pytest.approx(1 / 20)
    assert max(factors) == factors[19] == factors[20] == 1.0
    assert factors[20:] == sorted(factors[20:], reverse=True)
    assert factors[-1] == pytest.approx(0.1, abs=1e-3)
    assert learning_rate_factor(0, 1) == 1.0


def test_only_matrices_decay() -> None:
    optimizer = make_optimizer(make_model(Sizes(1, 16, 1, 1, 8, 1), "fused"), 1e-3)
    decays = {group["weight_decay"]: group["params"] for group in optimizer.param_groups}
    assert all(parameter.ndim == 2 for parameter in decays[0.1])
    assert all(parameter.ndim == 1 for parameter in decays[0.0])
    assert len(decays[0.0]) == 3


def test_largest_loss_difference_names_its_step(corpus: Corpus) -> None:
    first, second = RunRecord(job_on(corpus)), RunRecord(job_on(corpus))
    assert largest_loss_difference([first, second]) is None
    first.steps = [{"loss": loss} for loss in (3.0, 2.0, 1.0, 0.5)]
    second.steps = [{"loss": loss} for loss in (3.0, 2.25, 0.9)]
    difference = largest_loss_difference([first, second])
    assert difference == {"value": 0.25, "step": 2, "compared_steps": 3}


def test_a_run_that_was_ended_before_it_began_is_plotted_too(corpus: Corpus) -> None:
    pytest.importorskip("matplotlib")
    ended = RunRecord(job_on(corpus))
    assert loss_plot("title", [run(job_on(corpus, "plain")), ended]).startswith(b"\x89PNG")


def test_the_load_of_experts_is_what_they_got(corpus: Corpus) -> None:
    job = replace(job_on(corpus, steps=1), sizes=replace(sizes_of("mixtral"), steps=1))
    record = run(job)
    assert len(record.expert_loads) == len(record.validations) == 2
    for layer in record.expert_loads[-1]:
        assert len(layer) == 4
        assert math.isclose(sum(layer), 1.0, abs_tol=1e-6)
    assert describe_load([[0.75, 0.25]]).endswith("layer 1: 75% 25%")

    model = torch.nn.Sequential(nn.TopKRouter(2, 4, 2))
    with torch.no_grad(), watched_routers(model) as routers:
        model[0].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0], [-1.0, -1.0]]))
        model(torch.eye(2))
    model(torch.ones(2, 2))
    assert shares(routers) == [[0.25, 0.25, 0.5, 0.0]]
    assert balancing_loss(routers) > 0.02, "evenly used experts give 0.01 for each of two"
    assert balancing_loss([]) == 0.0
    pytest.importorskip("matplotlib")
    assert loss_plot("title", [record]).startswith(b"\x89PNG")


def test_a_disk_that_fills_up_leaves_earlier_results(tmp_path: Path) -> None:
    out, staging = tmp_path / "out", tmp_path / "staging"
    out.mkdir()
    staging.mkdir()
    for name in ("a.json", "b.png"):
        (out / name).write_text("earlier")

    # The system refuses to let any file grow beyond the limit, as a full disk would.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            store_results(out, staging, {"a.json": b"new", "b.png": bytes(20_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [(out / name).read_text() for name in ("a.json", "b.png")] == ["earlier"] * 2
