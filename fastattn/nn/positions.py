"""Positions as modules: added to tokens (sinusoidal, learned), or to scores (ALiBi, T5).

Rotary positions, which turn queries and keys, are in rotary.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from .. import ops
from ..ops.core.arguments import refuse_nested, whole_number
from ..ops.core.tensor_kinds import is_plain
from .mlp import is_only
from .rotary import MOST_POSITIONS
from .tracing import one_node


class SinusoidalPositions(nn.Module):
    """Adds to every token the sines and cosines of its position.

    Column 2i has sin(p / base^(2i / embed_dim)), column 2i + 1 the cosine of the same.

    Args:
        embed_dim: the columns of x, an even number.
        max_positions: positions that the table is kept for; longer sequences compute theirs at each
            call.
        base: the wavelengths are 2 pi base^(2i / embed_dim).
        device: where the table lies.

    There are no parameters. The `table`, (max_positions, embed_dim), is a float32 buffer that no
    state_dict holds, and stays float32 when the module is cast.

    Source: Vaswani et al., "Attention Is All You Need" (2017), section 3.5.
    """

    table: torch.Tensor

    def __init__(
        self,
        embed_dim: int,
        max_positions: int = 2048,
        base: float = 10000.0,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if embed_dim < 2 or embed_dim % 2:
            raise ValueError(
                f"SinusoidalPositions: embed_dim must be even and positive, got {embed_dim}"
            )
        if max_positions < 1:
            raise ValueError(
                f"SinusoidalPositions: max_positions must be positive, got {max_positions}"
            )
        self.embed_dim = embed_dim
        self.max_positions = max_positions
        self.base = base
        self.register_buffer("table", self.rows(max_positions, device=device), persistent=False)

    @one_node
    def forward(self, x: torch.Tensor, positions: torch.Tensor | int | None = None) -> torch.Tensor:
        """x (..., S, embed_dim) plus the rows of its positions, in x's dtype.

        Args:
            x: the tokens.
            positions: the position of the first token, 0 if None; or each token's own, an integer
                tensor that broadcasts to (..., S), below max_positions.

        Raises:
            TypeError: the positions are no integers.
            ValueError: x does not fit, or a position is negative or, in a tensor, beyond the table.
                On a GPU nothing is asked of a tensor's numbers: such tokens come out as NaN.
        """
        check_columns("SinusoidalPositions", x, self.embed_dim)
        if isinstance(positions, torch.Tensor):
            places = row_numbers("SinusoidalPositions", positions, self.max_positions)
            inside = (places >= 0) & (places < self.max_positions)
            rows = F.embedding(places.clamp(0, self.max_positions - 1), self.table)
            rows = torch.where(inside[..., None], rows, float("nan"))
        else:
            first = first_position("SinusoidalPositions", positions)
            end = first + x.shape[-2]
            if end > MOST_POSITIONS:
                raise ValueError(
                    f"SinusoidalPositions: positions must stay below {MOST_POSITIONS}, which "
                    f"float32 tells apart, got tokens at positions up to {end - 1}"
                )
            if end <= self.max_positions:
                rows = self.table[first:end]
            else:
                rows = self.rows(x.shape[-2], first, device=x.device)
        return (x + rows).to(x.dtype)

    def rows(
        self, length: int, first: int = 0, *, device: torch.device | str | None = None
    ) -> torch.Tensor:
        """The rows of so many positions from the first one on, (length, embed_dim) in float32."""
        steps = torch.arange(0, self.embed_dim, 2, dtype=torch.float32, device=device)
        frequencies = torch.exp(steps * (-math.log(self.base) / self.embed_dim))
        places = torch.arange(first, first + length, dtype=torch.float32, device=device)
        angles = places[:, None] * frequencies
        return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)

    def extra_repr(self) -> str:
        """The arguments, for `print`."""
        return f"{self.embed_dim}, max_positions={self.max_positions}, base={self.base}"

    def _apply(self, fn: Callable, recurse: bool = True) -> SinusoidalPositions:
        # Casting must not round the table, and `to_empty` must not leave it unwritten.
        super()._apply(fn, recurse)
        self.table = self.rows(self.max_positions, device=self.table.device)
        return self


class LearnedPositions(nn.Embedding):
    """Adds to every token a learned row of its position, as in GPT-2, BERT and ViT.

    Its `weight` (max_positions, embed_dim) is that of the torch.nn.Embedding which Hugging Face's
    models have there, and starts normal with standard deviation 0.02.

    Args:
        max_positions: how many positions there are.
        embed_dim: the columns of x.
        device, dtype: as in torch.nn.Embedding.
    """

    def __init__(
        self, max_positions: int, embed_dim: int, *, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(max_positions, embed_dim, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw the weight."""
        nn.init.normal_(self.weight, std=0.02)

    @one_node
    def forward(self, x: torch.Tensor, positions: torch.Tensor | int | None = None) -> torch.Tensor:
        """x (..., S, embed_dim) plus the rows of its positions, in x's dtype.

        Args:
            x: the tokens.
            positions: the position of the first token, 0 if None; or each token's own, an integer
                tensor that broadcasts to (..., S).

        Raises:
            TypeError: the positions are no integers.
            ValueError: x does not fit, or a position is negative or beyond max_positions.
        """
        check_columns("LearnedPositions", x, self.embedding_dim)
        if isinstance(positions, torch.Tensor):
            places = row_numbers("LearnedPositions", positions, self.num_embeddings)
            rows = super().forward(places)
        else:
            first = first_position("LearnedPositions", positions)
            end = first + x.shape[-2]
            if end > self.num_embeddings:
                raise ValueError(
                    f"LearnedPositions: there are {self.num_embeddings} positions, got tokens at "
                    f"positions up to {end - 1}"
                )
            rows = self.weight[first:end]
        return (x + rows).to(x.dtype)


