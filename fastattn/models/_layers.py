"""What families with layers of their own share: attention of heads, activations, pooling."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn as nn

from .. import ops
from ..nn import ContextCache, KVCache
from ..nn.attention import split_heads
from ..nn.dropout import Dropout
from ..nn.linear import Linear
from ..nn.mlp import is_only_linear
from ..ops.linear import Activation
from ..reference.linear import ACTIVATIONS as FUNCTIONS
from ._config import ConfigError

ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "leaky_relu": "leaky_relu",
    "relu": "relu",
    "relu2": "relu_squared",
    "sigmoid": "sigmoid",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}
"""What `fastattn.linear` calls the activations that configurations name."""


def activate(layer: nn.Module, x: torch.Tensor, activation: Activation) -> torch.Tensor:
    """activation(layer(x)), in one kernel where the layer is no more than its product."""
    if is_only_linear(layer):
        weight: Any = layer.weight
        bias: Any = layer.bias
        return ops.linear(x, weight, bias, activation=activation)
    return FUNCTIONS[activation](layer(x))


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, head_dim: int, **terms: Any
) -> torch.Tensor:
    """Attention of projections, (B, length, heads * head_dim) each, with its heads side by side.

    Args:
        terms: keyword arguments of `fastattn.attention`.
    """
    q, k, v = (split_heads(x, head_dim).transpose(1, 2) for x in (q, k, v))
    return ops.attention(q, k, v, **terms).transpose(1, 2).flatten(2)


class ProjectedAttention(nn.Module):
    """Attention of projections of x to those of a context, or of x itself.

    A family derives from it, makes the projections, and sets `names` to those of q, k, v and the
    output.

    Args:
        head_dim: the columns of a head.
        dropout: the probability with which a weight of the softmax is dropped in training.
        scale: of the scores; head_dim^-0.5 if None.
    """

    names: ClassVar[tuple[str, str, str, str]]

    def __init__(self, head_dim: int, dropout: float, scale: float | None = None) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.dropout = dropout
        self.scale = scale

    def make_cache(self, batch: int, capacity: int) -> KVCache:
        """A cache with room for `capacity` tokens of `batch` sequences."""
        weight: Any = self.get_submodule(self.names[1]).weight
        heads = weight.shape[0] // self.head_dim
        options = {"device": weight.device, "dtype": weight.dtype}
        return KVCache(batch, heads, capacity, self.head_dim, **options)

    def forward(
        self,
        x: torch.Tensor,
        context: torch.Tensor | None = None,
        cache: KVCache | ContextCache | None = None,
        **terms: Any,
    ) -> torch.Tensor:
        """(B, M, columns), which attends to the context, or to itself, to the same.

        Args:
            context: (B, N, columns); None in self-attention, and where a cache has it.
            cache: a `KVCache` in self-attention, or a `ContextCache`.
            terms: keyword arguments of `fastattn.attention`, or of `attend` of the cache.
        """
        q, k, v, out = (getattr(self, name) for name in self.names)
        heads = [q(x)]
        if context is not None or not isinstance(cache, ContextCache):
            heads += [k(x if context is None else context), v(x if context is None else context)]
        heads = [split_heads(x, self.head_dim).transpose(1, 2) for x in heads]
        dropout_p = self.dropout if self.training else 0.0
        if cache is None:
            o = ops.attention(*heads, scale=self.scale, dropout_p=dropout_p, **terms)
        elif dropout_p > 0.0:
            raise ValueError(
                f"{type(self).__name__}: there is no dropout of attention to a cache; call eval()"
            )
        else:
            o = cache.attend(*heads, scale=self.scale, **terms)
        return out(o.transpose(1, 2).flatten(2))


def find_head_dim(config: Any, columns: str, heads: str) -> int:
    """The columns of one of the heads that split `columns`, both given by the fields' names.

    Raises:
        ConfigError: they do not split them evenly.
    """
    width, count = getattr(config, columns), getattr(config, heads)
    if count < 1 or width % count:
        raise ConfigError(
            f"{type(config).__name__}: {heads} must divide {columns}, got {count} and {width}"
        )
    return width // count


def check_tokens(config: Any, *names: str) -> None:
    """Fields that say which token means what say one each.

    Raises:
        ConfigError: one does not.
    """
    for name in names:
        if not isinstance(getattr(config, name), int):
            raise ConfigError(
                f"{type(config).__name__}: {name} must be a token, got {getattr(config, name)!r}"
            )


def shift_labels(labels: torch.Tensor, config: Any) -> torch.Tensor:
    """What a decoder reads to give (B, S) labels: them one place later, behind the start token.

    Labels below 0, which count for no loss, become padding.
    """
    start = torch.full_like(labels[..., :1], config.decoder_start_token_id)
    shifted = torch.cat((start, labels[..., :-1]), dim=-1)
    return torch.where(shifted < 0, config.pad_token_id, shifted)


def check_has_tokens(x: torch.Tensor) -> None:
    """Sequences, (B, S, ...), have tokens that one answer for each can be read from.

    Raises:
        ValueError: S is 0.
    """
    if x.shape[1] == 0:
        raise ValueError(
            "input_ids must have tokens, for the answer for a sequence is read from one of them; "
            f"got sequences of length 0 in the shape {tuple(x.shape)}"
        )


def select_last_token(x: torch.Tensor, input_ids: torch.Tensor, token: int) -> torch.Tensor:
    """The row of x, (B, S, C), where each sequence has a token for the last time: (B, C).

    Raises:
        ValueError: a sequence has no tokens, or does not have this one, where that can be seen
            without waiting: on a CPU and not compiled. Elsewhere its row is NaN.
    """
    check_has_tokens(input_ids)
    found = input_ids == token
    present = found.any(dim=1)
    if not torch.compiler.is_compiling() and x.device.type == "cpu" and not present.all():
        raise ValueError(f"every sequence must have the token {token}, which ends it")
    places = torch.arange(input_ids.shape[1], device=input_ids.device)
    last = (found * places).amax(dim=1)
    rows = x[torch.arange(x.shape[0], device=x.device), last]
    return torch.where(present[:, None], rows, float("nan"))


class ClassificationHead(nn.Module):
    """out_proj(dropout(tanh(dense(dropout(x))))), on what is pooled of an encoder-decoder."""

    def __init__(self, columns: int, num_labels: int, dropout: float) -> None:
        super().__init__()
        self.dense = Linear(columns, columns)
        self.dropout = Dropout(dropout)
        self.out_proj = Linear(columns, num_labels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, columns) to (B, num_labels)."""
        x = activate(self.dense, self.dropout(x), "tanh")
        return self.out_proj(self.dropout(x))
