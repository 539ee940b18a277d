"""What is added to attention's scores: a tensor, ALiBi, and T5's bias by distance."""

import math
from collections.abc import Sequence

import torch

from ..core.arguments import check_device, check_float_tensor
from ..core.sharding import is_distributed, replicate
from .shapes import (
    broadcast_strides,
    check_broadcast,
    expand_dimensions,
    insert_dimension,
    layout_name,
)
from .terms import Index, ScoreTerm, Sizes

FARTHEST_BUCKET = 2**24
"""The largest max_distance of a RelativeBias, which has a number for each distance up to it."""


class AdditiveBias(ScoreTerm):
    """A bias added to the scores, of a float dtype, that broadcasts to (B, H, M, N).

    A score of which it is -inf does not count.
    """

    learned = True
    by_strides = True

    def __init__(self, bias: torch.Tensor) -> None:
        self.tensors = (expand_dimensions(bias),)

    def check(self, op: str, name: str, q: torch.Tensor, sizes: Sizes) -> None:
        (bias,) = self.tensors
        check_float_tensor(op, name, bias)
        check_device(op, name, bias, q)
        check_broadcast(op, name, bias, sizes)

    @property
    def integers(self) -> Sequence[int]:  # type: ignore[override]
        return broadcast_strides(self.tensors[0])

    def function_name(self, dtype: torch.dtype) -> str:
        return layout_name("additive bias", self.tensors[0])

    def score(
        self, score: torch.Tensor, m: Index, n: Index, queries: Index, keys: Index
    ) -> torch.Tensor:
        return score + self.tensors[0].to(score.dtype)


class SharedBias(AdditiveBias):
    """A bias (matrices, H or 1, M or 1, N or 1) of which several batch elements share each matrix.

    Each serves `repeat` batch elements one after another; after the last the first comes again.
    """

    by_numbers = True

    def __init__(self, bias: torch.Tensor, repeat: int) -> None:
        super().__init__(bias)
        self.repeat = repeat

    def check(self, op: str, name: str, q: torch.Tensor, sizes: Sizes) -> None:
        (bias,) = self.tensors
        check_float_tensor(op, name, bias)
        check_device(op, name, bias, q)

    @property
    def integers(self) -> Sequence[int]:  # type: ignore[override]
        (bias,) = self.tensors
        return (*broadcast_strides(bias), self.repeat, bias.shape[0])

    def function_name(self, dtype: torch.dtype) -> str:
        return layout_name("shared additive bias", self.tensors[0])

    def score(
        self, score: torch.Tensor, m: Index, n: Index, queries: Index, keys: Index
    ) -> torch.Tensor:
        bias = self.tensors[0].to(score.dtype)
        if score.numel() == 0:
            return score + bias.sum()
        turns = score.unflatten(0, (-1, bias.shape[0], self.repeat))
        return (turns + bias[:, None]).flatten(0, 2)


class Alibi(ScoreTerm):
    """Minus a slope times the distance to the key; slopes (H,) or (B, H)."""

    functions = "alibi"
    learned = True
    by_strides = True

    def __init__(self, slopes: torch.Tensor) -> None:
        self.tensors = (insert_dimension(slopes, 1, at=0),)

    def check(self, op: str, name: str, q: torch.Tensor, sizes: Sizes) -> None:
        batch, heads, *_ = sizes
        (slopes,) = self.tensors
        check_float_tensor(op, name, slopes)
        check_device(op, name, slopes, q)
        if tuple(slopes.shape) not in ((1, heads), (batch, heads)):
            shape = tuple(slopes.shape)
            raise ValueError(
                f"{op}: {name} must have shape ({heads},) or ({batch}, {heads}), "
                f"got {shape[1:] if len(shape) == 2 and shape[0] == 1 else shape}"
            )

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

    Example:
        >>> fastattn.alibi_slopes(4).tolist()
        [0.25, 0.0625, 0.015625, 0.00390625]
    """
    if num_heads < 1:
        raise ValueError(f"alibi_slopes: num_heads must be positive, got {num_heads}")
    whole = 1 << (num_heads.bit_length() - 1)
    # Not on the default device, which may be one without numbers.
    steps = torch.arange(1, whole + 1, device="cpu")
    slopes = 2.0 ** (steps * (-8.0 / whole))
    between = 2.0 ** ((2 * steps[: num_heads - whole] - 1) * (-4.0 / whole))
    return torch.cat((slopes, between))


class RelativeBias(ScoreTerm):
    """T5's bias: a learned number for each head and bucket of distances between query and key.

    Half of the buckets have a distance each; those further away share buckets whose width grows
    with the logarithm of the distance, the last one from max_distance on. A query's place is that
    of `attention`: the last query stands at the last key.

    It may be made once for many calls: each takes the table as it is then.

    Args:
        table: (buckets, H), of a float dtype, such as the weight of Hugging Face's
            `relative_attention_bias`. It gets a gradient.
        bidirectional: whether keys after the query have half of the buckets for themselves; if
            not, all of them share the bucket of distance 0.
        max_distance: from here on all distances are one; at most 2^24.

    Raises:
        ValueError: a shape or number does not fit.

    Source: Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text
    Transformer" (2020).

    Example:
        >>> q = k = v = torch.randn(1, 2, 8, 16)
        >>> bias = fastattn.RelativeBias(torch.randn(32, 2, requires_grad=True))
        >>> fastattn.attention(q, k, v, scale=1.0, relative_bias=bias).sum().backward()
        >>> bias.table.grad.shape
        torch.Size([32, 2])
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
        if max_distance > FARTHEST_BUCKET:
            raise ValueError(
                f"RelativeBias: max_distance must be at most {FARTHEST_BUCKET}, got {max_distance}"
            )
        distances = torch.arange(-max_distance, max_distance + 1, device=table.device)
        buckets = _bucket(distances, table.shape[0], bidirectional, max_distance)
        if is_distributed(table):
            buckets = replicate(buckets, like=table)
        self.table = table
        self.buckets = buckets.int()
        self.integers = (max_distance,)
        self._replaced: Sequence[torch.Tensor] | None = None

    @property
    def tensors(self) -> Sequence[torch.Tensor]:  # type: ignore[override]
        """The table and the bucket of each distance, batch and heads first."""
        if self._replaced is not None:
            return self._replaced
        return self.table.t()[None], self.buckets.to(self.table.device)[None, None]

    @tensors.setter
    def tensors(self, tensors: Sequence[torch.Tensor]) -> None:  # type: ignore[override]
        self._replaced = tensors

    def check(self, op: str, name: str, q: torch.Tensor, sizes: Sizes) -> None:
        table = self.tensors[0]
        check_device(op, name, table, q)
        if table.shape[1] != sizes[1]:
            raise ValueError(
                f"{op}: {name} must have a table for {sizes[1]} heads, got {table.shape[1]}"
            )

    def prepared(self, sizes: Sizes) -> "RelativeBias":
        # Kernels read the bias of a distance at once, and its bucket where they sum the table's
        # gradient.
        table, buckets, *_ = self.tensors
        values = table[0].detach()[:, buckets[0, 0].long()]
        values = values.to(torch.promote_types(table.dtype, torch.float32))
        return self.with_tensors((table.contiguous(), buckets, values.contiguous()[None]))

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
