"""torch.nn.TransformerEncoder and ours in its place, in the same plain loop from the same weights.

Run it with `python docs/examples/encoder.py`; it takes some ten seconds on a CPU.
"""

import torch

import fastattn.nn

TOKENS, LENGTH, WIDTH = 12, 10, 32


def draw(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (B, LENGTH), and of each how often it stands in its row."""
    tokens = torch.randint(TOKENS, (batch, LENGTH))
    return tokens, (tokens[:, :, None] == tokens[:, None]).sum(2)


def train(nn, steps: int) -> tuple[list[float], float]:
    """Train a model of the modules of `nn`: its losses, and its accuracy on new rows."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 64, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2)
    model = nn.Sequential(nn.Embedding(TOKENS, WIDTH), encoder, nn.Linear(WIDTH, LENGTH + 1))
    optimizer, criterion = torch.optim.AdamW(model.parameters(), lr=3e-3), nn.CrossEntropyLoss()
    losses = []
    for _ in range(steps):
        tokens, counts = draw(64)
        loss = criterion(model(tokens).flatten(0, 1), counts.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    tokens, counts = draw(256)
    with torch.no_grad():
        right = model.eval()(tokens).argmax(-1) == counts
    return losses, right.float().mean().item()


def main(steps: int = 200) -> tuple[float, float]:
    """Train both, and return our accuracy and how far our losses are from torch's."""
    theirs, their_accuracy = train(torch.nn, steps)
    ours, our_accuracy = train(fastattn.nn, steps)
    print(f"accuracy of torch.nn {their_accuracy:.3f}, of fastattn.nn {our_accuracy:.3f}")
    apart = max(abs(x - y) for x, y in zip(ours[:20], theirs[:20]))
    return our_accuracy, apart


if __name__ == "__main__":
    print("accuracy {:.2f}; losses of the first 20 steps differ by {:.0e} at most".format(*main()))
