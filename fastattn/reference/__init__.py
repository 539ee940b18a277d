"""Ops in plain PyTorch, under their own names: the truth, the yardstick and the CPU backend.

What several files use is listed here. An op may as well import its reference from its own file.
"""

from .attention import attention, attention_varlen, attention_weights
from .cross_entropy import cross_entropy
from .dropout import dropout, dropout_mask
from .gated_activation import geglu, glu, reglu, swiglu
from .gated_linear import gated_linear
from .grouped_linear import grouped_linear
from .layer_norm import add_layer_norm, layer_norm
from .linear import linear
from .linear_cross_entropy import linear_cross_entropy
from .matmul import matmul
from .mixture import mixture
from .rms_norm import add_rms_norm, rms_norm
from .rotary import apply_rotary, apply_rotary_qk
from .softmax import log_softmax, softmax

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "apply_rotary",
    "apply_rotary_qk",
    "attention",
    "attention_varlen",
    "attention_weights",
    "cross_entropy",
    "dropout",
    "dropout_mask",
    "gated_linear",
    "geglu",
    "glu",
    "grouped_linear",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "log_softmax",
    "matmul",
    "mixture",
    "reglu",
    "rms_norm",
    "softmax",
    "swiglu",
]
