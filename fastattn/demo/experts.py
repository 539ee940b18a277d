"""The load of a model's experts: which share of the tokens' choices each of them gets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import TopKRouter


@contextmanager
def counted_choices(model: nn.Module) -> Iterator[list[Tensor]]:
    """How often each expert is chosen until the end of it: a tensor (E,) for every router."""
    routers = [module for module in model.modules() if isinstance(module, TopKRouter)]
    counts = [torch.zeros(len(router.weight), dtype=torch.int64) for router in routers]

    def count_into(total: Tensor) -> Any:
        def count(router: nn.Module, args: Any, output: Any) -> None:
            total.add_(torch.bincount(output[1].flatten(), minlength=len(total)).cpu())

        return count

    handles = [
        router.register_forward_hook(count_into(total))
        for router, total in zip(routers, counts, strict=True)
    ]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def shares(counts: list[Tensor]) -> list[list[float]]:
    """The counts of each router as shares of their sum."""
    return [(count / count.sum()).tolist() for count in counts]


def describe_load(load: list[list[float]]) -> str:
    """A line for every layer with experts."""
    lines = [
        f"layer {place}: " + " ".join(f"{share:.0%}" for share in layer)
        for place, layer in enumerate(load, start=1)
    ]
    return "Load of the experts on held-out text, " + "; ".join(lines)
