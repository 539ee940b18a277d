"""Training by Hugging Face's own loops: Trainer, gradient checkpointing, autocast, LoRA."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from against_unpatched import breaches, gradients_of, measure
from families import FAMILIES, LENGTH, make_model, tokens
from fastattn.checking import Measured, Results
from fastattn.ops.core.backends import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="compares the reference backend")
peft = pytest.importorskip("peft")

PAD = torch.arange(LENGTH) < torch.tensor([LENGTH, 9, 11, LENGTH, 6, 8, LENGTH, 10])[:, None]


class Rows(torch.utils.data.Dataset):
    """Eight rows of tokens, some padded at the right."""

    def __len__(self) -> int:
        return len(PAD)

    def __getitem__(self, place: int) -> dict[str, torch.Tensor]:
        ids, real = tokens(len(PAD))[place], PAD[place]
        return {
            "input_ids": ids,
            "attention_mask": real.long(),
            "labels": torch.where(real, ids, -100),
        }


def accuracy(given: Any) -> dict[str, float]:
    """What evaluation makes of the logits."""
    right = given.predictions[:, :-1].argmax(-1) == given.label_ids[:, 1:]
    return {"right": float(right.mean()), "of": float(right.size)}


def train(folder: Path, model: Any, **options: Any) -> tuple[Results, Any]:
    """The losses of a short training and of evaluation, and the trainer."""
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=1e-2, logging_steps=1, report_to=[], use_cpu=True, save_strategy="no",
        disable_tqdm=True, seed=0, **options,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model, arguments, train_dataset=Rows(), eval_dataset=Rows(), compute_metrics=accuracy
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    found = trainer.evaluate()
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    assert found["eval_of"] == len(PAD) * (LENGTH - 1)
    return {"losses": torch.tensor([*losses, found["eval_loss"]])}, trainer


def measure_training(folder: Path, name: str, **options: Any) -> list[Measured]:
    """The losses of the same with eager attention."""
    # Float64 is asked for by a mode, which a second forward in the backward would not know.
    options = {key: value for key, value in options.items() if key != "activation_checkpointing"}
    return measure(make_model(FAMILIES[name]), lambda model: train(folder, model, **options)[0])


@pytest.mark.parametrize(
    "options",
    [{}, {"activation_checkpointing": True}, {"bf16": True, "activation_checkpointing": True}],
    ids=["float32", "checkpointing", "bfloat16"],
)
@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_trainer(tmp_path: Path, name: str, options: dict[str, Any]):
    model = make_model(FAMILIES[name], "fastattn")
    losses, trainer = train(tmp_path / "ours", model, **options)
    assert breaches(losses, measure_training(tmp_path / "eager", name, **options)) == []

    trainer.save_model(str(tmp_path / "saved"))
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", attn_implementation="fastattn"
    )
    assert type(again) is type(trainer.model)
    trained = trainer.model.state_dict()
    assert all(torch.equal(x, trained[name]) for name, x in again.state_dict().items())
    assert torch.isfinite(again(tokens()).logits).all()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_computes_the_same_gradients(reentrant: bool):
    found = []
    for checkpointing in (False, True):
        model = make_model(FAMILIES["gemma2"], "fastattn")
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        mask = PAD[:2].long()
        logits = model(tokens(), attention_mask=mask, use_cache=False).logits[PAD[:2]]
        logits.square().mean().backward()
        found.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("norms", [False, True], ids=["all in float32", "norms alone in float32"])
def test_autocast(norms: bool):
    """Queries may come in float32 where weights have 16 bits, as with layers that PEFT prepared."""
    model = make_model(FAMILIES["llama"])
    if norms:
        model.to(torch.bfloat16)
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.data = parameter.data.float()

    def run(model: Any) -> Results:
        with torch.autocast("cpu", torch.bfloat16):
            return {"logits": model(tokens(), use_cache=False).logits.detach()}

    measured = measure(model, run)
    model.set_attn_implementation("fastattn")
    assert breaches(run(model), measured) == []


@pytest.mark.parametrize("first", ["name", "adapter"])
def test_lora_in_both_orders(first: str):
    def run(model: Any, name: str = "eager") -> Results:
        if first == "name":
            model.set_attn_implementation(name)
        torch.manual_seed(0)
        adapted: Any = peft.get_peft_model(
            model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        )
        if first == "adapter":
            model.set_attn_implementation(name)
        output = adapted(
            tokens(), attention_mask=PAD[:2].long(), labels=torch.where(PAD[:2], tokens(), -100)
        )
        output.loss.backward()
        return {
            "loss": output.loss.detach(),
            **gradients_of(adapted),
            "merged": adapted.merge_and_unload()(tokens()).logits.detach(),
        }

    measured = measure(make_model(FAMILIES["llama"]), run, neighbours=4)
    assert breaches(run(make_model(FAMILIES["llama"]), "fastattn"), measured) == []
