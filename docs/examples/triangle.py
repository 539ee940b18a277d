"""Triangle attention of protein models: each row of a pair representation, biased by the pairs.

The bias of a whole matrix is shared by its rows; its gradient sums over them in a kernel, and no
copy of the bias for each row exists. Run it with `python docs/examples/triangle.py`.
"""

import torch

import fastattn
import fastattn.nn as nn

BATCH, RESIDUES, CHANNELS, HEADS, HEAD = 2, 24, 16, 4, 8


class TriangleAttention(nn.Module):
    """Around the starting node, as Algorithm 13 of AlphaFold 2 has it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.bias = nn.LayerNorm(CHANNELS), nn.Linear(CHANNELS, HEADS, bias=False)
        self.qkv = nn.Linear(CHANNELS, 3 * HEADS * HEAD, bias=False)
        self.gate, self.out = nn.Linear(CHANNELS, HEADS * HEAD), nn.Linear(HEADS * HEAD, CHANNELS)

    def forward(self, pairs: torch.Tensor, mask: torch.Tensor, attend=fastattn.triangle_attention):
        """Pairs (B, N, N, C) and which residues are there (B, N), to an update like pairs."""
        x = self.norm(pairs)
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, HEAD)).permute(3, 0, 1, 4, 2, 5)
        bias = self.bias(x).permute(0, 3, 1, 2)[:, None]  # (B, 1, H, N, N): one for all rows.
        o = attend(q, k, v, bias, mask=mask[:, None, None, None])
        return self.out(o.transpose(2, 3).flatten(3) * torch.sigmoid(self.gate(x)))


def plain(q, k, v, bias, mask):
    """The formula in float64, with all scores (B, N, H, N, N) in memory."""
    q, k, v, bias = (x.double() for x in (q, k, v, bias))
    scores = q @ k.mT * HEAD**-0.5 + bias
    return (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v).float()


def main() -> float:
    """The largest difference from the formula, of the update and of every gradient, relatively."""
    torch.manual_seed(0)
    model = TriangleAttention()
    pairs = torch.randn(BATCH, RESIDUES, RESIDUES, CHANNELS)
    mask = torch.arange(RESIDUES) < torch.tensor([[RESIDUES], [RESIDUES - 5]])
    target, results = torch.randn_like(pairs), []
    for attend in (fastattn.triangle_attention, plain):
        model.zero_grad()
        update = model(pairs, mask, attend)
        (update * target).sum().backward()
        results.append([update, *(parameter.grad for parameter in model.parameters())])
    print(f"the bias's weight has gradients up to {model.bias.weight.grad.abs().max():.1f}")
    return max((x - y).abs().max().item() / y.abs().max().item() for x, y in zip(*results))


if __name__ == "__main__":
    print(f"update and gradients differ from the formula by {main():.0e} of themselves")
