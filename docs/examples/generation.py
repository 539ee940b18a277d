"""Generation with a cache: a small Llama learns to count in steps, then says its tokens as it goes.

Prompts have different lengths in one batch, and every token is computed from the cache of those
before. Run it with `python docs/examples/generation.py`; it takes a few seconds on a CPU.
"""

import torch

import fastattn
from fastattn.models.llama import LlamaConfig, LlamaForCausalLM

NUMBERS, LENGTH = 20, 12
CONFIG = LlamaConfig(
    vocab_size=NUMBERS,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)


def draw(batch: int) -> torch.Tensor:
    """Tokens (B, LENGTH) that go up by 1, 2 or 3 from any number, modulo NUMBERS."""
    first, by = torch.randint(NUMBERS, (batch, 1)), torch.randint(1, 4, (batch, 1))
    return (first + by * torch.arange(LENGTH)) % NUMBERS


def main(steps: int = 150) -> float:
    """Train, stream what follows three prompts, and return the share of right tokens."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        tokens = draw(32)
        loss = model(tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"loss {loss.item():.3f}")

    prompts = torch.tensor([[0, 1, 0, 0], [4, 6, 8, 0], [7, 10, 13, 16]])
    lengths = torch.tensor([2, 3, 4])  # What is beyond a prompt's length is not read.
    rows = [prompt[:length].tolist() for prompt, length in zip(prompts, lengths)]
    for row, length in zip(rows, lengths):
        print("prompt", row[:length])
    for step in fastattn.stream(model.eval(), prompts, lengths, max_new_tokens=8):
        print("next  ", step.tokens.tolist(), flush=True)
        for row, token in zip(rows, step.tokens.tolist()):
            row.append(token)
    right = [
        row[i] == (row[0] + (row[1] - row[0]) * i) % NUMBERS
        for row, length in zip(rows, lengths.tolist())
        for i in range(length, len(row))
    ]
    return sum(right) / len(right)


if __name__ == "__main__":
    print(f"{main():.2f} of the generated tokens are right")
