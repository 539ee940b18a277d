"""A mask and a score that learns, in plain Python: attention finds out how far to look back.

Every token of a row repeats the one LAG before it, within its document. The score is a table by
distance, which attention learns through the function that reads it. Run it with
`python docs/examples/own_scores.py`; it takes a few seconds on a CPU.
"""

import torch

import fastattn

TOKENS, LENGTH, REACH, LAG = 8, 48, 12, 5


def main(steps: int = 60) -> int:
    """Train the table, and return the distance that it came to favour."""
    torch.manual_seed(0)
    documents = (torch.arange(LENGTH) >= LENGTH // 3).long()  # Two in a row of tokens.
    table = torch.zeros(REACH, requires_grad=True)

    def by_distance(score, b, h, q_idx, kv_idx):
        return score + table[(q_idx - kv_idx).clamp(0, REACH - 1)]

    def before_in_document(b, h, q_idx, kv_idx):
        near = (q_idx > kv_idx) & (q_idx - kv_idx < REACH)
        return near & (documents[q_idx] == documents[kv_idx])

    optimizer = torch.optim.Adam([table], lr=0.2)
    wanted = documents == documents.roll(LAG)  # A document's first tokens have none to repeat.
    wanted[:LAG] = False
    for step in range(steps):
        tokens = torch.randint(TOKENS, (16, LENGTH))
        values = torch.nn.functional.one_hot(tokens, TOKENS).float()[:, None]
        nothing = torch.zeros(16, 1, LENGTH, 16)  # No content is compared: distance alone counts.
        seen = fastattn.attention(
            nothing, nothing, values, score_mods=[by_distance], mask_mod=before_in_document
        )
        repeated = tokens.roll(LAG, 1)
        loss = -(seen[:, 0].gather(2, repeated[..., None])[..., 0][:, wanted] + 1e-3).log().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 19:
            print(f"step {step + 1}: loss {loss.item():.3f}")
    weights = table.detach().softmax(0)
    for distance, weight in enumerate(weights.tolist()):
        print(f"{distance:2} back  {'#' * round(40 * weight)}")
    return int(weights.argmax())


if __name__ == "__main__":
    print(f"what is repeated lies {main()} back")
