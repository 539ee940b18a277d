"""Training by Hugging Face's own loops: Trainer, gradient checkpointing, autocast, LoRA."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from families import FAMILIES, LENGTH, make_model, tokens
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


def train(folder: Path, name: str, implementation: str, **options: Any) -> tuple[list[float], Any]:
    """The losses of a short training, evaluation last, and the trainer."""
    model = make_model(FAMILIES[name], implementation)
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=1e-2, logging_steps=1, report_to=[], use_cpu=True, save_strategy="no",
        disable_tqdm=True, seed=0, **options,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=Rows(), eval_dataset=Rows())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return [*losses, trainer.evaluate()["eval_loss"]], trainer


@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_checkpointing": True}, {"bf16": True, "gradient_checkpointing": True}],
    ids=["float32", "checkpointing", "bfloat16"],
)
@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_trainer(tmp_path: Path, name: str, options: dict[str, Any]):
    expected, _ = train(tmp_path / "eager", name, "eager", **options)
    losses, trainer = train(tmp_path / "ours", name, "fastattn", **options)
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    torch.testing.assert_close(losses, expected, rtol=2e-2 if "bf16" in options else 1e-4, atol=0)

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
    found = []
    for implementation in ("eager", "fastattn"):
        model = make_model(FAMILIES["llama"], implementation)
        if norms:
            model.to(torch.bfloat16)
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.data = parameter.data.float()
        with torch.autocast("cpu", torch.bfloat16):
            found.append(model(tokens(), use_cache=False).logits.float())
    spread = found[0].std()
    assert (found[0] - found[1]).abs().max() < 0.1 * spread


@pytest.mark.parametrize("first", ["name", "adapter"])
def test_lora_in_both_orders(first: str):
    losses, gradients = [], []
    for implementation in ("eager", "fastattn"):
        model: Any = make_model(FAMILIES["llama"], implementation if first == "name" else "eager")
        torch.manual_seed(0)
        adapted: Any = peft.get_peft_model(
            model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        )
        if first == "adapter":
            model.set_attn_implementation(implementation)
        output = adapted(
            tokens(), attention_mask=PAD[:2].long(), labels=torch.where(PAD[:2], tokens(), -100)
        )
        output.loss.backward()
        losses.append(output.loss.detach())
        gradients.append([p.grad for p in adapted.parameters() if p.requires_grad])
        assert torch.isfinite(adapted.merge_and_unload()(tokens()).logits).all()
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)
