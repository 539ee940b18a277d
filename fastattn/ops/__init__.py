"""The ops: public functions, each a torch.autograd.Function around Triton's kernels."""

from .backends import backend
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
    "backend",
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
