"""Transfer learning: a small T5 that can copy learns to reverse, through LoRA of rank 16 alone.

Run it with `python docs/examples/t5_lora.py`; it takes some twenty seconds on a CPU.
"""

import torch

import fastattn.nn as nn
from fastattn.models.t5 import T5Config, T5ForConditionalGeneration

FIRST, TOKENS, LENGTH = 2, 8, 4
CONFIG = T5Config(
    vocab_size=FIRST + TOKENS,
    d_model=64,
    d_kv=16,
    d_ff=128,
    num_layers=2,
    num_heads=4,
    dropout_rate=0.0,
)


def draw(batch: int, reverse: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """What the encoder reads (B, LENGTH), and what the decoder is to give."""
    tokens = torch.randint(FIRST, FIRST + TOKENS, (batch, LENGTH))
    return tokens, tokens.flip(1) if reverse else tokens


def train(model: T5ForConditionalGeneration, steps: int, lr: float, reverse: bool) -> None:
    """Train the parameters that ask for gradients."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=lr)
    for _ in range(steps):
        tokens, labels = draw(64, reverse)
        loss = model(tokens, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model: T5ForConditionalGeneration, reverse: bool) -> float:
    """The share of right tokens, each with those before it given."""
    tokens, labels = draw(256, reverse)
    return (model(tokens, labels=labels).logits.argmax(-1) == labels).float().mean().item()


def main(steps: int = 300) -> float:
    """Teach copying, then reversing by adapters, and return the accuracy of reversing."""
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(CONFIG)
    train(model, steps, 5e-3, reverse=False)
    print(f"copies {accuracy(model, False):.2f}, reverses {accuracy(model, True):.2f}")
    count = sum(parameter.numel() for parameter in model.parameters())
    nn.apply_lora(model, ["q", "k", "v", "o", "wi", "wo"], rank=16)
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"of {count} parameters {learning} more are trained, and no other")
    train(model, steps, 1e-2, reverse=True)
    nn.merge_lora(model)  # From here on a plain T5 again, adapters in its weights.
    return accuracy(model, reverse=True)


if __name__ == "__main__":
    print(f"reverses {main():.2f}")
