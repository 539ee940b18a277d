"""Transfer learning: a small T5 that sorts up learns to sort down, by LoRA of rank 8 alone.

Run it with `python docs/examples/t5_lora.py`; it takes some twenty seconds on a CPU.
"""

import torch

import fastattn.nn as nn
from fastattn.models.t5 import T5Config, T5ForConditionalGeneration

FIRST, TOKENS, LENGTH = 2, 10, 6
CONFIG = T5Config(
    vocab_size=FIRST + TOKENS,
    d_model=64,
    d_kv=16,
    d_ff=128,
    num_layers=1,
    num_heads=4,
    dropout_rate=0.0,
)


def draw(batch: int, down: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers (B, LENGTH) for the encoder, and what the decoder is to give: them, sorted."""
    tokens = torch.randint(FIRST, FIRST + TOKENS, (batch, LENGTH))
    return tokens, tokens.sort(1, descending=down).values


def train(model: T5ForConditionalGeneration, steps: int, lr: float, down: bool) -> None:
    """Train the parameters that ask for gradients."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=lr)
    for _ in range(steps):
        tokens, labels = draw(64, down)
        loss = model(tokens, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model: T5ForConditionalGeneration, down: bool) -> float:
    """The share of right tokens, each with those before it given."""
    tokens, labels = draw(256, down)
    return (model(tokens, labels=labels).logits.argmax(-1) == labels).float().mean().item()


def main(steps: int = 250) -> float:
    """Teach sorting up, then down by adapters, and return the accuracy of sorting down."""
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(CONFIG)
    train(model, steps, 3e-3, down=False)
    print(f"sorts up {accuracy(model, False):.2f}, down {accuracy(model, True):.2f}")
    count = sum(parameter.numel() for parameter in model.parameters())
    nn.apply_lora(model, ["q", "k", "v", "o", "wi", "wo"], rank=8)
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"of {count} parameters {learning} more are trained, and no other")
    train(model, steps, 1e-2, down=True)
    nn.merge_lora(model)  # From here on a plain T5 again, adapters in its weights.
    return accuracy(model, down=True)


if __name__ == "__main__":
    print(f"sorts down {main():.2f}")
