"""What attention is tried on: calls that each stand for a regime, and how their masks are made."""

import math
from collections.abc import Callable

import torch

from ..core.catalog import Normal, Sample, make_seed
from .bias_terms import RelativeBias, alibi_slopes
from .block_terms import BlockMask


def prefix(length: int) -> Callable[[str | torch.device], torch.Tensor]:
    """Key lengths of two batch elements, all of the keys and none of them."""
    return lambda device: torch.tensor([length, 0], device=device)


def random_mask(*shape: int) -> Callable[[str | torch.device], torch.Tensor]:
    """A mask that keeps three scores of five, but none of the first query's."""

    def make(device: str | torch.device) -> torch.Tensor:
        place = torch.arange(math.prod(shape)).reshape(shape)
        keep = place * 7919 % 5 < 3
        keep[..., 0, :] = False
        return keep.to(device)

    return make


def slopes(heads: int) -> Callable[[str | torch.device], torch.Tensor]:
    """ALiBi's slopes."""
    return lambda device: alibi_slopes(heads).to(device)


def relative_bias(buckets: int, heads: int) -> Callable[[str | torch.device], RelativeBias]:
    """T5's bias, with a table that stays as it is."""

    def make(device: str | torch.device) -> RelativeBias:
        table = torch.linspace(-1.0, 1.0, buckets * heads, device=device)
        return RelativeBias(table.reshape(buckets, heads), max_distance=20)

    return make


def documents(batch: int, length: int) -> Callable[[str | torch.device], torch.Tensor]:
    """Documents of 23 tokens."""
    return lambda device: (torch.arange(length, device=device) // 23).expand(batch, length)


def blocks(rows: int, columns: int) -> Callable[[str | torch.device], BlockMask]:
    """Blocks of 16 queries and keys, of which three of five count."""
    return lambda device: BlockMask(random_mask(rows, columns)(device), 16)


SAMPLES = (
    Sample("smallest", q=(1, 2, 3, 4), k=(1, 1, 5, 4), v=(1, 1, 5, 4), causal=True),
    Sample("causal", q=(1, 2, 70, 64), k=(1, 2, 70, 64), v=(1, 2, 70, 64), causal=True),
    Sample("full", q=(1, 2, 65, 32), k=(1, 2, 65, 32), v=(1, 2, 65, 32)),
    Sample(
        "cross, heads of 80 and 40, lse",
        q=(2, 4, 19, 80),
        k=(2, 2, 50, 80),
        v=(2, 2, 50, 40),
        return_lse=True,
    ),
    Sample(
        "more queries than keys",
        q=(1, 2, 50, 24),
        k=(1, 2, 19, 24),
        v=(1, 2, 19, 16),
        causal=True,
        return_lse=True,
    ),
    Sample(
        "window, one key head",
        q=(1, 4, 70, 32),
        k=(1, 1, 70, 32),
        v=(1, 1, 70, 32),
        causal=True,
        window=20,
    ),
    Sample(
        "window to both sides",
        q=(1, 2, 66, 16),
        k=(1, 2, 90, 16),
        v=(1, 2, 90, 16),
        window=[9, 4],
    ),
    Sample(
        "softcap and ALiBi",
        q=Normal((1, 4, 40, 32), scale=2.0),
        k=(1, 2, 40, 32),
        v=(1, 2, 40, 32),
        causal=True,
        softcap=4.0,
        alibi_slopes=slopes(4),
        scale=0.25,
        return_lse=True,
    ),
    Sample(
        "a mask for each head",
        q=(2, 2, 33, 32),
        k=(2, 1, 48, 32),
        v=(2, 1, 48, 32),
        mask=random_mask(2, 33, 48),
        return_lse=True,
    ),
    Sample(
        "key lengths",
        q=(2, 2, 20, 16),
        k=(2, 2, 37, 16),
        v=(2, 2, 37, 16),
        kv_lengths=prefix(21),
        return_lse=True,
    ),
    Sample(
        "everything",
        q=(2, 4, 40, 48),
        k=(2, 2, 70, 48),
        v=(2, 2, 70, 96),
        causal=True,
        window=[30, 2],
        softcap=3.0,
        alibi_slopes=slopes(4),
        mask=random_mask(2, 1, 40, 70),
        kv_lengths=prefix(60),
        return_lse=True,
    ),
    Sample(
        "learned bias, slopes and sinks",
        q=(2, 8, 33, 32),
        k=(2, 2, 48, 32),
        v=(2, 2, 48, 32),
        bias=(8, 33, 48),
        # Of fewer numbers the yardstick would be a matter of luck.
        alibi_slopes=Normal((2, 8), scale=0.1, mean=0.2),
        sinks=(8,),
        causal=True,
        return_lse=True,
    ),
    Sample(
        "relative bias",
        q=(1, 2, 40, 16),
        k=(1, 2, 40, 16),
        v=(1, 2, 40, 16),
        relative_bias=relative_bias(8, 2),
    ),
    Sample(
        "dropout",
        q=(2, 2, 40, 16),
        k=(2, 1, 40, 16),
        v=(2, 1, 40, 16),
        bias=(2, 1, 1, 40),
        dropout_p=0.3,
        dropout_seed=make_seed(7),
        return_lse=True,
    ),
    Sample(
        "documents and blocks",
        q=(2, 2, 70, 16),
        k=(2, 2, 70, 16),
        v=(2, 2, 70, 16),
        document_ids=documents(2, 70),
        block_mask=blocks(5, 5),
        causal=True,
        return_lse=True,
    ),
    Sample(
        "rows of pairs with a bias that they share",
        q=(2, 3, 2, 9, 16),
        k=(2, 3, 2, 20, 16),
        v=(2, 3, 2, 20, 16),
        bias=(2, 1, 2, 9, 20),
        mask=random_mask(3, 1, 9, 20),
        return_lse=True,
    ),
    Sample("negative scale", q=(1, 1, 20, 16), k=(1, 1, 20, 16), v=(1, 1, 20, 16), scale=-0.5),
    Sample("one query", q=(2, 4, 1, 64), k=(2, 2, 45, 64), v=(2, 2, 45, 64), causal=True),
    Sample("no queries", q=(1, 2, 0, 16), k=(1, 2, 9, 16), v=(1, 2, 9, 16)),
    Sample("no keys", q=(1, 2, 9, 16), k=(1, 2, 0, 16), v=(1, 2, 0, 16), return_lse=True),
)
