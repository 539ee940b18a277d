"""The linear layer as a module, with its weight either way round."""

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from .. import ops
from ..functional.choice import is_for_torch
from ..ops.core.arguments import check_choice
from ..ops.core.tensor_kinds import is_foreign
from ..ops.linear import ACTIVATIONS, Activation
from ..reference.linear import ACTIVATIONS as FUNCTIONS


class Linear(nn.Linear):
    """`torch.nn.Linear` on fastattn's kernels: same arguments, parameters and state_dict.

    Args:
        in_features, out_features, bias, device, dtype: as in torch.nn.Linear.
        activation: applied to the output, in the same kernel; see `fastattn.linear`.

    Example:
        >>> fastattn.nn.Linear(8, 4, activation="gelu")(torch.randn(2, 8)).shape
        torch.Size([2, 4])
    """

    activation: Activation | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        activation: Activation | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        if activation is not None:
            check_choice("Linear", "activation", activation, ACTIVATIONS)
        self.activation = activation

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """activation(input @ weight^T + bias), (..., out_features)."""
        if self.activation is None and is_for_torch(input):
            return F.linear(input, self.weight, self.bias)
        weight = self.weight
        if is_foreign(input) or is_foreign(weight):
            y = F.linear(input, weight, self.bias)
            return y if self.activation is None else FUNCTIONS[self.activation](y)
        return ops.linear(input, weight, self.bias, activation=self.activation)

    def extra_repr(self) -> str:
        """torch's, and the activation if there is one."""
        plain = super().extra_repr()
        return plain if self.activation is None else f"{plain}, activation={self.activation!r}"


class Conv1D(nn.Module):
    """activation(x @ weight + bias), a linear layer whose weight is (in, out), as GPT-2's."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        activation: Activation | None = None,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.activation: Activation | None = activation
        self.weight = nn.Parameter(
            torch.empty(in_features, out_features, device=device, dtype=dtype)
        )
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight, and set the bias to 0."""
        nn.init.normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out)."""
        return ops.linear(x, self.weight.t(), self.bias, activation=self.activation)

    def extra_repr(self) -> str:
        """The sizes, and the activation if there is one."""
        text = ", ".join(map(str, self.weight.shape))
        return text if self.activation is None else f"{text}, activation={self.activation!r}"
