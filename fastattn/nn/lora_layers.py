"""The layers of low-rank adaptation: a frozen weight, and two small matrices that are trained."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn

from .. import functional, ops
from ..ops.linear import Activation
from ..reference.linear import ACTIVATIONS as FUNCTIONS
from .attention import check_dropout
from .linear import Conv1D, Linear
from .tracing import one_node


class Adapted(nn.Module):
    """What adapted layers have in common, whichever way round their weight lies.

    A class derives from it and from the layer that it adapts, calls `_adapt` at the end of its
    `__init__`, and defines `_product`, `difference` and `to_linear`.
    """

    weight: Any
    bias: Any
    base_weight: nn.Parameter | None

    shares_weight = False
    """Whether a model that was adapted has the weight in another place, too."""

    def _adapt(
        self, sizes: tuple[int, int], rank: int, alpha: float | None, dropout: float, **where: Any
    ) -> None:
        self.rank = rank
        self.alpha = float(rank if alpha is None else alpha)
        self.dropout = dropout
        # The weight before it was merged, which may be that of other layers as well.
        self.register_parameter("base_weight", None)
        self.lora_A = nn.Parameter(torch.empty(rank, sizes[0], **where))
        self.lora_B = nn.Parameter(torch.empty(sizes[1], rank, **where))
        self.reset_lora()
        self._freeze()

    def _adopt(self, layer: Any) -> Any:
        """This layer, made on the meta device, with the parameters of one that is not adapted."""
        self.weight, self.bias = layer.weight, layer.bias
        for name in ("lora_A", "lora_B"):
            empty = torch.empty_like(getattr(self, name), device=layer.weight.device)
            setattr(self, name, nn.Parameter(empty))
        self.reset_lora()
        self._freeze()
        return self.train(layer.training)

    @property
    def scaling(self) -> float:
        """The factor of lora_B lora_A."""
        return self.alpha / self.rank

    @property
    def merged(self) -> bool:
        """Whether weight is that of the whole layer."""
        return self.base_weight is not None

    def reset_parameters(self) -> None:
        """Draw the weight and bias as the layer without adaptation does, and lora_A and lora_B."""
        super().reset_parameters()  # type: ignore[misc]
        if hasattr(self, "lora_A"):
            self.reset_lora()

    def reset_lora(self) -> None:
        """Draw lora_A, and set lora_B to 0."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    @one_node
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(..., in_features) to (..., out_features)."""
        y = self._product(input)
        if self.merged:
            return self._activate(y)
        x = functional.dropout(input, self.dropout, self.training)
        hidden = ops.linear(x.to(self.lora_A.dtype), self.lora_A) * self.scaling
        return self._activate(ops.linear(hidden, self.lora_B, residual=y).to(y.dtype))

    def _product(self, input: torch.Tensor) -> torch.Tensor:
        """What the layer gives without adaptation, before its activation."""
        raise NotImplementedError

    def _activate(self, y: torch.Tensor) -> torch.Tensor:
        activation: Activation | None = getattr(self, "activation", None)
        function: Callable[[torch.Tensor], torch.Tensor] | None = FUNCTIONS.get(activation)  # type: ignore[arg-type]
        return y if function is None else function(y)

    def difference(self) -> torch.Tensor:
        """What is added to the weight, in float32 at least."""
        raise NotImplementedError

    def to_linear(self) -> nn.Module:
        """A plain layer that gives the same, with a weight of its own."""
        raise NotImplementedError

    def _whole_weight(self) -> nn.Parameter:
        """What the weight of a plain layer that gives the same has to be."""
        weight = self.weight.detach()
        if not self.merged:
            weight = (weight + self.difference()).to(weight.dtype)
        base = self.weight if self.base_weight is None else self.base_weight
        return nn.Parameter(weight.clone(), requires_grad=base.requires_grad)

    @torch.no_grad()
    def merge(self) -> None:
        """Add what was learned to the weight, so that a call costs no more than a plain layer's.

        Until `unmerge` lora_A and lora_B take no part, and get no gradient, and `weight` is a
        frozen tensor of this layer alone. The weight from before is `base_weight`: the same
        parameter that others may share and an optimizer may have, and what state_dict gives.

        Raises:
            RuntimeError: the weight is sharded, and another layer of the model has it too.
        """
        if self.merged:
            return
        weight = self.weight
        if type(weight) is nn.Parameter:
            whole = (weight + self.difference()).to(weight.dtype)
            self.weight = nn.Parameter(whole, requires_grad=False)
            self.base_weight = weight
            return
        if self.shares_weight:
            raise RuntimeError(
                f"{type(self).__name__}.merge: the weight is a {type(weight).__name__} that "
                "another layer shares and would be changed there as well; merge before the model "
                "is sharded"
            )
        # Whoever shards a weight puts the parameter that it knows back at every call.
        self.base_weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        weight.copy_(weight + self.difference())

    @torch.no_grad()
    def unmerge(self) -> None:
        """Bring back the weight from before `merge`, bit for bit, as the parameter that it was."""
        base = self.base_weight
        if base is None:
            return
        if type(base) is nn.Parameter:
            self.weight = base
        else:
            self.weight.copy_(base)
        self.base_weight = None

    def extra_repr(self) -> str:
        """The plain layer's, and the arguments of the adaptation."""
        text = f"{super().extra_repr()}, rank={self.rank}, alpha={self.alpha}"
        return text + (f", dropout={self.dropout}" if self.dropout else "")

    def _freeze(self) -> None:
        for frozen in (self.weight, self.bias):
            if frozen is not None:
                frozen.requires_grad_(False)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        base = destination.pop(f"{prefix}base_weight", None)
        if base is not None:
            destination[f"{prefix}weight"] = base

    def _load_from_state_dict(self, *arguments: Any) -> None:
        # What is loaded is not merged.
        self.unmerge()
        super()._load_from_state_dict(*arguments)


