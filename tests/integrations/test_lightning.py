"""A patched model in Lightning: it trains as unpatched, and its checkpoint loads without ours."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastattn
from against_unpatched import breaches, gradients_of, measure
from fastattn.checking import Results
from fastattn.ops.core.backends import INTERPRETED

lightning: Any = pytest.importorskip("lightning")
pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="compares the reference backend"),
    # Lightning's own, about workers of its loader and what it does not log.
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


class Encoder(lightning.LightningModule):
    """torch.nn's encoder with a loss."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.losses: list[torch.Tensor] = []

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        """The loss of a batch."""
        rows = batch[0].to(next(self.parameters()).dtype)
        loss = (self.encoder(rows) - rows.roll(1, -1)).square().mean()
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> Any:
        """Not Adam, which sees no wrong factor."""
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_before_optimizer_step(self, _: Any) -> None:
        """Keep the gradients of the last step."""
        self.gradients = gradients_of(self)


def fit(model: Any, folder: Path) -> Results:
    """The losses of three steps, and the gradients of the last."""
    model.losses.clear()
    rows = torch.randn(6, 5, 16, generator=torch.Generator().manual_seed(0))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(rows), batch_size=2)
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(model, loader)
    trainer.save_checkpoint(folder / "last.ckpt")
    return {"losses": torch.stack(model.losses), **model.gradients}


def test_training(tmp_path: Path):
    torch.manual_seed(0)
    model = Encoder()
    measured = measure(model, lambda model: fit(model, tmp_path), neighbours=4)
    kinds = {entry.theirs for entry in fastattn.patch(model).replaced}
    assert nn.TransformerEncoderLayer in kinds
    assert breaches(fit(model, tmp_path), measured) == []
    again = Encoder.load_from_checkpoint(tmp_path / "last.ckpt")
    assert type(again.encoder) is nn.TransformerEncoder
    assert all(torch.equal(x, model.state_dict()[n]) for n, x in again.state_dict().items())
