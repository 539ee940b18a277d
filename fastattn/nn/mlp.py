"""The feed-forward layers of transformer blocks: gated, as in Llama, and plain, as in GPT-2."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn as nn

from .. import ops
from ..ops.core.arguments import check_choice
from ..ops.core.tensor_kinds import is_foreign
from ..ops.gated_linear import ACTIVATIONS as GATED_ACTIVATIONS
from ..ops.gated_linear import Activation as GatedActivation
from ..ops.linear import ACTIVATIONS, Activation
from ..reference.linear import ACTIVATIONS as FUNCTIONS
from .dropout import Dropout
from .hooks import has_hooks
from .linear import Linear
from .tracing import one_node

GATED_FUNCTIONS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "silu": ops.swiglu,
    "gelu": ops.geglu,
    "gelu_tanh": partial(ops.geglu, approximate="tanh"),
    "relu": ops.reglu,
    "sigmoid": ops.glu,
}

# What Hugging Face's GPT-2 calls the layers.
GPT2_NAMES = {"c_fc": "fc1", "c_proj": "fc2"}


class GatedMLP(nn.Module):
    """down_proj(activation(gate_proj(x)) * up_proj(x)), the feed-forward layer of Llama.

    The parameters have the names and shapes of Hugging Face's `LlamaMLP` and its many kin
    (`gate_proj.weight`, `up_proj.weight`, `down_proj.weight`). Both first products and the
    activation are one kernel, which saves nothing but its inputs; with recompute=False a step takes
    less time and more memory: see `fastattn.gated_linear`.

    If another module has taken the place of gate_proj or up_proj, as adapters and quantization do,
    or if they have hooks, they are called one after the other, and then the activation.

    Args:
        in_features: the columns of x.
        hidden_features: the columns of gate and up.
        out_features: the columns of the output, in_features if None.
        activation: "silu" (SwiGLU: Llama, Mistral, Qwen), "gelu" or "gelu_tanh" (GeGLU: Gemma),
            "relu" (ReGLU) or "sigmoid" (GLU).
        bias: whether the three linear layers have biases.
        recompute: whether gate and up are computed again in the backward or saved.
        device, dtype: as in torch.nn.Linear.

    Source: Shazeer, "GLU Variants Improve Transformer" (2020).

    Example:
        >>> fastattn.nn.GatedMLP(8, 24)(torch.randn(2, 8)).shape
        torch.Size([2, 8])
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        *,
        activation: GatedActivation = "silu",
        bias: bool = False,
        recompute: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_choice("GatedMLP", "activation", activation, GATED_ACTIVATIONS)
        out_features = in_features if out_features is None else out_features
        self.activation: GatedActivation = activation
        self.recompute = recompute
        self.gate_proj = Linear(in_features, hidden_features, bias, device, dtype)
        self.up_proj = Linear(in_features, hidden_features, bias, device, dtype)
        self.down_proj = Linear(hidden_features, out_features, bias, device, dtype)

    @one_node
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in_features) to (..., out_features)."""
        gate, up = self.gate_proj, self.up_proj
        if is_only_linear(gate) and is_only_linear(up):
            hidden = ops.gated_linear(
                x,
                gate.weight,
                up.weight,
                gate.bias,
                up.bias,
                activation=self.activation,
                recompute=self.recompute,
            )
        else:
            hidden = GATED_FUNCTIONS[self.activation](gate(x), up(x))
        return self.down_proj(hidden)

    def extra_repr(self) -> str:
        """The activation, and whether gate and up are saved."""
        return f"activation={self.activation!r}" + ("" if self.recompute else ", recompute=False")


class MLP(nn.Module):
    """dropout(fc2(activation(fc1(x)))), the feed-forward layer of GPT-2, BERT, ViT and others.

    The activation is in the kernel of fc1's product: see `fastattn.linear`. If another module has
    taken the place of fc1, or if it has hooks, it is called, and then the activation.

    A state_dict in the layout of Hugging Face's `GPT2MLP` loads as it is: what it names `c_fc` and
    `c_proj` becomes fc1 and fc2, with the weights, (in, out) there, transposed.

    Args:
        in_features: the columns of x.
        hidden_features: the columns between the two linear layers.
        out_features: the columns of the output, in_features if None.
        activation: "gelu", "gelu_tanh" (GPT-2's "gelu_new"), "relu", "silu" or any other that
            `fastattn.linear` knows.
        bias: whether the linear layers have biases.
        dropout: the probability with which an element of the output is dropped in training.
        device, dtype: as in torch.nn.Linear.

    Example:
        >>> fastattn.nn.MLP(8, 32)(torch.randn(2, 8)).shape
        torch.Size([2, 8])
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        *,
        activation: Activation = "gelu",
        bias: bool = True,
        dropout: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_choice("MLP", "activation", activation, ACTIVATIONS)
        out_features = in_features if out_features is None else out_features
        self.activation: Activation = activation
        self.fc1 = Linear(in_features, hidden_features, bias, device, dtype)
        self.fc2 = Linear(hidden_features, out_features, bias, device, dtype)
        self.dropout = Dropout(dropout)
        self.register_load_state_dict_pre_hook(_read_gpt2)

    @one_node
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in_features) to (..., out_features)."""
        first = self.fc1
        if is_only_linear(first):
            hidden = ops.linear(x, first.weight, first.bias, activation=self.activation)
        else:
            hidden = FUNCTIONS[self.activation](first(x))
        return self.dropout(self.fc2(hidden))

    def extra_repr(self) -> str:
        """The activation."""
        return f"activation={self.activation!r}"


def is_only_linear(layer: nn.Module, hooks: Callable[[nn.Module], bool] = has_hooks) -> bool:
    """Whether calling `layer` does no more than its product, so that its parameters stand for it.

    Wrappers (adapters, quantization, FSDP) change the type, others the instance's forward or hooks,
    and quantization may put tensors of its own in the place of the parameters. Of hooks, those of
    the layer's own alone count with `hooks=has_own_hooks`.
    """
    return computes_product(layer, hooks) and are_readable(layer.weight, layer.bias)


def computes_product(layer: nn.Module, hooks: Callable[[nn.Module], bool] = has_hooks) -> bool:
    """Whether calling `layer` does no more than its product, whatever its parameters are."""
    kinds = (nn.Linear, Linear)
    return is_only(layer, kinds, hooks) and getattr(layer, "activation", None) is None


def are_readable(*parameters: Any) -> bool:
    """Whether kernels can take the parameters of a layer; else it has to be called."""
    # A loop takes half the time of any().
    for parameter in parameters:  # noqa: SIM110
        if parameter is not None and is_foreign(parameter):
            return False
    return True


def is_only(
    module: Any, kinds: tuple[type, ...], hooks: Callable[[nn.Module], bool] = has_hooks
) -> bool:
    """Whether calling it does no more than what its class does, which is one of these."""
    return type(module) in kinds and "forward" not in vars(module) and not hooks(module)


def _read_gpt2(_: nn.Module, state_dict: dict[str, Any], prefix: str, *__: Any) -> None:
    """Rename and transpose what comes in GPT-2's layout, before it is loaded."""
    for theirs, ours in GPT2_NAMES.items():
        weight = state_dict.pop(f"{prefix}{theirs}.weight", None)
        bias = state_dict.pop(f"{prefix}{theirs}.bias", None)
        if weight is not None:
            state_dict[f"{prefix}{ours}.weight"] = weight.t().contiguous()
        if bias is not None:
            state_dict[f"{prefix}{ours}.bias"] = bias
