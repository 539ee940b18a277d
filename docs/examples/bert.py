"""A small BERT: it learns to fill in what is masked in rows of numbers that go up evenly.

Run it with `python docs/examples/bert.py`; it takes some ten seconds on a CPU.
"""

import torch

from fastattn.models.bert import BertConfig, BertForMaskedLM

NUMBERS, LENGTH, MASK, IGNORED = 12, 8, 12, -100
CONFIG = BertConfig(
    vocab_size=NUMBERS + 1,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=128,
    max_position_embeddings=LENGTH,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    pad_token_id=None,
)


def draw(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (B, LENGTH) with one in four masked, and labels of those alone."""
    first, by = torch.randint(NUMBERS, (batch, 1)), torch.randint(1, 4, (batch, 1))
    tokens = (first + by * torch.arange(LENGTH)) % NUMBERS
    masked = torch.rand(tokens.shape) < 0.25
    return tokens.masked_fill(masked, MASK), tokens.masked_fill(~masked, IGNORED)


def main(steps: int = 300) -> float:
    """Train, and return the share of masked numbers that are found in new rows."""
    torch.manual_seed(0)
    model = BertForMaskedLM(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(1, steps + 1):
        tokens, labels = draw(64)
        loss = model(tokens, labels=labels).loss  # Of masked tokens; other logits never exist.
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    tokens, labels = draw(256)
    with torch.no_grad():
        found = model(tokens).logits.argmax(-1)
    print("masked:", *("_" if token == MASK else token for token in tokens[0].tolist()))
    print("filled:", *torch.where(tokens[0] == MASK, found[0], tokens[0]).tolist())
    return (found == labels)[labels != IGNORED].float().mean().item()


if __name__ == "__main__":
    print(f"{main():.2f} of what was masked is found")
