"""Samples of decode attention: how keys lie, how many there are, what applies to their scores."""

from collections.abc import Callable
from typing import Any

import torch

from .core.catalog import Sample


def integers(numbers: list[Any], dtype: torch.dtype = torch.int32) -> Callable[[Any], torch.Tensor]:
    return lambda device: torch.tensor(numbers, dtype=dtype, device=device)


def eight_bits(shape: tuple[int, ...], dtype: torch.dtype) -> Callable[[Any], torch.Tensor]:
    """A cache of 8 bits."""

    def make(device: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(len(shape) + shape[-1])
        numbers = torch.randn(shape, generator=generator)
        if dtype is torch.int8:
            numbers = (numbers * 40.0).round().clamp(-127, 127)
        return numbers.to(dtype).to(device)

    return make


def tree(batch: int, queries: int) -> Callable[[Any], torch.Tensor]:
    """A mask among new tokens: each sees itself and some before it."""

    def make(device: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(queries)
        seen = torch.rand(batch, queries, queries, generator=generator) < 0.5
        return (seen.tril() | torch.eye(queries, dtype=torch.bool)).to(device)

    return make


SAMPLES = (
    Sample("smallest", q=(1, 2, 2, 4), k=(1, 1, 6, 4), v=(1, 1, 6, 4), lengths=integers([5])),
    Sample(
        "one query",
        q=(3, 4, 1, 48),
        k=(3, 2, 70, 48),
        v=(3, 2, 70, 48),
        lengths=integers([70, 1, 33]),
        return_lse=True,
    ),
    Sample(
        "pages",
        q=(2, 4, 3, 16),
        k=(5, 2, 16, 16),
        v=(5, 2, 16, 24),
        lengths=integers([20, 40], torch.int64),
        block_table=integers([[3, 1, 0], [4, 0, 2]]),
    ),
    Sample(
        "small pages, window",
        q=(2, 4, 3, 16),
        k=(9, 4, 6, 16),
        v=(9, 4, 6, 16),
        lengths=integers([20, 23]),
        block_table=integers([[3, 1, 7, 0], [8, 2, 5, 6]]),
        window=9,
    ),
    Sample(
        "many queries, terms",
        q=(1, 6, 40, 16),
        k=(1, 2, 90, 16),
        v=(1, 2, 90, 16),
        lengths=integers([77]),
        softcap=2.0,
        alibi_slopes=(6,),
        sinks=(6,),
        window=[30, 2],
        return_lse=True,
    ),
    Sample(
        "tree, no keys",
        q=(3, 2, 5, 16),
        k=(3, 2, 40, 16),
        v=(3, 2, 40, 16),
        lengths=integers([0, 5, 38]),
        mask=tree(3, 5),
        starts=integers([0, 2, 33], torch.int64),
        return_lse=True,
    ),
    Sample(
        "values among keys",
        q=(2, 5, 1, 80),
        k=(2, 1, 40, 80),
        value_dim=64,
        lengths=integers([40, 17]),
        splits=2,
    ),
    Sample(
        "int8",
        q=(2, 4, 2, 32),
        k=eight_bits((2, 2, 40, 32), torch.int8),
        v=eight_bits((2, 2, 40, 16), torch.int8),
        k_scale=lambda device: torch.tensor([0.02, 0.025], device=device),
        v_scale=lambda device: torch.tensor([0.01, 0.03], device=device),
        lengths=integers([40, 17]),
        splits=1,
    ),
    Sample(
        "float8",
        q=(2, 4, 2, 32),
        k=eight_bits((2, 2, 40, 32), torch.float8_e4m3fn),
        v=eight_bits((2, 2, 40, 16), torch.float8_e4m3fn),
        v_scale=0.5,
        lengths=integers([40, 17]),
    ),
    Sample("no room", q=(2, 2, 1, 16), k=(2, 1, 0, 16), v=(2, 1, 0, 16), lengths=integers([0, 0])),
)
