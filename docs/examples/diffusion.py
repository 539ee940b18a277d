"""A diffusion transformer: blocks with adaLN, norms of queries and keys, and 2-D rotary positions.

It learns by flow matching to make a bar, level or upright by its class, from noise. Run it with
`python docs/examples/diffusion.py`; it takes half a minute on a CPU and ends in two pictures.
"""

import torch

import fastattn
import fastattn.nn as nn

SIDE, WIDTH, HEADS, HEAD = 6, 48, 3, 16
PLACES = torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE))
ANGLES = (PLACES[:, :, None] * 10.0 ** -torch.linspace(0, 1, HEAD // 4)).flatten(1)
"""What the pairs of a head turn by: half of them by a pixel's row, half by its column."""


class Block(nn.Module):
    """Attention and a feed-forward layer, each shifted, scaled and gated by the condition."""

    def __init__(self) -> None:
        super().__init__()
        self.modulation = nn.Linear(WIDTH, 6 * WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.q_norm, self.k_norm = nn.RMSNorm(HEAD), nn.RMSNorm(HEAD)
        self.mlp = nn.MLP(WIDTH, 2 * WIDTH)

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        shift, scale, gate, *of_mlp = self.modulation(condition)[:, None].chunk(6, -1)
        y = self.qkv(fastattn.modulated_layer_norm(x, shift, scale))
        q, k, v = y.unflatten(-1, (3, HEADS, HEAD)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        q, k = fastattn.apply_rotary_qk(q, k, ANGLES.cos(), ANGLES.sin())
        x = x + gate * self.out(fastattn.attention(q, k, v).transpose(1, 2).flatten(2))
        return x + of_mlp[2] * self.mlp(fastattn.modulated_layer_norm(x, *of_mlp[:2]))


class Diffusion(nn.Module):
    """How an image (B, pixels, 1) of a class (B,) moves at a time (B, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.pixel, self.time = nn.Linear(1, WIDTH), nn.Linear(1, WIDTH)
        self.kind, self.out = nn.Embedding(2, WIDTH), nn.Linear(WIDTH, 1)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: torch.Tensor, time: torch.Tensor, kind: torch.Tensor) -> torch.Tensor:
        x, condition = self.pixel(x), torch.tanh(self.time(time) + self.kind(kind))
        for block in self.blocks:
            x = block(x, condition)
        return self.out(x)


def main(steps: int = 400) -> float:
    """Train, and return the share of new images that are one whole bar of their class."""
    torch.manual_seed(0)
    model = Diffusion()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(steps):
        kind, bar = torch.randint(2, (64,)), torch.randint(SIDE, (64, 1))
        image = (bar == PLACES[:, kind].T).float()[..., None] * 2 - 1
        time, noise = torch.rand(64, 1), torch.randn_like(image)
        x = torch.lerp(noise, image, time[..., None])
        loss = (model(x, time, kind) - (image - noise)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    kind, x = torch.arange(2).repeat(32), torch.randn(64, SIDE * SIDE, 1)
    for time in torch.linspace(0, 1, 41)[:-1]:
        with torch.no_grad():
            x = x + model(x, time.expand(64, 1), kind) / 40
    made = (x > 0).unflatten(1, (SIDE, SIDE))[..., 0]
    for rows in zip(*made[:2].tolist()):
        print("  |  ".join("".join(" #"[pixel] * 2 for pixel in row) for row in rows))
    lines = torch.where(kind[:, None, None] == 0, made, made.mT)
    return (lines.all(2).sum(1) == 1).float().mean().item()


if __name__ == "__main__":
    print(f"{main():.2f} of the images are one whole bar of their class")
