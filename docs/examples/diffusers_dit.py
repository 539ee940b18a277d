"""A diffusion transformer of diffusers, patched: attention, which it asks torch for, is ours too.

It learns by flow matching to make a bar, level or upright by its class, from noise. Run it with
`python docs/examples/diffusers_dit.py`; it takes half a minute on a CPU and ends in two pictures.
"""

import diffusers
import torch

import fastattn

SIDE, KINDS = 6, 2


def draw(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (B, 1, SIDE, SIDE) of one bar at -1 and 1, and which way it lies (B,)."""
    kind, place = torch.randint(KINDS, (batch,)), torch.randint(SIDE, (batch, 1, 1))
    rows = (torch.arange(SIDE)[:, None] == place).float().expand(batch, SIDE, SIDE)
    image = torch.where(kind[:, None, None] == 0, rows, rows.mT)
    return image[:, None] * 2 - 1, kind


def main(steps: int = 1000) -> float:
    """Train, and return the share of new images that are one whole bar of their class."""
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=3,
        attention_head_dim=16,
        in_channels=1,
        num_layers=2,
        sample_size=SIDE,
        patch_size=2,
        num_embeds_ada_norm=KINDS,
    )
    print(fastattn.patch(model))
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=steps)

    def velocity(x: torch.Tensor, time: torch.Tensor, kind: torch.Tensor) -> torch.Tensor:
        return model(x, timestep=1000 * time, class_labels=kind).sample

    with fastattn.replace_sdpa():  # torch.nn.functional.scaled_dot_product_attention is ours here.
        for step in range(1, steps + 1):
            image, kind = draw(64)
            time, noise = torch.rand(64), torch.randn_like(image)
            x = torch.lerp(noise, image, time[:, None, None, None])
            loss = (velocity(x, time, kind) - (image - noise)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if step % 200 == 0:
                print(f"step {step}: loss {loss.item():.3f}")
        model.eval()
        kind, x = torch.arange(KINDS).repeat(32), torch.randn(64, 1, SIDE, SIDE)
        for time in torch.linspace(0, 1, 41)[:-1]:
            with torch.no_grad():
                x = x + velocity(x, time.expand(64), kind) / 40
    made = x[:, 0] > 0
    for rows in zip(*made[:2].tolist()):
        print("  |  ".join("".join(" #"[pixel] * 2 for pixel in row) for row in rows))
    lines = torch.where(kind[:, None, None] == 0, made, made.mT)
    return (lines.all(2).sum(1) == 1).float().mean().item()


if __name__ == "__main__":
    print(f"{main():.2f} of the images are one whole bar of their class")
