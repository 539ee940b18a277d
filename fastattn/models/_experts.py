"""Experts in checkpoints: a tensor for each in the files, one for all of a layer in the model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

GATE_UP, UP, DOWN = "gate_up_proj", "up_proj", "down_proj"
"""What `fastattn.nn.Experts` calls its parameters, (E, 2 I, H) and (E, H, I), and what
`PlainExperts` calls its first, (E, I, H)."""

Shape = tuple[int, ...]

Pieces = dict[tuple[int, str], str]
"""The names in a checkpoint of what one parameter is made of, by expert and projection."""


class ExpertNames(NamedTuple):
    """What a family's checkpoints call the projections of single experts: `experts.3.w1.weight`."""

    gate: str | None
    """None of experts without a gate."""
    up: str
    down: str

    @property
    def first(self) -> str:
        """What the first parameter is called in the model."""
        return UP if self.gate is None else GATE_UP

    def find_pieces(self, names: Mapping[str, str]) -> dict[str, Pieces]:
        """The pieces of each parameter of experts, of a checkpoint's names as the model has them.

        Args:
            names: by the names in the checkpoint.
        """
        words = "|".join(re.escape(word) for word in self if word is not None)
        pattern = re.compile(rf"(.*\bexperts)\.(\d+)\.({words})\.weight")
        found: dict[str, Pieces] = {}
        for theirs, name in names.items():
            match = pattern.fullmatch(name)
            if match is not None:
                start, expert, word = match.groups()
                whole = f"{start}.{DOWN if word == self.down else self.first}"
                found.setdefault(whole, {})[int(expert), word] = theirs
        return found

    def places(self, whole: str, shape: Shape) -> Iterator[tuple[tuple[int, str], tuple]]:
        """What a parameter consists of, and where in it each piece is.

        Args:
            whole: its name.
            shape: its shape.
        """
        half = shape[1] // 2
        for expert in range(shape[0]):
            if whole.endswith(DOWN):
                yield (expert, self.down), (expert,)
            elif self.gate is None:
                yield (expert, self.up), (expert,)
            else:
                yield (expert, self.gate), (expert, slice(None, half))
                yield (expert, self.up), (expert, slice(half, None))

    def faults(
        self, whole: str, shape: Shape, pieces: Pieces, shapes: Mapping[str, Shape]
    ) -> tuple[list[str], list[str]]:
        """The pieces that a parameter lacks, or that there are too many; and those misshapen."""
        wanted = dict(self.places(whole, shape))
        start = whole.rpartition(".")[0]
        wrong = [f"{start}.{e}.{word}.weight" for e, word in wanted.keys() ^ pieces.keys()]
        halved = self.gate is not None and not whole.endswith(DOWN)
        own = (shape[1] // 2 if halved else shape[1], shape[2])
        misshapen = [
            f"{theirs} is {shapes[theirs]} there and {own} in the model"
            for theirs in pieces.values()
            if shapes[theirs] != own
        ]
        return wrong, misshapen

    def split(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A state_dict with a tensor for each projection of each expert, as views."""
        found: dict[str, torch.Tensor] = {}
        for name, tensor in state.items():
            start, _, last = name.rpartition(".")
            if start.endswith("experts") and last in (self.first, DOWN):
                for (expert, word), place in self.places(name, tuple(tensor.shape)):
                    found[f"{start}.{expert}.{word}.weight"] = tensor[place]
            else:
                found[name] = tensor
        return found


def find_experts(
    model: Any, names: Mapping[str, str], own: Mapping[str, Shape], shapes: Mapping[str, Shape]
) -> tuple[dict[str, Pieces], list[str], list[str]]:
    """The pieces of a model's parameters of experts in a checkpoint, and what is wrong with them.

    Args:
        model: the model, whose `expert_names` say what pieces are called, if there are any.
        names: what the model calls each tensor of the checkpoint.
        own: the shapes of the model's parameters.
        shapes: the shapes of the checkpoint's tensors.

    Returns:
        The pieces by parameter, those that are missing or too many, and those of another shape.
    """
    calls: ExpertNames | None = model.expert_names
    found = {} if calls is None else calls.find_pieces(names)
    pieces = {whole: parts for whole, parts in found.items() if whole in own}
    wrong: list[str] = []
    misshapen: list[str] = []
    for whole, parts in pieces.items():
        assert calls is not None
        faults = calls.faults(whole, own[whole], parts, shapes)
        wrong += faults[0]
        misshapen += faults[1]
    return pieces, wrong, misshapen


def join_experts(
    model: Any,
    pieces: Mapping[str, Pieces],
    read: Callable[[Mapping[str, str]], Mapping[str, torch.Tensor]],
) -> dict[str, torch.Tensor]:
    """The parameters that pieces make, each read when the one before it is made.

    Args:
        model: the model, whose parameters have the shapes.
        pieces: what each parameter consists of.
        read: reads tensors of the checkpoint, by the names they are to have.
    """
    joined: dict[str, torch.Tensor] = {}
    for whole, parts in pieces.items():
        shape = tuple(model.get_parameter(whole).shape)
        tensors = read({theirs: theirs for theirs in parts.values()})
        joined[whole] = next(iter(tensors.values())).new_empty(shape)
        for piece, place in model.expert_names.places(whole, shape):
            joined[whole][place] = tensors[parts[piece]]
    return joined
