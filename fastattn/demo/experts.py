"""The experts of a model: which share of the tokens' choices each gets, and the loss that evens it.

A model without experts has no routers, and then there is nothing to see.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..nn import TopKRouter

BALANCE = 0.01
"""What the balancing loss counts for, as in Fedus et al., "Switch Transformers" (2021)."""


@contextmanager
def watched_routers(model: nn.Module) -> Iterator[list[list[tuple[Tensor, Tensor]]]]:
    """What each router gives until the end of it: (logits, ids) of every call."""
    routers = [module for module in model.modules() if isinstance(module, TopKRouter)]
    found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in routers]

    def keep_in(calls: list[tuple[Tensor, Tensor]]) -> Any:
        def keep(router: nn.Module, args: Any, output: Any) -> None:
            _, ids, logits = output
            calls.append((logits, ids))

        return keep

    handles = [
        router.register_forward_hook(keep_in(calls))
        for router, calls in zip(routers, found, strict=True)
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def balancing_loss(routers: list[list[tuple[Tensor, Tensor]]]) -> Tensor | float:
    """The weighted `load_balancing_loss` of all layers together; 0 where none has experts."""
    calls = [call for router in routers for call in router]
    if not calls:
        return 0.0
    logits, ids = zip(*calls, strict=True)
    return BALANCE * ops.load_balancing_loss(logits, ids, logits[0].shape[-1])


def shares(routers: list[list[tuple[Tensor, Tensor]]]) -> list[list[float]]:
    """Of each router, how often each expert was chosen, as a share of all choices."""
    found = []
    for calls in routers:
        chosen = torch.cat([ids.flatten() for _, ids in calls])
        counts = torch.bincount(chosen, minlength=calls[0][0].shape[-1])
        found.append((counts / counts.sum()).tolist())
    return found


def describe_load(load: list[list[float]]) -> str:
    """What the shares of each layer are, in a line."""
    layers = [
        f"layer {place}: " + " ".join(f"{share:.0%}" for share in layer)
        for place, layer in enumerate(load, start=1)
    ]
    return "Load of the experts on held-out text, " + "; ".join(layers)
