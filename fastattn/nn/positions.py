"""Positions as modules that add to every token: sinusoidal and learned ones.

Those that change scores are in score_positions.py, and rotary ones, which turn queries and keys, in
rotary.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..ops.core.arguments import refuse_nested, whole_number
from ..ops.core.tensor_kinds import is_plain
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

    Example:
        >>> fastattn.nn.SinusoidalPositions(8)(torch.randn(1, 5, 8)).shape
        torch.Size([1, 5, 8])
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

    Example:
        >>> fastattn.nn.LearnedPositions(16, 8)(torch.randn(1, 5, 8)).shape
        torch.Size([1, 5, 8])
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
