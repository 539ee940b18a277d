"""A small BART: it learns to sort, reading numbers and giving them in order, token by token.

Run it with `python docs/examples/bart.py`; it takes some twenty seconds on a CPU.
"""

import torch

from fastattn.models.bart import BartConfig, BartForConditionalGeneration

START, FIRST, NUMBERS, LENGTH = 2, 3, 12, 6
CONFIG = BartConfig(
    vocab_size=FIRST + NUMBERS,
    d_model=64,
    encoder_layers=2,
    decoder_layers=2,
    encoder_ffn_dim=128,
    decoder_ffn_dim=128,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    max_position_embeddings=16,
    dropout=0.0,
)


def draw(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers (B, LENGTH) in any order, and in the right one."""
    tokens = torch.randint(FIRST, FIRST + NUMBERS, (batch, LENGTH))
    return tokens, tokens.sort(1).values


def main(steps: int = 300) -> float:
    """Train, sort new numbers greedily, and return the share of rows without a mistake."""
    torch.manual_seed(0)
    model = BartForConditionalGeneration(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(1, steps + 1):
        tokens, labels = draw(64)
        loss = model(tokens, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    tokens, wanted = draw(128)
    made = torch.full((128, 1), START)
    for _ in range(LENGTH):
        with torch.no_grad():
            logits = model(tokens, decoder_input_ids=made).logits[:, -1]
        made = torch.cat((made, logits.argmax(-1, keepdim=True)), 1)
    print("read: ", *(tokens[0] - FIRST).tolist())
    print("given:", *(made[0, 1:] - FIRST).tolist())
    return (made[:, 1:] == wanted).all(1).float().mean().item()


if __name__ == "__main__":
    print(f"{main():.2f} of the rows are sorted without a mistake")