class ScorePositions(nn.Module):
    """Positions that enter attention's scores. Derive from it for one's own."""

    def terms(self, queries: int, keys: int) -> dict[str, Any]:
        """The keyword arguments that they are for `fastattn.attention`.

        Args:
            queries, keys: how many there are; the last query stands at the last key.
        """
        raise TypeError(f"{type(self).__name__} must define terms()")


class AlibiPositions(ScorePositions):
    """Lowers each score by the distance of query and key, times the slope of its head.

    Args:
        num_heads: the heads of the queries.
        learnable: whether the slopes are a parameter. They then start where they else stay, at
            `fastattn.alibi_slopes`.
        device: where the slopes lie.

    Where the `slopes`, (num_heads,), are no parameter, they stay float32 when the module is cast,
    and no state_dict holds them.

    Source: Press, Smith and Lewis, "Train Short, Test Long" (2021).
    """

    slopes: torch.Tensor

    def __init__(self, num_heads: int, *, learnable: bool = False, device: Any = None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.learnable = learnable
        device = torch.get_default_device() if device is None else device
        slopes = ops.alibi_slopes(num_heads).to(device)
        if learnable:
            self.slopes = nn.Parameter(slopes)
        else:
            self.register_buffer("slopes", slopes, persistent=False)

    def reset_parameters(self) -> None:
        """Set the slopes to those of the paper."""
        with torch.no_grad():
            self.slopes.copy_(ops.alibi_slopes(self.num_heads))

    def terms(self, queries: int, keys: int) -> dict[str, Any]:
        """The slopes."""
        return {"alibi_slopes": self.slopes}

    def extra_repr(self) -> str:
        """The arguments, for `print`."""
        return f"{self.num_heads}" + (", learnable=True" if self.learnable else "")

    def _apply(self, fn: Callable, recurse: bool = True) -> AlibiPositions:
        super()._apply(fn, recurse)
        if not self.learnable:
            self.slopes = ops.alibi_slopes(self.num_heads).to(self.slopes.device)
        return self


class RelativePositionBias(ScorePositions):
    """Adds to each score a learned number of its head and of the distance of query and key.

    Near distances have a number each, further ones share one with ever more others. As in T5, the
    table is `relative_attention_bias.weight`, (num_buckets, num_heads). It starts normal with
    standard deviation 0.02.

    Args:
        num_heads: the heads of the queries.
        num_buckets: the rows of the table.
        max_distance: from where on all distances share the last one.
        bidirectional: whether keys after the query have half of the table, as in T5's encoder; in a
            decoder, which does not see them, they would share the number of distance 0.
        device, dtype: as in torch.nn.Embedding.

    Source: Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text
    Transformer" (2020).
    """

    def __init__(
        self,
        num_heads: int,
        num_buckets: int = 32,
        max_distance: int = 128,
        *,
        bidirectional: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        least = 4 if bidirectional else 2
        if num_buckets < least or num_buckets % (least // 2):
            raise ValueError(
                f"RelativePositionBias: num_buckets must be {least} or more"
                f"{', and even' if bidirectional else ''}, got {num_buckets}"
            )
        exact = num_buckets // least
        if max_distance <= exact:
            raise ValueError(
                f"RelativePositionBias: max_distance must be greater than the {exact} distances "
                f"that have a number each, got {max_distance}"
            )
        self.num_buckets = num_buckets
        self.max_distance = max_distance
        self.bidirectional = bidirectional
        self.relative_attention_bias = nn.Embedding(
            num_buckets, num_heads, device=device, dtype=dtype
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the table."""
        nn.init.normal_(self.relative_attention_bias.weight, std=0.02)

    @one_node
    def forward(self, queries: int, keys: int) -> torch.Tensor:
        """The bias as a tensor, (1, num_heads, queries, keys), the last query at the last key."""
        device = self.relative_attention_bias.weight.device
        places = torch.arange(keys - queries, keys, device=device)[:, None]
        distances = torch.arange(keys, device=device) - places
        return self.relative_attention_bias(self._buckets(distances)).permute(2, 0, 1)[None]

    def terms(self, queries: int, keys: int) -> dict[str, Any]:
        """The table, from which the kernels take what they need."""
        embedding = self.relative_attention_bias
        table = embedding.weight
        if not is_only(embedding, (nn.Embedding,)):
            table = embedding(torch.arange(self.num_buckets, device=table.device))
        bias = ops.RelativeBias(table, self.bidirectional, self.max_distance)
        return {"relative_bias": bias}

    def _buckets(self, distances: torch.Tensor) -> torch.Tensor:
        """The row of each distance from a query to a key, which is negative for earlier keys."""
        buckets = self.num_buckets
        first: Any = 0
        if self.bidirectional:
            buckets //= 2
            first = (distances > 0) * buckets
            distances = distances.abs()
        else:
            distances = -distances.clamp(max=0)
        exact = buckets // 2
        # In float32 and in this order: the rows of Hugging Face's model, to the last distance.
        far = torch.log(distances.clamp(min=1).float() / exact) / math.log(
            self.max_distance / exact
        )
        far = exact + (far * (buckets - exact)).long()
        return first + torch.where(distances < exact, distances, far.clamp(max=buckets - 1))

    def extra_repr(self) -> str:
        """The arguments, for `print`."""
        return f"max_distance={self.max_distance}, bidirectional={self.bidirectional}"


def check_columns(name: str, x: torch.Tensor, columns: int) -> None:
    """(..., S, columns)."""
    if x.is_nested:
        refuse_nested(name, "x")
    if x.dim() < 2 or x.shape[-1] != columns:
        raise ValueError(f"{name}: x must be (..., S, {columns}), got the shape {tuple(x.shape)}")


def row_numbers(name: str, positions: torch.Tensor, rows: int) -> torch.Tensor:
    """Positions as int32 or int64, which are those of rows where that can be seen at once."""
    kind = positions.dtype
    if kind.is_floating_point or kind.is_complex or kind is torch.bool:
        raise TypeError(f"{name}: positions must be integers, got a tensor of {kind}")
    if positions.is_cpu and positions.numel() and is_plain((positions,)):
        least, largest = (int(end) for end in positions.aminmax())
        if least < 0 or largest >= rows:
            raise ValueError(
                f"{name}: positions must be in [0, {rows}), got {least if least < 0 else largest}"
            )
    return positions if kind in (torch.int32, torch.int64) else positions.long()


def first_position(name: str, positions: int | None) -> int:
    """The position of the first token."""
    positions = whole_number(name, "positions", positions)
    if positions is not None and positions < 0:
        raise ValueError(f"{name}: positions must not be negative, got {positions}")
    return positions or 0