class LoRALinear(Adapted, Linear):
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

    Example:
        >>> layer = fastattn.nn.LoRALinear(8, 4, rank=2)
        >>> [name for name, parameter in layer.named_parameters() if parameter.requires_grad]
        ['lora_A', 'lora_B']
    """

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
        _check_adaptation("LoRALinear", rank, dropout)
        Linear.__init__(self, in_features, out_features, bias, device, dtype)
        sizes = (in_features, out_features)
        self._adapt(sizes, rank, alpha, dropout, device=device, dtype=dtype)

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
        return made._adopt(linear)

    def _product(self, input: torch.Tensor) -> torch.Tensor:
        return Linear.forward(self, input)

    def difference(self) -> torch.Tensor:
        """alpha / rank * lora_B lora_A, (out_features, in_features), in float32 at least."""
        return _difference(self)

    def to_linear(self) -> Linear:
        """A plain layer that gives the same, with a weight of its own."""
        made = Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        made.weight, made.bias = self._whole_weight(), self.bias
        return made.train(self.training)


class LoRAConv1D(Adapted, Conv1D):
    """A `Conv1D`, whose weight is (in, out), adapted as a `LoRALinear` is, before its activation.

    Args:
        in_features, out_features, activation: as in `Conv1D`.
        rank, alpha, dropout, device, dtype: as in `LoRALinear`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        activation: Activation | None = None,
        *,
        rank: int = 8,
        alpha: float | None = None,
        dropout: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        _check_adaptation("LoRAConv1D", rank, dropout)
        Conv1D.__init__(self, in_features, out_features, activation, device=device, dtype=dtype)
        sizes = (in_features, out_features)
        self._adapt(sizes, rank, alpha, dropout, device=device, dtype=dtype)

    @classmethod
    def from_conv1d(
        cls, layer: Any, *, rank: int = 8, alpha: float | None = None, dropout: float = 0.0
    ) -> LoRAConv1D:
        """A layer around the parameters of another, which it shares and freezes."""
        in_features, out_features = layer.weight.shape
        made = cls(
            in_features,
            out_features,
            getattr(layer, "activation", None),
            rank=rank,
            alpha=alpha,
            dropout=dropout,
            device="meta",
            dtype=layer.weight.dtype,
        )
        return made._adopt(layer)

    def _product(self, input: torch.Tensor) -> torch.Tensor:
        return ops.linear(input, self.weight.t(), self.bias)

    def difference(self) -> torch.Tensor:
        """alpha / rank * (lora_B lora_A)^T, (in_features, out_features), in float32 at least."""
        return _difference(self).t()

    def to_linear(self) -> Conv1D:
        """A plain layer that gives the same, with a weight of its own."""
        in_features, out_features = self.weight.shape
        made = Conv1D(in_features, out_features, self.activation, device="meta")
        made.weight, made.bias = self._whole_weight(), self.bias
        return made.train(self.training)


def _difference(layer: Adapted) -> torch.Tensor:
    computed = torch.promote_types(layer.lora_A.dtype, torch.float32)
    return (layer.lora_B.to(computed) @ layer.lora_A.to(computed)) * layer.scaling


def _check_adaptation(name: str, rank: int, dropout: float) -> None:
    if rank < 1:
        raise ValueError(f"{name}: rank must be positive, got {rank}")
    check_dropout(name, dropout)
