"""Low-rank adaptation: linear layers that are trained by two small matrices beside the weight."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn as nn

from .. import functional, ops
from .attention import check_dropout
from .linear import Linear
from .mlp import is_only_linear

LORA = re.compile(r"(^|\.)lora_[AB]$")
"""The names of what is trained."""


class LoRALinear(Linear):
    """x weight^T + bias + alpha / rank * dropout(x) lora_A^T lora_B^T, weight and bias frozen.

    `weight` and `bias` have the names they have in torch.nn.Linear, so the state_dict of a model
    without adaptation loads with `strict=False`. `lora_A` is (rank, in_features), `lora_B`
    (out_features, rank).

    lora_A starts uniform in ±1 / sqrt(in_features), as torch.nn.Linear's weight does, and lora_B at
    0: at first the layer gives what it would without them.

    Args:
        in_features, out_features, bias, device, dtype: as in torch.nn.Linear.
        rank: the rank of what is added to the weight.
        alpha: the factor of what is added, times rank; rank if None.
        dropout: the probability with which an element of x is dropped in training, on the way
            through lora_A alone.

    Raises:
        ValueError: rank, alpha or dropout does not fit.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021).
    """

    base_weight: torch.Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        rank: int = 8,
        alpha: float | None = None,
        dropout: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        if rank < 1:
            raise ValueError(f"LoRALinear: rank must be positive, got {rank}")
        check_dropout("LoRALinear", dropout)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.rank = rank
        self.alpha = float(rank if alpha is None else alpha)
        self.dropout = dropout
        # The weight before it was merged. Not in a state_dict, but where the module goes it goes.
        self.register_buffer("base_weight", None, persistent=False)
        self.lora_A = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=dtype))
        self.reset_lora()
        self._freeze()

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        rank: int = 8,
        alpha: float | None = None,
        dropout: float = 0.0,
    ) -> LoRALinear:
        """A layer around the parameters of another, which it shares and freezes."""
        made = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            rank=rank,
            alpha=alpha,
            dropout=dropout,
            device="meta",
            dtype=linear.weight.dtype,
        )
        made.weight, made.bias = linear.weight, linear.bias
        for name in ("lora_A", "lora_B"):
            empty = torch.empty_like(getattr(made, name), device=linear.weight.device)
            setattr(made, name, nn.Parameter(empty))
        made.reset_lora()
        made._freeze()
        return made.train(linear.training)

    @property
    def scaling(self) -> float:
        """The factor of lora_B lora_A."""
        return self.alpha / self.rank

    @property
    def merged(self) -> bool:
        """Whether weight is that of the whole layer."""
        return self.base_weight is not None

    def reset_parameters(self) -> None:
        """Draw the weight and bias as torch.nn.Linear does, and lora_A and lora_B anew."""
        super().reset_parameters()
        if hasattr(self, "lora_A"):
            self.reset_lora()

    def reset_lora(self) -> None:
        """Draw lora_A, and set lora_B to 0."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(..., in_features) to (..., out_features)."""
        y = super().forward(input)
        if self.merged:
            return y
        x = functional.dropout(input, self.dropout, self.training)
        hidden = ops.linear(x.to(self.lora_A.dtype), self.lora_A) * self.scaling
        return ops.linear(hidden, self.lora_B, residual=y).to(y.dtype)

    def difference(self) -> torch.Tensor:
        """alpha / rank * lora_B lora_A, (out_features, in_features), in float32 at least."""
        computed = torch.promote_types(self.lora_A.dtype, torch.float32)
        return (self.lora_B.to(computed) @ self.lora_A.to(computed)) * self.scaling

    @torch.no_grad()
    def merge(self) -> None:
        """Add what was learned to the weight, so that a call costs no more than a plain layer's.

        Until `unmerge` lora_A and lora_B take no part, and get no gradient. The weight from before
        is kept, and is what state_dict gives.
        """
        if not self.merged:
            self.base_weight = self.weight.detach().clone()
            self.weight.copy_(self.weight + self.difference())

    @torch.no_grad()
    def unmerge(self) -> None:
        """Bring back the weight from before `merge`, bit for bit."""
        if self.base_weight is not None:
            self.weight.copy_(self.base_weight)
            self.base_weight = None

    def to_linear(self) -> Linear:
        """A plain layer that gives the same, with a weight of its own."""
        weight = self.weight.detach()
        if not self.merged:
            weight = (weight + self.difference()).to(weight.dtype)
        made = Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        made.weight = nn.Parameter(weight.clone(), requires_grad=self.weight.requires_grad)
        made.bias = self.bias
        return made.train(self.training)

    def extra_repr(self) -> str:
        """torch's, and the arguments of the adaptation."""
        text = f"{super().extra_repr()}, rank={self.rank}, alpha={self.alpha}"
        return text + (f", dropout={self.dropout}" if self.dropout else "")

    def _freeze(self) -> None:
        for frozen in (self.weight, self.bias):
            if frozen is not None:
                frozen.requires_grad_(False)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.base_weight is not None:
            destination[f"{prefix}weight"] = self.base_weight

    def _load_from_state_dict(self, *arguments: Any) -> None:
        # What is loaded is not merged.
        self.unmerge()
        super()._load_from_state_dict(*arguments)


