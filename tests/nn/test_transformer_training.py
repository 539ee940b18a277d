"""Training with fastattn.nn's transformer blocks follows torch's, loss by loss."""

from typing import Any

import pytest
import torch
from torch import nn

import fastattn
import fastattn.nn
from support import DEVICE, WIDEST, count_launches

WORDS, E, H, HIDDEN = 11, 8, 2, 16

device = DEVICE or "cpu"


class Model(nn.Module):
    """Token embeddings, a stack, and logits.

    Args:
        library: where the blocks come from.
        kind: "encoder" (a stack with padding), "decoder" (a causal one with a memory) or
            "encoder-decoder".
        layers: how many in each stack.
        norm_first: where the norms are.
    """

    def __init__(self, library: Any, kind: str, layers: int, norm_first: bool) -> None:
        super().__init__()
        self.kind = kind
        self.embedding = nn.Embedding(WORDS, E)
        self.places = nn.Parameter(torch.randn(16, E))
        options = {"dropout": 0.0, "batch_first": True, "norm_first": norm_first}
        if kind == "encoder":
            layer = library.TransformerEncoderLayer(E, H, HIDDEN, activation="gelu", **options)
            self.stack = library.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        elif kind == "decoder":
            layer = library.TransformerDecoderLayer(E, H, HIDDEN, **options)
            self.stack = library.TransformerDecoder(layer, layers, nn.LayerNorm(E))
        else:
            self.stack = library.Transformer(E, H, layers, layers, HIDDEN, **options)
        self.logits = nn.Linear(E, WORDS)

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        x, y = (
            self.embedding(tokens) + self.places[: tokens.shape[1]] for tokens in (source, target)
        )
        padding = source == 0
        mask = nn.Transformer.generate_square_subsequent_mask(y.shape[1], y.device, y.dtype)
        if self.kind == "encoder":
            hidden = self.stack(y, src_key_padding_mask=target == 0)
        elif self.kind == "decoder":
            hidden = self.stack(y, x, tgt_mask=mask, memory_key_padding_mask=padding)
        else:
            hidden = self.stack(
                x,
                y,
                tgt_mask=mask,
                src_key_padding_mask=padding,
                memory_key_padding_mask=padding,
                tgt_is_causal=True,
            )
        return self.logits(hidden)


def batches(steps: int, rows: int, length: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Sources, of which the last token is padding for some, and their reversal as targets."""
    generator = torch.Generator().manual_seed(4)
    found = []
    for _ in range(steps):
        source = torch.randint(1, WORDS, (rows, length), generator=generator)
        target = source.flip(1)
        source[::2, -1] = 0
        found.append((source.to(device), target.to(device)))
    return found


def losses(model: nn.Module, data: list[tuple[torch.Tensor, torch.Tensor]]) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    found = []
    for source, target in data:
        # Each word from those before it.
        logits = model(source, target[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def follow(
    backend: Any, kind: str, steps: int, layers: int, norm_first: bool, rows: int, length: int
) -> None:
    data = batches(steps, rows, length)
    curves = []
    for library, chosen in ((fastattn.nn, backend), (nn, "reference")):
        torch.manual_seed(2)
        model = Model(library, kind, layers, norm_first).to(device, WIDEST)
        with fastattn.backend(chosen), count_launches() as launches:
            curves.append(losses(model, data))
        assert bool(launches) == (chosen == "triton")
    ours, theirs = curves
    # Rounding grows from step to step.
    tolerance = 1e-7 if WIDEST is torch.float64 else 1e-2
    assert ours == pytest.approx(theirs, rel=tolerance)
    assert min(theirs[-5:]) < 0.95 * theirs[0]


every_kind = pytest.mark.parametrize("kind", ["encoder", "decoder", "encoder-decoder"])


@every_kind
@pytest.mark.parametrize("norm_first", [True, False])
def test_thirty_steps_on_the_reference_backend(kind, norm_first):
    follow("reference", kind, steps=30, layers=2, norm_first=norm_first, rows=8, length=9)


@pytest.mark.kernels
@pytest.mark.slow
@every_kind
def test_ten_steps_by_the_kernels(kind):
    follow(
        "triton",
        kind,
        steps=10,
        layers=2 if kind == "encoder" else 1,
        norm_first=False,
        rows=2,
        length=5,
    )
