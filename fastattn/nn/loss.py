"""Losses as modules."""

import math
from typing import Any

import torch
import torch.nn as nn

from .. import functional
from ..ops.linear_log_prob import linear_log_prob
from ..ops.log_prob import log_prob
from .mlp import is_only_linear
from .tracing import one_node


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """`torch.nn.CrossEntropyLoss` on fastattn's kernels: same arguments, buffers and state_dict.

    Example:
        >>> loss = fastattn.nn.CrossEntropyLoss()(torch.zeros(2, 4), torch.tensor([0, 3]))
        >>> torch.testing.assert_close(loss, torch.tensor(4.0).log())
    """

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The loss of logits (N, C, ...) or (C,) for class indices or class probabilities."""
        return functional.cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )


class LinearCrossEntropyLoss(nn.Module):
    """`torch.nn.LinearCrossEntropyLoss` on fastattn's kernels: same arguments and state_dict.

    The linear layer is part of the loss, as `linear`; where another module has its weight, tie them
    (`loss.linear.weight = embedding.weight`), or call `fastattn.linear_cross_entropy`. The logits
    are held a chunk of rows at a time whether there are `options` or not, see
    `fastattn.functional.linear_cross_entropy`. `z_loss`, `logit_scale` and `softcap` are ours.

    Example:
        >>> head = fastattn.nn.LinearCrossEntropyLoss(8, 100)
        >>> head(torch.randn(6, 8), torch.randint(100, (6,))).backward()
    """

    weight: torch.Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: torch.Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
        z_loss: float = 0.0,
        logit_scale: float = 1.0,
        softcap: float | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.reduction = reduction
        self.num_classes = num_classes
        self.out_features = out_features
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        outputs = math.prod(out_features, start=num_classes)
        self.linear = nn.Linear(in_features, outputs, bias, device, dtype)
        self.options = options
        self.z_loss = z_loss
        self.logit_scale = logit_scale
        self.softcap = softcap

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The loss of input (N, in_features) or (in_features,) for classes or probabilities."""
        shape = (self.num_classes, *self.out_features)
        weight, bias = self.linear.weight, self.linear.bias
        if self.out_features:
            weight = weight.unflatten(0, shape)
            bias = None if bias is None else bias.unflatten(0, shape)
        return functional.linear_cross_entropy(
            input,
            weight,
            target,
            linear_bias=bias,
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
            z_loss=self.z_loss,
            logit_scale=self.logit_scale,
            softcap=self.softcap,
        )

    def extra_repr(self) -> str:
        described = (
            f"in_features={self.linear.in_features}, num_classes={self.num_classes}, "
            f"out_features={self.out_features}, bias={self.linear.bias is not None}, "
            f"reduction={self.reduction}, ignore_index={self.ignore_index}, "
            f"label_smoothing={self.label_smoothing}, options={self.options}"
        )
        if self.z_loss:
            described += f", z_loss={self.z_loss}"
        if self.logit_scale != 1.0:
            described += f", logit_scale={self.logit_scale}"
        return described if self.softcap is None else f"{described}, softcap={self.softcap}"


class LinearLogProb(nn.Module):
    """`fastattn.linear_log_prob` with the linear layer of a head, as `linear`.

    Where another module has its weight, tie them (`module.linear.weight = embedding.weight`). A
    layer with hooks, with a weight that kernels do not read, or with another module in its place is
    called, and then all logits exist.

    Args:
        in_features: the columns of the input.
        num_classes: the classes, a vocabulary's tokens.
        bias: whether the layer has a bias.
        temperature, softcap, logit_scale, ignore_index: as in `fastattn.log_prob`.
        return_entropy, return_correct: what to return beside, as there.
        device, dtype: the layer's.

    Example:
        >>> head = fastattn.nn.LinearLogProb(8, 100)
        >>> head(torch.randn(6, 8), torch.randint(100, (6,))).shape
        torch.Size([6])
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        temperature: float = 1.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        ignore_index: int = -100,
        return_entropy: bool = False,
        return_correct: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, num_classes, bias, device, dtype)
        self.temperature = temperature
        self.softcap = softcap
        self.logit_scale = logit_scale
        self.ignore_index = ignore_index
        self.return_entropy = return_entropy
        self.return_correct = return_correct

    @one_node
    def forward(self, input: torch.Tensor, target: torch.Tensor) -> Any:
        """Log-probabilities (...) of target (...) after input (..., in_features), and the rest."""
        options: dict[str, Any] = {
            "temperature": self.temperature,
            "softcap": self.softcap,
            "logit_scale": self.logit_scale,
            "ignore_index": self.ignore_index,
            "return_entropy": self.return_entropy,
            "return_correct": self.return_correct,
        }
        if is_only_linear(self.linear):
            weight, bias = self.linear.weight, self.linear.bias
            return linear_log_prob(input, weight, target, bias, **options)
        # What an ignored row holds would reach the layer's parameters.
        rows = input.masked_fill((target == self.ignore_index)[..., None], 0.0)
        return log_prob(self.linear(rows), target, **options)

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature}, softcap={self.softcap}, "
            f"logit_scale={self.logit_scale}, ignore_index={self.ignore_index}, "
            f"return_entropy={self.return_entropy}, return_correct={self.return_correct}"
        )
