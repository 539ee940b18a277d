"""Patched models in Hugging Face's own loops, under PEFT, and compiled."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_training import PAD, measure_training, train

import fastattn
from against_unpatched import breaches, gradients_of, measure
from families import FAMILIES, make_model, tokens
from fastattn.checking import Results
from fastattn.integrations.transformers.logits import DeferredLogits
from fastattn.ops.core.backends import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="compares the reference backend")
peft = pytest.importorskip("peft")

LABELS = torch.where(PAD[:2], tokens(), -100)


@pytest.mark.parametrize(
    "options",
    [{}, {"activation_checkpointing": True}, {"bf16": True}],
    ids=["float32", "checkpointing", "bfloat16"],
)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_trainer(tmp_path: Path, name: str, options: dict[str, Any]):
    model = make_model(FAMILIES[name])
    fastattn.patch(model)
    losses, trainer = train(tmp_path / "ours", model, **options)
    assert breaches(losses, measure_training(tmp_path / "theirs", name, **options)) == []

    trainer.save_model(str(tmp_path / "saved"))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert type(again).__name__ == type(trainer.model).__name__
    trained = trainer.model.state_dict()
    assert all(torch.equal(x, trained[name]) for name, x in again.state_dict().items())


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["gate_proj", "down_proj"], ["lm_head"]])
@pytest.mark.parametrize("first", ["patch", "adapter"])
def test_lora_in_both_orders(first: str, targets: list[str]):
    def run(model: Any, patched: bool = False) -> Results:
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
        results = {"loss": output.loss.detach(), **gradients_of(adapted)}
        whole = adapted.merge_and_unload()
        fastattn.unpatch(whole)
        assert type(whole) is transformers.LlamaForCausalLM
        return {**results, "merged": whole(tokens()).logits.detach()}

    measured = measure(make_model(FAMILIES["llama"]), run, neighbours=4)
    assert breaches(run(make_model(FAMILIES["llama"]), True), measured) == []


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3", "gpt2"])
def test_one_graph(name: str):
    torch.compiler.reset()

    def run(model: Any) -> Results:
        model.zero_grad()
        mask = PAD[:2].long()
        output = model(input_ids=tokens(), attention_mask=mask, labels=LABELS, use_cache=False)
        output.loss.backward()
        assert isinstance(output.logits, DeferredLogits) == (model is patched)
        return {"loss": output.loss.detach(), **gradients_of(model)}

    patched = None
    measured = measure(make_model(FAMILIES[name]), run, neighbours=4)
    patched = make_model(FAMILIES[name])
    fastattn.patch(patched)
    patched.compile(fullgraph=True, backend="aot_eager")
    assert breaches(run(patched), measured) == []
