"""A ViT of timm, patched: its norms become ours, and its attention, which timm asks torch for, too.

It learns to tell the direction of stripes in images. Run it with
`python docs/examples/timm_vit.py`; it takes some twenty seconds on a CPU.
"""

import timm
import torch

import fastattn

SIDE, KINDS = 32, 4


def draw(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (B, 3, SIDE, SIDE) of stripes in noise, and which way they go (B,)."""
    kind = torch.randint(KINDS, (batch,))
    down = torch.tensor([1.0, 0.0, 0.7, 0.7])[kind, None, None]
    right = torch.tensor([0.0, 1.0, 0.7, -0.7])[kind, None, None]
    along = down * torch.arange(SIDE)[:, None] + right * torch.arange(SIDE)
    wave = torch.sin(0.8 * along + torch.rand(batch, 1, 1) * 6.3)
    return wave[:, None] + 0.3 * torch.randn(batch, 3, SIDE, SIDE), kind


def main(steps: int = 60) -> float:
    """Train, and return the accuracy on new images."""
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=SIDE, patch_size=8, num_classes=KINDS, depth=2
    )
    print(fastattn.patch(model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with fastattn.replace_sdpa():  # torch.nn.functional.scaled_dot_product_attention is ours here.
        for step in range(1, steps + 1):
            images, kind = draw(32)
            loss = torch.nn.functional.cross_entropy(model(images), kind)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 20 == 0:
                print(f"step {step}: loss {loss.item():.3f}")
        images, kind = draw(256)
        with torch.no_grad():
            return (model.eval()(images).argmax(-1) == kind).float().mean().item()


if __name__ == "__main__":
    print(f"{main():.2f} of new images are told")
