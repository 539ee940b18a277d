"""The ops: public functions, each a torch.autograd.Function around Triton's kernels."""

from .backends import backend
from .dropout import dropout, dropout_mask
from .layer_norm import add_layer_norm, layer_norm
from .rms_norm import add_rms_norm, rms_norm

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "backend",
    "dropout",
    "dropout_mask",
    "layer_norm",
    "rms_norm",
]
