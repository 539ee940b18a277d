"""TRL's supervised fine-tuning with packing, by our attention: documents of a row stay apart.

Run it with `python docs/examples/trl_sft.py`; it takes half a minute on a CPU.
"""

import tempfile

import datasets
import torch
import transformers
import trl
from tokenizers import Tokenizer, models, pre_tokenizers

import fastattn

WORDS = ["<pad>", "<eos>", *map(str, range(20))]
CONFIG = transformers.LlamaConfig(
    vocab_size=len(WORDS),
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    pad_token_id=0,
    eos_token_id=1,
)


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A token a word."""
    words = {word: number for number, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"
    )


def draw(rows: int) -> list[str]:
    """Lines of 4 to 12 numbers that go up by 1, 2 or 3."""
    numbers = [torch.randint(*ends, (rows,)).tolist() for ends in ((0, 20), (1, 4), (4, 13))]
    return [
        " ".join(str((first + by * place) % 20) for place in range(length))
        for first, by, length in zip(*numbers)
    ]


def main(steps: int = 80) -> float:
    """Train on packed rows, and return the share of right next tokens in new lines."""
    transformers.set_seed(0)
    model = transformers.LlamaForCausalLM(CONFIG)
    fastattn.patch(model, loss=False)  # TRL brings a loss without logits of its own.
    with tempfile.TemporaryDirectory() as folder:
        arguments = trl.SFTConfig(
            folder,
            max_steps=steps,
            per_device_train_batch_size=8,
            learning_rate=3e-3,
            max_length=32,
            packing=True,
            padding_free=True,
            logging_steps=20,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
        )
        lines = datasets.Dataset.from_dict({"text": draw(3000)})
        tokenizer = make_tokenizer()
        trainer = trl.SFTTrainer(model, arguments, train_dataset=lines, processing_class=tokenizer)
        trainer.train()
    rows = 2 + (torch.arange(20)[:, None] + 2 * torch.arange(8)) % 20
    with torch.no_grad():
        said = model.eval()(rows).logits.argmax(-1)
    return (said[:, 1:-1] == rows[:, 2:]).float().mean().item()


if __name__ == "__main__":
    print(f"{main():.2f} of the next tokens are right")
