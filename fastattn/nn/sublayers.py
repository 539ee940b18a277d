"""The stream of a transformer layer: attention, feed-forward, and what stands between them.

The layers' parts are torch's modules. Kernels take the parameters of those that do no more than
their class does; what has hooks or is of another class is called as it is. On the reference backend
all are called.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from .. import functional, ops
from ..ops.core.backends import use_triton
from .dropout import Dropout
from .mlp import are_readable, is_only, is_only_linear
from .norm import LayerNorm

Function = Callable[[torch.Tensor], torch.Tensor]
Sublayer = tuple[Callable[..., torch.Tensor], Any, Any]
"""What is added to the stream, the dropout before the addition, and the norm."""

# What `fastattn.gated_linear` calls our gated activations.
GATED: list[tuple[Any, Any]] = [
    (ops.swiglu, "silu"),
    (ops.geglu, "gelu"),
    (ops.reglu, "relu"),
    (ops.glu, "sigmoid"),
]

# What `fastattn.linear` calls the activations that its kernel applies to a product.
EPILOGUES: list[tuple[Any, Any]] = [
    (F.relu, "relu"),
    (torch.relu, "relu"),
    (F.gelu, "gelu"),
    (F.silu, "silu"),
    (F.leaky_relu, "leaky_relu"),
    (torch.sigmoid, "sigmoid"),
    (torch.tanh, "tanh"),
]
MODULES: list[tuple[type, Any]] = [
    (nn.ReLU, "relu"),
    (nn.SiLU, "silu"),
    (nn.Sigmoid, "sigmoid"),
    (nn.Tanh, "tanh"),
]

STRINGS: dict[str, Function] = {
    "relu": F.relu,
    "gelu": F.gelu,
    **{function.__name__: function for function, _ in GATED},
}


def add_sublayers(x: torch.Tensor, sublayers: Sequence[Sublayer], norm_first: bool) -> torch.Tensor:
    """Add each sublayer to the stream, with its norm after the sum or, norm_first, before itself.

    Either way an addition and the norm that follows it are one kernel. An addition that no norm
    follows is the last sublayer's own, which takes it as `residual`.
    """
    if not norm_first:
        for sublayer, dropout, norm in sublayers:
            branch = sublayer(x)
            # The norm gives what the branch has, and autocast leaves the stream in float32.
            branch = branch.to(torch.promote_types(branch.dtype, x.dtype))
            x, _ = _add_and_norm(branch, x, dropout, norm)
        return x
    y = _apply_norm(sublayers[0][2], x)
    for (sublayer, dropout, _), (_, _, norm) in itertools.pairwise(sublayers):
        y, x = _add_and_norm(sublayer(y), x, dropout, norm)
    last, dropout, _ = sublayers[-1]
    if _rate(dropout) == 0.0:
        return last(y, residual=x)
    return x + _apply_dropout(dropout, last(y))


def _add_and_norm(
    branch: torch.Tensor, x: torch.Tensor, dropout: Any, norm: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm(new x), new x), which is x + dropout(branch)."""
    rate = _rate(dropout)
    if rate is not None and rate < 1.0 and _is_layer_norm(norm) and use_triton(x):
        return ops.add_layer_norm(branch, x, norm.weight, norm.bias, norm.eps, dropout_p=rate)
    x = x + _apply_dropout(dropout, branch)
    return _apply_norm(norm, x), x


def _apply_norm(norm: Any, x: torch.Tensor) -> torch.Tensor:
    if _is_layer_norm(norm) and use_triton(x):
        return ops.layer_norm(x, norm.weight, norm.bias, norm.eps)
    return norm(x)


def _apply_dropout(dropout: Any, x: torch.Tensor) -> torch.Tensor:
    rate = _rate(dropout)
    return dropout(x) if rate is None or not use_triton(x) else functional.dropout(x, rate)


def attention_sublayer(
    module: nn.Module,
    memory: torch.Tensor | None,
    attn_mask: torch.Tensor | None,
    key_padding_mask: torch.Tensor | None,
    is_causal: bool,
) -> Function:
    """Attention of x to memory, or to itself if that is None."""

    def attend(x: torch.Tensor) -> torch.Tensor:
        keys = x if memory is None else memory
        return module(
            x,
            keys,
            keys,
            attn_mask=attn_mask,
            key_padding_mask=key_padding_mask,
            need_weights=False,
            is_causal=is_causal,
        )[0]

    return attend


def feed_forward(layer: Any, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
    """linear2(dropout(activation(linear1(x)))) + residual."""
    hidden = _apply_dropout(layer.dropout, _activate(layer.linear1, layer.activation, x))
    second = layer.linear2
    if is_only_linear(second) and use_triton(hidden):
        return ops.linear(hidden, second.weight, second.bias, residual=residual)
    y = second(hidden)
    return y if residual is None else residual + y


def _activate(linear: Any, activation: Function, x: torch.Tensor) -> torch.Tensor:
    """activation(linear(x)), as one kernel for the activations that there is one for."""
    if not (is_only_linear(linear) and use_triton(x)):
        return activation(linear(x))
    weight, bias = linear.weight, linear.bias
    gated = _find_name(GATED, activation)
    if gated is not None:
        biases = (None, None) if bias is None else bias.chunk(2)
        return ops.gated_linear(x, *weight.chunk(2), *biases, activation=gated)
    name = _find_name(EPILOGUES, activation) or _name_of_module(activation)
    y = ops.linear(x, weight, bias, activation=name)
    return y if name else activation(y)


def activation_function(activation: str | Function) -> Function:
    """The activation that a string stands for, with torch's error for those it knows nothing of."""
    if not isinstance(activation, str):
        return activation
    if activation not in STRINGS:
        raise RuntimeError(f"activation should be {'/'.join(STRINGS)}, not {activation}")
    return STRINGS[activation]


def is_gated(activation: Function) -> bool:
    """Whether it is one of ours that halve the columns, also with arguments bound to it."""
    return _find_name(GATED, getattr(activation, "func", activation)) is not None


def _find_name(table: Sequence[tuple[Function, Any]], activation: Function) -> Any:
    return next((name for function, name in table if function is activation), None)


def _name_of_module(activation: Any) -> Any:
    """The same for activations as modules."""
    if is_only(activation, (nn.GELU,)):
        return "gelu" if activation.approximate == "none" else "gelu_tanh"
    if is_only(activation, (nn.LeakyReLU,)):
        return "leaky_relu" if activation.negative_slope == 0.01 else None
    return next((name for kind, name in MODULES if is_only(activation, (kind,))), None)


def _is_layer_norm(norm: Any) -> bool:
    return (
        is_only(norm, (nn.LayerNorm, LayerNorm))
        and len(norm.normalized_shape) == 1
        and are_readable(norm.weight, norm.bias)
    )


def _rate(dropout: Any) -> float | None:
    """The probability with which it drops an element now; None if it may do something else."""
    if not is_only(dropout, (nn.Dropout, Dropout)):
        return None
    return dropout.p if dropout.training else 0.0
