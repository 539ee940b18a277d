"""Every op in plain PyTorch, under its own name: the truth, the yardstick and the CPU backend."""

from .cross_entropy import cross_entropy
from .dropout import dropout, dropout_mask
from .gated_activation import geglu, glu, reglu, swiglu
from .layer_norm import add_layer_norm, layer_norm
from .rms_norm import add_rms_norm, rms_norm
from .rotary import apply_rotary, apply_rotary_qk
from .softmax import log_softmax, softmax

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "apply_rotary",
    "apply_rotary_qk",
    "cross_entropy",
    "dropout",
    "dropout_mask",
    "geglu",
    "glu",
    "layer_norm",
    "log_softmax",
    "reglu",
    "rms_norm",
    "softmax",
    "swiglu",
]
