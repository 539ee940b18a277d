"""One step of TRL's trainers on a patched model: SFT, SFT with packing, DPO and GRPO."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import fastattn
from against_unpatched import breaches, gradients_of, measure
from families import FAMILIES, VOCABULARY, make_model
from fastattn.checking import Results
from fastattn.ops.core.backends import INTERPRETED

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="compares the reference backend"),
    # TRL's own, about arguments of transformers.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
trl: Any = pytest.importorskip("trl")
datasets: Any = pytest.importorskip("datasets")
tokenizers: Any = pytest.importorskip("tokenizers")

STEP: dict[str, Any] = {
    "max_steps": 1,
    "per_device_train_batch_size": 4,
    "optim": "sgd",
    "max_grad_norm": 0.0,
    "logging_steps": 1,
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
    "disable_tqdm": True,
    "seed": 0,
    # Float64 is asked for by a mode, which a second forward in the backward would not know.
    "activation_checkpointing": False,
}


class Gradients(transformers.TrainerCallback):
    """Keeps the gradients of the last step."""

    def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
        """Called with gradients that are whole."""
        self.found = gradients_of(model)


def tokenizer() -> Any:
    """Numbers are words."""
    words = {str(number): number for number in range(VOCABULARY)}
    whole = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="3"))
    whole.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=whole, pad_token="0", bos_token="1", eos_token="2", unk_token="3"
    )


def texts(count: int, length: Callable[[int], int], seed: int = 0) -> list[str]:
    """Random texts of so many words each."""
    generator = torch.Generator().manual_seed(seed)
    rows = (
        torch.randint(5, VOCABULARY, (length(row),), generator=generator).tolist()
        for row in range(count)
    )
    return [" ".join(map(str, row)) for row in rows]


def sft(model: Any, folder: str, **options: Any) -> Any:
    """Supervised fine-tuning."""
    rows = datasets.Dataset.from_dict({"text": texts(8, lambda row: 4 + row)})
    arguments = trl.SFTConfig(folder, max_length=16, **options, **STEP)
    return trl.SFTTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer())


def packing(model: Any, folder: str) -> Any:
    """The same with several texts in a row."""
    return sft(model, folder, packing=True)


def dpo(model: Any, folder: str) -> Any:
    """Preferences, beside another model as the reference."""
    rows = {
        "prompt": texts(4, lambda row: 3 + row),
        "chosen": [f" {text}" for text in texts(4, lambda row: 4 + row, 1)],
        "rejected": [f" {text}" for text in texts(4, lambda row: 6 - row, 2)],
    }
    other = make_model(FAMILIES["qwen2"]).to(model.dtype)
    arguments = trl.DPOConfig(folder, max_length=32, **STEP)
    return trl.DPOTrainer(
        model,
        other,
        arguments,
        train_dataset=datasets.Dataset.from_dict(rows),
        processing_class=tokenizer(),
    )


def grpo(model: Any, folder: str) -> Any:
    """Completions that the model samples, with rewards by their places."""
    rows = datasets.Dataset.from_dict({"prompt": texts(4, lambda row: 3 + row)})
    arguments = trl.GRPOConfig(folder, num_generations=2, max_completion_length=6, **STEP)

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(place % 2) for place in range(len(completions))]

    return trl.GRPOTrainer(
        model, [reward], arguments, train_dataset=rows, processing_class=tokenizer()
    )


@pytest.mark.parametrize("make_trainer", [sft, packing, dpo, grpo])
def test_one_step(make_trainer: Callable[[Any, str], Any], tmp_path: Path):
    def step(model: Any) -> Results:
        trainer = make_trainer(model, str(tmp_path))
        gradients, losses = Gradients(), []
        trainer.add_callback(gradients)
        compute_loss = trainer.compute_loss

        def kept(*args: Any, **kwargs: Any) -> Any:
            losses.append(compute_loss(*args, **kwargs))
            return losses[-1]

        trainer.compute_loss = kept
        trainer.train()
        return {"loss": losses[0].detach(), **gradients.found}

    measured = measure(make_model(FAMILIES["llama"]), step, neighbours=3)
    gradients = [x for name, x in measured[0].truth.items() if name != "loss"]
    assert all(x.abs().max() > 1e-4 for x in gradients), "nothing to learn"

    model = make_model(FAMILIES["llama"], "fastattn")
    report = fastattn.patch(model)
    assert "LlamaRMSNorm" in {entry.theirs.__name__ for entry in report.replaced}
    actual = step(model)
    assert actual["loss"].isfinite()
    assert breaches(actual, measured) == []
