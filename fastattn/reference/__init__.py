"""Every op in plain PyTorch, under its own name: the truth, the yardstick and the CPU backend."""

from .dropout import dropout, dropout_mask
from .layer_norm import add_layer_norm, layer_norm
from .rms_norm import add_rms_norm, rms_norm

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "dropout",
    "dropout_mask",
    "layer_norm",
    "rms_norm",
]
