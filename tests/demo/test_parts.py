"""What the demo is made of: its text, its model, its training loop and its results."""

import json
import math
import resource
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fastattn.demo import DemoError
from fastattn.demo import model as demo_model
from fastattn.demo.data import Corpus, Windows, gather_corpus, load_splits
from fastattn.demo.model import FUSED, PLAIN, VARIANTS, LanguageModel, ModelSizes, Pieces
from fastattn.demo.report import largest_loss_difference, store_results
from fastattn.demo.training import (
    Job,
    RunRecord,
    learning_rate_factor,
    make_optimizer,
    sample_text,
    train,
)

TEXT = b"def area(self):\n    return self.width * self.height\n\n" * 400


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    source = tmp_path / "text.py"
    source.write_bytes(TEXT)
    return gather_corpus(source, tmp_path / "corpus", shortest_split=17)


def job_on(corpus: Corpus, variant: str = "fused", steps: int = 12) -> Job:
    return Job(
        variant=variant,
        backend="reference",
        interpret=False,
        sizes=ModelSizes(width=32, layers=2, heads=2, context=16),
        steps=steps,
        batch=8,
        device="cpu",
        dtype="float32",
        seed=3,
        corpus=corpus,
        sample_bytes=0,
        checkpoint=None,
    )


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
    cpu = torch.device("cpu")
    inputs, targets = windows.draw(cpu)
    assert inputs.shape == targets.shape == (64, 8)
    assert torch.equal(targets, inputs + 1)
    assert torch.equal(inputs, again.draw(cpu)[0])
    assert not torch.equal(inputs, windows.draw(cpu)[0])
    # The first and the last window that fit are both drawn.
    starts = torch.cat([windows.draw(cpu)[0][:, 0] for _ in range(20)])
    assert (starts.min(), starts.max()) == (0, 41)


def test_both_variants_start_from_the_same_state_and_agree() -> None:
    sizes = ModelSizes(width=32, layers=3, heads=2, context=16)
    models = []
    for pieces in (PLAIN, FUSED):
        torch.manual_seed(0)
        models.append(LanguageModel(sizes, pieces))
    plain, fused = (model.state_dict() for model in models)
    assert list(plain) == list(fused)
    assert all(torch.equal(plain[name], fused[name]) for name in plain)
    tokens, targets = torch.randint(256, (2, 2, 16))
    torch.testing.assert_close(models[0](tokens), models[1](tokens))
    losses = [model.loss(tokens, targets) for model in models]
    torch.testing.assert_close(*losses)
    plain_gradients, fused_gradients = (
        dict(zip(plain, torch.autograd.grad(loss, tuple(model.parameters())), strict=True))
        for loss, model in zip(losses, models, strict=True)
    )
    torch.testing.assert_close(plain_gradients, fused_gradients)


@pytest.mark.parametrize("pieces", [PLAIN, FUSED], ids=["plain", "fused"])
def test_loss_is_the_cross_entropy_of_the_logits(pieces: Pieces) -> None:
    model = LanguageModel(ModelSizes(width=32, layers=1, heads=2, context=16), pieces)
    tokens, targets = torch.randint(256, (2, 2, 16))
    expected = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(model.loss(tokens, targets), expected)


def test_fused_model_takes_every_piece_from_fastattn() -> None:
    replaced = {name for name in Pieces._fields if getattr(FUSED, name) is not getattr(PLAIN, name)}
    assert replaced == set(Pieces._fields)


def test_every_piece_is_used_where_it_can_be() -> None:
    calls = Counter()

    def counted(name: str, piece: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return piece(*args, **kwargs)

        return call

    pieces = Pieces(**{name: counted(name, piece) for name, piece in FUSED._asdict().items()})
    model = LanguageModel(ModelSizes(width=16, layers=3, heads=1, context=8), pieces)
    # Four matrices and two norms in a layer, and the last norm.
    assert calls == {"linear": 12, "norm": 7}
    assert {type(module) for module in model.modules()} >= {FUSED.linear, FUSED.norm}

    calls.clear()
    tokens = torch.zeros(1, 8, dtype=torch.long)
    model.loss(tokens, tokens)
    # Every addition to the residual stream, two in a layer, is fused with the norm after it, and
    # the loss needs no logits.
    assert calls == {
        "add_norm": 6,
        "rotary": 3,
        "attention": 3,
        "gated_linear": 3,
        "linear_cross_entropy": 1,
    }
    calls.clear()
    model.generate(b"ab", 1, temperature=1.0, seed=0)
    assert calls["logits"] == 1


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_in_bfloat16(corpus: Corpus, variant: str) -> None:
    record = run(replace(job_on(corpus, variant, steps=60), dtype="bfloat16"))
    assert record.losses[-1] < 2.5
    # The loss itself is not rounded to bfloat16.
    assert record.losses[-1] != torch.tensor(record.losses[-1]).bfloat16().item()


@pytest.mark.parametrize("pieces", [PLAIN, FUSED], ids=["plain", "fused"])
def test_a_prediction_sees_only_the_text_before_it(pieces: Pieces) -> None:
    model = LanguageModel(ModelSizes(width=32, layers=2, heads=2, context=12), pieces)
    tokens = torch.randint(256, (1, 12))
    changed = tokens.clone()
    changed[0, 7] = (changed[0, 7] + 1) % 256
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert (before[:, 7:] - after[:, 7:]).abs().amax(-1).gt(1e-6).all()


def test_order_of_the_text_matters() -> None:
    model = LanguageModel(ModelSizes(width=32, layers=1, heads=2, context=3), PLAIN)
    first, second = model(torch.tensor([[1, 2, 3], [2, 1, 3]]))[:, -1]
    assert not torch.allclose(first, second, atol=1e-6)


def test_generated_text_depends_on_the_seed_alone() -> None:
    model = LanguageModel(ModelSizes(width=16, layers=1, heads=1, context=8), FUSED)
    texts = [model.generate(b"ab", 20, temperature=1.0, seed=seed) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith(b"ab")
    assert len(texts[0]) == 22


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

    def wrong_add_norm(branch, residual, norm):
        y, residual = demo_model.plain_add_norm(branch, residual, norm)
        if y.requires_grad:
            y.register_hook(lambda gradient: 1.01 * gradient)
        return y, residual

    plain, fused = run(job_on(corpus, "plain")), run(job_on(corpus, "fused"))
    monkeypatch.setitem(VARIANTS, "fused", PLAIN._replace(add_norm=wrong_add_norm))
    wrong = run(job_on(corpus, "fused"))
    right_difference = largest_loss_difference([plain, fused])
    wrong_difference = largest_loss_difference([plain, wrong])
    assert right_difference is not None
    assert wrong_difference is not None
    assert right_difference.value < 1e-5
    assert wrong_difference.value > 1e-4


def test_a_loss_that_is_no_number_ends_training(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = PLAIN._replace(linear_cross_entropy=lambda x, *_: x.sum() * float("nan"))
    monkeypatch.setitem(VARIANTS, "fused", pieces)
    with pytest.raises(DemoError, match="loss nan"):
        run(job_on(corpus))


def test_sample_obeys_no_terminal(corpus: Corpus) -> None:
    job = replace(job_on(corpus), sample_bytes=500)
    sample = sample_text(LanguageModel(job.sizes, FUSED), job)
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
    optimizer = make_optimizer(LanguageModel(ModelSizes(16, 1, 1, 8), FUSED), 1e-3)
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
    assert difference is not None
    assert (difference.value, difference.step, difference.compared_steps) == (0.25, 2, 3)


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
