"""What is added to attention's scores: a tensor, ALiBi, and T5's bias by distance."""

import math
from collections.abc import Sequence

import torch

from .attention_terms import Index, ScoreTerm, broadcast_strides, layout_name
from .sharding import is_distributed, replicated


class AdditiveBias(ScoreTerm):
    """A bias added to the scores: (B or 1, H or 1, M or 1, N or 1), of a float dtype.

    A score of which it is -inf does not count.
    """

    learned = True

    def __init__(self, bias: torch.Tensor) -> None:
        self.tensors = (bias,)

    @property
    def integers(self) -> Sequence[int]:  # type: ignore[override]
        return broadcast_strides(self.tensors[0])

    def function_name(self, dtype: torch.dtype) -> str:
        return layout_name("additive bias", self.integers)

    def score(
        self, score: torch.Tensor, m: Index, n: Index, queries: Index, keys: Index
    ) -> torch.Tensor:
        return score + self.tensors[0].to(score.dtype)


class Alibi(ScoreTerm):
    """Minus a slope times the distance to the key; slopes (H,) or (B, H)."""

    functions = "alibi"
    learned = True

    def __init__(self, slopes: torch.Tensor) -> None:
        self.tensors = (slopes[None] if slopes.dim() == 1 else slopes,)

    @property
    def integers(self) -> Sequence[int]:  # type: ignore[override]
        return broadcast_strides(self.tensors[0])

    def score(
        self, score: torch.Tensor, m: Index, n: Index, queries: Index, keys: Index
    ) -> torch.Tensor:
        distance = (m + keys - queries - n).abs()
        return score - self.tensors[0][..., None, None].to(score.dtype) * distance


def alibi_slopes(num_heads: int) -> torch.Tensor:
    """The slopes of ALiBi for a number of heads: (num_heads,) float32 on the CPU.

    For a power of two H these are 2^(-8/H), 2^(-16/H), ..., 2^-8; for other numbers those of the
    next smaller power of two, followed by every second one of the next larger.

    Source: Press et al., "Train Short, Test Long" (2021).
    """
    if num_heads < 1:
        raise ValueError(f"alibi_slopes: num_heads must be positive, got {num_heads}")
    whole = 1 << (num_heads.bit_length() - 1)
    slopes = 2.0 ** (torch.arange(1, whole + 1) * (-8.0 / whole))
    between = 2.0 ** ((2 * torch.arange(num_heads - whole) + 1) * (-4.0 / whole))
    return torch.cat((slopes, between))


class RelativeBias(ScoreTerm):
    """T5's bias: a learned number for each head and bucket of distances between query and key.

    Half of the buckets have a distance each; those further away share buckets whose width grows
    with the logarithm of the distance, the last one from max_distance on. A query's place is that
    of `attention`: the last query stands at the last key.

    Args:
        table: (buckets, H), of a float dtype, such as the weight of Hugging Face's
            `relative_attention_bias`. It gets a gradient.
        bidirectional: whether keys after the query have half of the buckets for themselves; if
            not, all of them share the bucket of distance 0.
        max_distance: from here on all distances are one.

    Raises:
        ValueError: a shape or number does not fit.

    Source: Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text
    Transformer" (2020).
    """

    functions = "relative bias"
    learned = True

    def __init__(
        self, table: torch.Tensor, bidirectional: bool = True, max_distance: int = 128
    ) -> None:
        if table.dim() != 2 or not table.is_floating_point():
            raise ValueError(
                "RelativeBias: table must be (buckets, H) of a float dtype, "
                f"got {tuple(table.shape)} of {table.dtype}"
            )
        fewest = 4 if bidirectional else 2
        if table.shape[0] < fewest or (bidirectional and table.shape[0] % 2 != 0):
            raise ValueError(
                f"RelativeBias: table must have {fewest} buckets or more"
                f"{', an even number of them' if bidirectional else ''}, got {table.shape[0]}"
            )
        one_each = table.shape[0] // fewest
        if max_distance <= one_each:
            raise ValueError(
                f"RelativeBias: max_distance must be more than {one_each}, the distances that "
                f"have a bucket each, got {max_distance}"
            )
        distances = torch.arange(-max_distance, max_distance + 1, device=table.device)
        buckets = _bucket(distances, table.shape[0], bidirectional, max_distance)
        if is_distributed(table):
            buckets = replicated(buckets, like=table)
        # Batch and heads first, as in every tensor of a term. Kernels read the bias of a distance
        # at once, and its bucket where they sum the table's gradient.
        values = table.detach()[buckets].t().to(torch.promote_types(table.dtype, torch.float32))
        self.tensors = (
            table.t().contiguous()[None],
            buckets.int()[None, None],
            values.contiguous()[None],
        )
        self.integers = (max_distance,)

    def score(
        self, score: torch.Tensor, m: Index, n: Index, queries: Index, keys: Index
    ) -> torch.Tensor:
        (reach,) = self.integers
        distance = (n - m - (keys - queries)).clamp(-reach, reach)
        buckets = self.tensors[1][0, 0][distance + reach].long()
        bias = self.tensors[0][0].t()[buckets].movedim(-1, -3)  # (H, M, N)
        # Where batch elements differ in length, distances are (B, 1, M, N).
        return score + (bias.squeeze(1) if bias.dim() == 5 else bias).to(score.dtype)


def _bucket(
    distance: torch.Tensor, buckets: int, bidirectional: bool, max_distance: int
) -> torch.Tensor:
    """The bucket of each distance of a key from a query, with T5's own arithmetic in float32."""
    if bidirectional:
        buckets //= 2
        first = (distance > 0) * buckets
        distance = distance.abs()
    else:
        first = torch.zeros_like(distance)
        distance = (-distance).clamp(min=0)
    one_each = buckets // 2
    steps = torch.log(distance.float().clamp(min=1.0) / one_each)
    steps = steps / math.log(max_distance / one_each) * (buckets - one_each)
    shared = (one_each + steps.long()).clamp(max=buckets - 1)
    return first + torch.where(distance < one_each, distance, shared)
