"""A small ViT: it learns to tell the direction of stripes in noisy images that it never saw.

Run it with `python docs/examples/vit.py`; it takes some ten seconds on a CPU.
"""

import torch

from fastattn.models.vit import ViTConfig, ViTForImageClassification

SIDE, KINDS = 16, ("level", "upright", "rising", "falling")
CONFIG = ViTConfig(
    image_size=SIDE,
    patch_size=4,
    num_channels=1,
    hidden_size=48,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=96,
    num_labels=len(KINDS),
)


def draw(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (B, 1, SIDE, SIDE) of stripes in noise, and which way they go (B,)."""
    kind = torch.randint(len(KINDS), (batch,))
    down = torch.tensor([1.0, 0.0, 0.7, 0.7])[kind, None, None]
    right = torch.tensor([0.0, 1.0, 0.7, -0.7])[kind, None, None]
    along = down * torch.arange(SIDE)[:, None] + right * torch.arange(SIDE)
    phase, width = torch.rand(batch, 1, 1) * 6.3, torch.rand(batch, 1, 1) * 0.6 + 0.7
    return (torch.sin(width * along + phase) + 0.5 * torch.randn(batch, SIDE, SIDE))[:, None], kind


def main(steps: int = 200) -> float:
    """Train, and return the accuracy on new images."""
    torch.manual_seed(0)
    model = ViTForImageClassification(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(1, steps + 1):
        images, kind = draw(64)
        loss = model(images, labels=kind).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    images, kind = draw(512)
    with torch.no_grad():
        said = model(images).logits.argmax(-1)
    for row in images[0, 0].tolist():
        print("".join(" .:#"[min(3, max(0, round(pixel + 1.5)))] * 2 for pixel in row))
    print(f"is {KINDS[kind[0]]}, and taken for {KINDS[said[0]]}")
    return (said == kind).float().mean().item()


if __name__ == "__main__":
    print(f"{main():.2f} of new images are told")
