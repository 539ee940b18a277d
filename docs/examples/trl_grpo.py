"""TRL's GRPO on a patched Llama, which learns to answer with the prompt's first digit.

Run it with `python docs/examples/trl_grpo.py`; it takes half a minute on a CPU.
"""

import tempfile

import datasets
import torch
import transformers
import trl
from tokenizers import Tokenizer, models, pre_tokenizers

import fastattn

WORDS = ["<pad>", "<eos>", *map(str, range(5))]
CONFIG = transformers.LlamaConfig(
    vocab_size=len(WORDS),
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
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


def reward(prompts: list[str], completions: list[str], **_: object) -> list[float]:
    """The share of an answer's four words that are the prompt's first."""
    return [
        answer.split().count(prompt.split()[0]) / 4 for prompt, answer in zip(prompts, completions)
    ]


def main(steps: int = 90) -> list[float]:
    """Train, and return the mean reward of every step's answers."""
    transformers.set_seed(0)
    model = transformers.LlamaForCausalLM(CONFIG)
    fastattn.patch(model, loss=False)  # TRL asks for log-probabilities, and not for a loss.
    prompts = [f"{first} {second}" for first, second in torch.randint(5, (2000, 2)).tolist()]
    with tempfile.TemporaryDirectory() as folder:
        arguments = trl.GRPOConfig(
            folder,
            max_steps=steps,
            per_device_train_batch_size=64,
            num_generations=8,
            max_completion_length=4,
            learning_rate=5e-3,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
        )
        trainer = trl.GRPOTrainer(
            model,
            [reward],
            arguments,
            train_dataset=datasets.Dataset.from_dict({"prompt": prompts}),
            processing_class=make_tokenizer(),
        )
        trainer.train()
    return [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]


if __name__ == "__main__":
    print(f"a reward of {main()[-1]:.2f} at the end")
