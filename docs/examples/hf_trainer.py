"""Hugging Face's Trainer with a patched Llama: `fastattn.patch` is the only line of ours.

The model learns to count in steps. Run it with `python docs/examples/hf_trainer.py`; it takes some
twenty seconds on a CPU.
"""

import tempfile

import torch
import transformers

import fastattn

NUMBERS, LENGTH = 20, 12
CONFIG = transformers.LlamaConfig(
    vocab_size=NUMBERS,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)


def draw(rows: int) -> list[dict[str, torch.Tensor]]:
    """Rows of numbers that go up by 1, 2 or 3 from any number, modulo NUMBERS."""
    first, by = torch.randint(NUMBERS, (rows, 1)), torch.randint(1, 4, (rows, 1))
    tokens = (first + by * torch.arange(LENGTH)) % NUMBERS
    return [{"input_ids": row, "labels": row} for row in tokens]


def main(steps: int = 150) -> float:
    """Train, and return the share of right next tokens in new rows, the third on."""
    transformers.set_seed(0)
    model = transformers.LlamaForCausalLM(CONFIG)
    print(fastattn.patch(model))
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=32,
            learning_rate=3e-3,
            logging_steps=50,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
        )
        trainer = transformers.Trainer(model, arguments, train_dataset=draw(32 * steps))
        trainer.train()
        model.save_pretrained(folder)  # As any Llama: it needs no fastattn to be read.
        again = transformers.AutoModelForCausalLM.from_pretrained(folder)
    fastattn.unpatch(model)  # Which is then what was read, to the bit.
    rows = torch.stack([row["input_ids"] for row in draw(64)])
    with torch.no_grad():
        logits = again(rows).logits
        assert torch.equal(model.eval()(rows).logits, logits)
        said = logits.argmax(-1)
    return (said[:, 1:-1] == rows[:, 2:]).float().mean().item()


if __name__ == "__main__":
    print(f"{main():.2f} of the next tokens are right")
