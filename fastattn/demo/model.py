"""A Llama-shaped language model over bytes, and the table of pieces it is built from.

The model is written once. What differs between the two runs of the demo is the table: `PLAIN`
takes every piece from PyTorch, `FUSED` every piece from fastattn. The embedding and the optimizer
are PyTorch's in both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastattn
import fastattn.nn

VOCABULARY = 256
NORM_EPS = 1e-5


def plain_add_norm(branch: Tensor, residual: Tensor, norm: nn.RMSNorm) -> tuple[Tensor, Tensor]:
    """Add a block's output to the residual stream and normalize the sum for the next block."""
    residual = residual + branch
    return norm(residual), residual


def fused_add_norm(branch: Tensor, residual: Tensor, norm: nn.RMSNorm) -> tuple[Tensor, Tensor]:
    """The same as `plain_add_norm`, in one kernel."""
    return fastattn.add_rms_norm(branch, residual, norm.weight, norm.eps)


def plain_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate the two halves of each head of queries and keys by the angle of its position."""

    def rotated(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    return rotated(q), rotated(k)


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention over tensors of shape (batch, heads, length, head width)."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def fused_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same as `plain_attention`."""
    return fastattn.attention(q, k, v, causal=True)


def plain_gated_linear(x: Tensor, gate_up: nn.Linear) -> Tensor:
    """The first half of the MLP: one product for the gate and what it gates, then SwiGLU."""
    gate, up = gate_up(x).chunk(2, dim=-1)
    return F.silu(gate) * up


def fused_gated_linear(x: Tensor, gate_up: nn.Linear) -> Tensor:
    """The same as `plain_gated_linear`, in one kernel."""
    w_gate, w_up = gate_up.weight.chunk(2, dim=0)
    return fastattn.gated_linear(x, w_gate, w_up)


