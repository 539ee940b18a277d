"""Patched models in Hugging Face's own loops, under PEFT, and compiled."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_training import PAD, Rows

import fastattn
from families import FAMILIES, make_model, tokens
from fastattn.integrations.transformers.logits import DeferredLogits
from fastattn.ops.core.backends import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="compares the reference backend")
peft = pytest.importorskip("peft")

LABELS = torch.where(PAD[:2], tokens(), -100)


def arguments(folder: Path, **options: Any) -> transformers.TrainingArguments:
    """Three steps of two batches each."""
    return transformers.TrainingArguments(
        str(folder), max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=1e-2, logging_steps=1, report_to=[], use_cpu=True, save_strategy="no",
        disable_tqdm=True, seed=0, **options,
    )  # fmt: skip


def accuracy(given: Any) -> dict[str, float]:
    """What evaluation makes of the logits."""
    right = given.predictions[:, :-1].argmax(-1) == given.label_ids[:, 1:]
    return {"right": float(right.mean()), "of": float(right.size)}


def train(folder: Path, name: str, patched: bool, **options: Any) -> tuple[list[float], Any]:
    """The losses of a training, then of an evaluation with its accuracy, and the trainer."""
    model = make_model(FAMILIES[name])
    if patched:
        fastattn.patch(model)
    trainer = transformers.Trainer(
        model, arguments(folder, **options), train_dataset=Rows(), eval_dataset=Rows(),
        compute_metrics=accuracy,
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    found = trainer.evaluate()
    return [*losses, found["eval_loss"], found["eval_of"]], trainer


@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_checkpointing": True}, {"bf16": True}],
    ids=["float32", "checkpointing", "bfloat16"],
)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_trainer(tmp_path: Path, name: str, options: dict[str, Any]):
    expected, _ = train(tmp_path / "theirs", name, False, **options)
    losses, trainer = train(tmp_path / "ours", name, True, **options)
    assert len(losses) == 5
    assert losses[2] < losses[0]
    torch.testing.assert_close(losses, expected, rtol=2e-2 if "bf16" in options else 1e-4, atol=0)

    trainer.save_model(str(tmp_path / "saved"))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert type(again).__name__ == type(trainer.model).__name__
    trained = trainer.model.state_dict()
    assert all(torch.equal(x, trained[name]) for name, x in again.state_dict().items())


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["gate_proj", "down_proj"], ["lm_head"]])
@pytest.mark.parametrize("first", ["patch", "adapter"])
def test_lora_in_both_orders(first: str, targets: list[str]):
    losses, gradients, merged = [], [], []
    for patched in (False, True):
        model: Any = make_model(FAMILIES["llama"])
        if patched and first == "patch":
            fastattn.patch(model)
        torch.manual_seed(0)
        adapted: Any = peft.get_peft_model(
            model, peft.LoraConfig(target_modules=targets, init_lora_weights=False)
        )
        if patched and first == "adapter":
            assert fastattn.patch(adapted).replaced
        output = adapted(tokens(), attention_mask=PAD[:2].long(), labels=LABELS)
        assert isinstance(output.logits, DeferredLogits) == (patched and targets != ["lm_head"])
        output.loss.backward()
        losses.append(output.loss.detach())
        gradients.append([p.grad for p in adapted.parameters() if p.requires_grad])
        whole = adapted.merge_and_unload()
        fastattn.unpatch(whole)
        assert type(whole) is transformers.LlamaForCausalLM
        merged.append(whole(tokens()).logits.detach())
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(*merged)


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3", "gpt2"])
def test_one_graph(name: str):
    torch.compiler.reset()
    model = make_model(FAMILIES[name])
    fastattn.patch(model)
    losses, gradients = [], []
    for function in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        mask = PAD[:2].long()
        output = function(input_ids=tokens(), attention_mask=mask, labels=LABELS, use_cache=False)
        assert isinstance(output.logits, DeferredLogits)
        output.loss.backward()
        losses.append(output.loss.detach())
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)
