"""Lightning with nn.TransformerEncoder: one call of `fastattn.patch`, and no more.

Run it with `python docs/examples/lightning_encoder.py`; it takes some ten seconds on a CPU.
"""

import tempfile

import lightning
import torch
from torch import nn

import fastattn

TOKENS, LENGTH, WIDTH = 8, 10, 32


def draw(rows: int) -> torch.utils.data.TensorDataset:
    """Tokens (rows, LENGTH), and whether the first stands again behind itself (rows,)."""
    tokens = torch.randint(TOKENS, (rows, LENGTH))
    return torch.utils.data.TensorDataset(tokens, (tokens[:, 1:] == tokens[:, :1]).any(1).long())


class Classifier(lightning.LightningModule):
    """An encoder of torch.nn and a linear layer of what it gives for the first token."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 64, dropout=0.0, batch_first=True)
        self.embedding, self.encoder = nn.Embedding(TOKENS, WIDTH), nn.TransformerEncoder(layer, 2)
        self.place, self.head = nn.Parameter(torch.randn(LENGTH, WIDTH)), nn.Linear(WIDTH, 2)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(self.embedding(tokens) + self.place)[:, 0])

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        tokens, kind = batch
        return nn.functional.cross_entropy(self(tokens), kind)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def main(rows: int = 12800) -> float:
    """Train, read the checkpoint into modules without ours, and return their accuracy."""
    lightning.seed_everything(0)
    model = Classifier()
    print(fastattn.patch(model))
    with tempfile.TemporaryDirectory() as folder:
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_epochs=2,
            default_root_dir=folder,
            logger=False,
            enable_progress_bar=False,
            enable_checkpointing=False,
        )
        trainer.fit(model, torch.utils.data.DataLoader(draw(rows), 64))
        trainer.save_checkpoint(f"{folder}/last.ckpt")
        again = Classifier.load_from_checkpoint(f"{folder}/last.ckpt").eval()
    tokens, kind = draw(512).tensors
    with torch.no_grad():
        return (again(tokens).argmax(-1) == kind).float().mean().item()


if __name__ == "__main__":
    print(f"accuracy {main():.2f}")
