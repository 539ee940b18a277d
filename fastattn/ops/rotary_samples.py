"""How the samples of the rotary ops make angles, in all of their forms, and integers."""

from collections.abc import Callable

import torch


def angles(*shape: int, form: str = "half width") -> dict[str, Callable]:
    """Tables cos and sin of `shape`, which ends in R/2, in one of their forms."""
    numbers = (torch.arange(torch.Size(shape).numel(), dtype=torch.float32) * 0.7).reshape(shape)
    if form == "complex":
        turns = torch.polar(torch.ones_like(numbers), numbers)
        return {"cos": lambda device: turns.to(device)}

    def make(table: torch.Tensor) -> Callable:
        if form == "halves":
            table = torch.cat((table, table), -1)
        elif form == "pairs":
            table = table.repeat_interleave(2, -1)
        return lambda device: table.to(device)

    return {"cos": make(numbers.cos()), "sin": make(numbers.sin())}


def integers(*numbers: int, dtype: torch.dtype = torch.int64) -> Callable:
    """A tensor of these numbers."""
    return lambda device: torch.tensor(numbers, dtype=dtype, device=device)
