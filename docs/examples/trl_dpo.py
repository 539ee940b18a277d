"""TRL's direct preference optimisation of a patched Llama: it learns to prefer counting on.

Run it with `python docs/examples/trl_dpo.py`; it takes half a minute on a CPU.
"""

import tempfile

import datasets
import torch
import transformers
import trl
from tokenizers import Tokenizer, models, pre_tokenizers

import fastattn

WORDS = ["<pad>", "<eos>", *map(str, range(10))]
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


def draw(rows: int) -> datasets.Dataset:
    """Three numbers that go up by one; chosen goes on so, rejected goes on down."""
    columns: dict[str, list[str]] = {"prompt": [], "chosen": [], "rejected": []}
    for first in torch.randint(10, (rows,)).tolist():
        for column, start, by in zip(columns.values(), (0, 3, 1), (1, 1, -1)):
            column.append("".join(f" {(first + start + by * place) % 10}" for place in range(3)))
    return datasets.Dataset.from_dict(columns)


def main(steps: int = 60) -> float:
    """Train, and return the share of new pairs in which what was chosen has the higher reward."""
    transformers.set_seed(0)
    model, reference = (transformers.LlamaForCausalLM(CONFIG) for _ in range(2))
    reference.load_state_dict(model.state_dict())
    fastattn.patch(model, loss=False)  # TRL asks for log-probabilities, and not for a loss.
    with tempfile.TemporaryDirectory() as folder:
        arguments = trl.DPOConfig(
            folder,
            max_steps=steps,
            per_device_train_batch_size=16,
            learning_rate=1e-3,
            logging_steps=20,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
        )
        trainer = trl.DPOTrainer(
            model,
            reference,
            arguments,
            train_dataset=draw(16 * steps),
            eval_dataset=draw(64),
            processing_class=make_tokenizer(),
        )
        trainer.train()
        return trainer.evaluate()["eval_rewards/accuracies"]


if __name__ == "__main__":
    print(f"{main():.2f} of the chosen answers are ahead")
