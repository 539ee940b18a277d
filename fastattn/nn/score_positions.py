"""Positions as modules that change attention's scores: ALiBi's and T5's."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn

from .. import ops
from .mlp import is_only
from .tracing import one_node


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

    Example:
        >>> relative = fastattn.nn.AlibiPositions(2)
        >>> layer = fastattn.nn.Attention(16, 2, relative=relative, causal=True)
        >>> layer(torch.randn(1, 5, 16)).shape
        torch.Size([1, 5, 16])
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

    Example:
        >>> relative = fastattn.nn.RelativePositionBias(2)
        >>> fastattn.nn.Attention(16, 2, relative=relative)(torch.randn(1, 5, 16)).shape
        torch.Size([1, 5, 16])
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
