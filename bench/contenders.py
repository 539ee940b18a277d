"""What an op is compared with: the same computation by others, side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .op import DIRECTIONS, FORWARD, Op

OURS, EAGER, COMPILED, TORCH = "fastattn", "eager", "compile", "torch"


@dataclass(frozen=True)
class Contender:
    """One way to compute an op.

    Attributes:
        name: "fastattn", "eager" (the reference), "compile" (the reference under torch.compile),
            "torch" (the function that PyTorch has for it), or a package's name.
        call: Takes the arguments of the op.
        same_random_numbers: Whether it can be given the seed of our random numbers.
        directions: What it computes: all, or the forward alone.
    """

    name: str
    call: Callable[..., Any]
    same_random_numbers: bool = True
    directions: Sequence[str] = DIRECTIONS


def contender_names(op: Op) -> list[str]:
    """Everyone who may take part for an op, installed or not."""
    rivals = op.benchmark.rivals if op.benchmark else {}
    return [OURS, EAGER, COMPILED, *([TORCH] if op.torch else []), *rivals]


def load_contender(op: Op, name: str) -> Contender:
    """Make a contender ready to be called.

    Raises:
        ImportError: its package is not installed, or does not have the function any more.
    """
    if name == OURS:
        return Contender(name, op.call)
    if name == EAGER:
        return Contender(name, op.reference)
    if name == COMPILED:
        # Whatever was compiled for another size would make this one compile for any size.
        torch.compiler.reset()
        return Contender(name, torch.compile(op.reference, fullgraph=True, dynamic=False))
    if name == TORCH and op.torch is not None:
        return Contender(name, op.torch, same_random_numbers=False)
    directions = (FORWARD,) if name in op.timing.without_gradients else DIRECTIONS
    return Contender(
        name, op.timing.rivals[name](), same_random_numbers=False, directions=directions
    )
