"""Experts without a gate, as the Switch Transformer has them."""

import math
from typing import Any

import torch
import torch.nn as nn

from .. import ops
from ..ops.core.arguments import check_choice
from ..ops.linear import Activation
from ..reference.linear import ACTIVATIONS
from ..reference.mixture import order_by_expert
from .dropout import Dropout
from .experts import ExpertLayers


class PlainExperts(ExpertLayers):
    """down(dropout(activation(up(x)))) of many experts, each for the tokens routed to it.

    Both products are `fastattn.grouped_linear`, which has the same bits every time and waits for
    nothing. What a token's experts give is summed by the weights in the order of ids, in float32
    (float64 for float64), and rounded once; an id outside of [0, E) is no expert's.

    The parameters are `up_proj` (E, I, H) and `down_proj` (E, H, I), and with biases `up_proj_bias`
    (E, I) and `down_proj_bias` (E, H).

    Args:
        experts: E.
        in_features: the columns of x and of the output, H.
        hidden_features: the columns between the products, I.
        activation: "relu" or any other that `fastattn.linear` knows.
        bias: whether both products have biases.
        dropout: the probability with which an element between the products is dropped in training.
        device, dtype: as in torch.nn.Linear.

    Example:
        >>> import torch, fastattn.nn as nn
        >>> layer = nn.MixtureOfExperts(nn.TopKRouter(8, experts=4, k=1), nn.PlainExperts(4, 8, 16))
        >>> layer(torch.ones(2, 3, 8)).shape
        torch.Size([2, 3, 8])

    Source: Fedus et al., "Switch Transformers: Scaling to Trillion Parameter Models with Simple and
    Efficient Sparsity" (2022).
    """

    def __init__(
        self,
        experts: int,
        in_features: int,
        hidden_features: int,
        *,
        activation: Activation = "relu",
        bias: bool = False,
        dropout: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_choice("PlainExperts", "activation", activation, tuple(ACTIVATIONS))
        self.activation: Activation = activation
        self.dropout = Dropout(dropout)

        def make(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(experts, *shape, device=device, dtype=dtype))

        self.up_proj = make(hidden_features, in_features)
        self.down_proj = make(in_features, hidden_features)
        self.up_proj_bias = make(hidden_features) if bias else None
        self.down_proj_bias = make(in_features) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw each expert's parameters as torch.nn.Linear does."""
        pairs = ((self.up_proj, self.up_proj_bias), (self.down_proj, self.down_proj_bias))
        for weight, bias in pairs:
            bound = 1.0 / math.sqrt(max(weight.shape[2], 1))
            nn.init.uniform_(weight, -bound, bound)
            if bias is not None:
                nn.init.uniform_(bias, -bound, bound)

    def mix(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        k, columns = ids.shape[-1], x.shape[-1]
        order = order_by_expert(ids.reshape(-1, k), self.up_proj.shape[0])
        # A row for each pair of a token and an expert first: then a gradient is summed over a
        # token's pairs in their order, where picking tokens would add up in any.
        pairs = x.reshape(-1, 1, columns).expand(-1, k, -1).reshape(-1, columns)
        rows = pairs[order.slots.long()]
        hidden = ops.grouped_linear(rows, self.up_proj, order.offsets, self.up_proj_bias)
        hidden = self.dropout(ACTIVATIONS[self.activation](hidden))
        y = ops.grouped_linear(hidden, self.down_proj, order.offsets, self.down_proj_bias)
        computed = torch.promote_types(y.dtype, torch.float32)
        picked = y[order.places.long()].to(computed)
        scaled = picked * weights.reshape(*order.places.shape, 1).to(computed)
        known = (order.places < order.offsets[-1])[..., None]
        return torch.where(known, scaled, 0.0).sum(1).to(y.dtype).view(x.shape)

    def extra_repr(self) -> str:
        """The sizes and the activation."""
        experts, columns, inside = self.down_proj.shape
        return f"{experts}, {columns}, {inside}, activation={self.activation!r}"