def apply_lora(
    model: nn.Module,
    targets: str | Iterable[str],
    *,
    rank: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
) -> list[str]:
    """Put a LoRALinear in the place of each linear layer that is named, and freeze all others.

    Afterwards lora_A and lora_B are the only parameters of the model that ask for gradients.

    Args:
        model: the model, which is changed.
        targets: what is adapted: the last part of a layer's name ("q_proj"), its whole name
            ("layers.0.self_attn.q_proj"), or a pattern for the whole name ("layers.*.q_proj",
            "*"); one or several.
        rank, alpha, dropout: as in `LoRALinear`.

    Returns:
        The names of the layers that are adapted.

    Raises:
        ValueError: a target names no linear layer, or one that has hooks or is not just a linear
            layer, which would be lost. The model is as it was.
    """
    targets = [targets] if isinstance(targets, str) else list(targets)
    linear = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Linear)
    }
    chosen: dict[str, nn.Linear] = {}
    for target in targets:
        named = {name: linear[name] for name in linear if _matches(name, target)}
        if not named:
            raise ValueError(
                f"apply_lora: no linear layer is named {target!r}; there are "
                f"{', '.join(sorted({name.rpartition('.')[2] for name in linear})) or 'none'}"
            )
        chosen |= named
    for name, layer in chosen.items():
        if not is_only_linear(layer) or not name:
            raise ValueError(
                f"apply_lora: {name or 'the model itself'} is a {type(layer).__name__} that cannot "
                "be replaced: it must be a torch.nn.Linear or fastattn.nn.Linear within the model, "
                "without hooks or an activation"
            )
    for name, parameter in model.named_parameters():
        if not LORA.search(name):
            parameter.requires_grad_(False)
    # A layer that stands in several places stays one layer.
    adapted = {
        id(layer): LoRALinear.from_linear(layer, rank=rank, alpha=alpha, dropout=dropout)
        for layer in chosen.values()
    }
    for name, layer in chosen.items():
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, adapted[id(layer)])
    return list(chosen)


def merge_lora(model: nn.Module) -> None:
    """Put plain linear layers, which give the same, in the place of all LoRALinear."""
    plain: dict[int, Linear] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, LoRALinear) and name:
            parent, _, own = name.rpartition(".")
            layer = plain.setdefault(id(module), module.to_linear())
            setattr(model.get_submodule(parent), own, layer)


def lora_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The lora_A and lora_B of a model alone; `load_state_dict(..., strict=False)` loads them."""
    return {name: tensor for name, tensor in model.state_dict().items() if LORA.search(name)}


def _matches(name: str, target: str) -> bool:
    return name.rpartition(".")[2] == target or fnmatchcase(name, target)