def plain_loss(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The mean cross entropy of the logits x weight^T."""
    return F.cross_entropy(F.linear(x, weight).flatten(0, -2), targets.flatten())


def fused_loss(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The same as `plain_loss`, without ever holding all logits."""
    # The loss has the dtype of x, and should not be rounded to the one that autocast gave it.
    return fastattn.linear_cross_entropy(x.float(), weight, targets)


class Pieces(NamedTuple):
    """What the model is made of, one entry for each piece that can be exchanged."""

    linear: type[nn.Linear]
    norm: type[nn.RMSNorm]
    add_norm: Callable[[Tensor, Tensor, nn.RMSNorm], tuple[Tensor, Tensor]]
    rotary: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    attention: Callable[[Tensor, Tensor, Tensor], Tensor]
    gated_linear: Callable[[Tensor, nn.Linear], Tensor]
    linear_cross_entropy: Callable[[Tensor, Tensor, Tensor], Tensor]
    logits: Callable[[Tensor, Tensor], Tensor]


PLAIN = Pieces(
    linear=nn.Linear,
    norm=nn.RMSNorm,
    add_norm=plain_add_norm,
    rotary=plain_rotary,
    attention=plain_attention,
    gated_linear=plain_gated_linear,
    linear_cross_entropy=plain_loss,
    logits=F.linear,
)

FUSED = Pieces(
    linear=fastattn.nn.Linear,
    norm=fastattn.nn.RMSNorm,
    add_norm=fused_add_norm,
    rotary=fastattn.apply_rotary_qk,
    attention=fused_attention,
    gated_linear=fused_gated_linear,
    linear_cross_entropy=fused_loss,
    logits=fastattn.linear,
)

VARIANTS = {"plain": PLAIN, "fused": FUSED}


@dataclass(frozen=True)
class ModelSizes:
    """The sizes that determine the model's parameters, and the longest text it reads at once."""

    width: int
    layers: int
    heads: int
    context: int


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, sizes: ModelSizes, pieces: Pieces) -> None:
        super().__init__()
        self.heads = sizes.heads
        self.pieces = pieces
        self.qkv = pieces.linear(sizes.width, 3 * sizes.width, bias=False)
        self.out = pieces.linear(sizes.width, sizes.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = self.pieces.rotary(q, k, cos, sin)
        mixed = self.pieces.attention(q, k, v)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


class GatedMLP(nn.Module):
    """The MLP of Llama: two products, one gating the other, and a third back to the width."""

    def __init__(self, sizes: ModelSizes, pieces: Pieces) -> None:
        super().__init__()
        # Two thirds of four times the width, so that three matrices cost as much as the two of
        # an ordinary MLP; rounded up to a multiple of 64.
        hidden = -(-8 * sizes.width // (3 * 64)) * 64
        self.pieces = pieces
        self.gate_up = pieces.linear(sizes.width, 2 * hidden, bias=False)
        self.down = pieces.linear(hidden, sizes.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.pieces.gated_linear(x, self.gate_up))


def _add_norm(
    pieces: Pieces, branch: Tensor, residual: Tensor | None, norm: nn.RMSNorm
) -> tuple[Tensor, Tensor]:
    """Add and normalize; the first branch, which is the embedding, starts the residual stream."""
    if residual is None:
        return norm(branch), branch
    return pieces.add_norm(branch, residual, norm)


class Block(nn.Module):
    """One layer, as a step from one residual stream and pending branch to the next.

    A block does not add its MLP's output to the residual stream but hands both on, because the
    addition is one kernel with the norm that follows it, and that norm is the next block's.
    """

    def __init__(self, sizes: ModelSizes, pieces: Pieces) -> None:
        super().__init__()
        self.pieces = pieces
        self.attention_norm = pieces.norm(sizes.width, eps=NORM_EPS)
        self.attention = Attention(sizes, pieces)
        self.mlp_norm = pieces.norm(sizes.width, eps=NORM_EPS)
        self.mlp = GatedMLP(sizes, pieces)

    def forward(
        self, branch: Tensor, residual: Tensor | None, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        normed, residual = _add_norm(self.pieces, branch, residual, self.attention_norm)
        branch = self.attention(normed, cos, sin)
        normed, residual = self.pieces.add_norm(branch, residual, self.mlp_norm)
        return self.mlp(normed), residual


class LanguageModel(nn.Module):
    """Predicts the next byte at every position of a text.

    Parameter names and initial values depend on the sizes and on torch's seed alone, never on
    the pieces, so a plain and a fused model of one seed start from the same state.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, sizes: ModelSizes, pieces: Pieces) -> None:
        super().__init__()
        self.sizes = sizes
        self.pieces = pieces
        self.embedding = nn.Embedding(VOCABULARY, sizes.width)
        self.blocks = nn.ModuleList(Block(sizes, pieces) for _ in range(sizes.layers))
        self.final_norm = pieces.norm(sizes.width, eps=NORM_EPS)
        self._initialize()

        half = sizes.width // sizes.heads // 2
        frequencies = 10_000.0 ** (-torch.arange(half) / half)
        angles = torch.arange(sizes.context)[:, None] * frequencies
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def _initialize(self) -> None:
        """Draw every matrix, those that feed the residual stream smaller the more there are."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                feeds_residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
                std = 0.02 / (2 * self.sizes.layers) ** 0.5 if feeds_residual else 0.02
                nn.init.normal_(parameter, std=std)

    def features(self, tokens: Tensor) -> Tensor:
        """Map byte tokens (batch, length) to what the logits are products of, (..., width)."""
        cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        branch: Tensor = self.embedding(tokens)
        residual: Tensor | None = None
        for block in self.blocks:
            branch, residual = block(branch, residual, cos, sin)
        normed, _ = _add_norm(self.pieces, branch, residual, self.final_norm)
        return normed

    def forward(self, tokens: Tensor) -> Tensor:
        """Map byte tokens (batch, length) to logits (batch, length, 256)."""
        return self.pieces.logits(self.features(tokens), self.embedding.weight)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The mean cross entropy of the next byte, in nats."""
        features = self.features(tokens)
        return self.pieces.linear_cross_entropy(features, self.embedding.weight, targets)

    @torch.no_grad()
    def generate(self, prompt: bytes, length: int, *, temperature: float, seed: int) -> bytes:
        """Continue `prompt` by `length` sampled bytes, the same ones for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        text = list(prompt)
        for _ in range(length):
            window = torch.tensor([text[-self.sizes.context :]], device=self.cos.device)
            logits = self(window)[0, -1].float().cpu()
            probabilities = torch.softmax(logits / temperature, dim=-1)
            text.append(int(torch.multinomial(probabilities, 1, generator=generator)))
        return bytes(text)
