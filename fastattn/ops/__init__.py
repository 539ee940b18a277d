"""The ops: public functions, each a torch.autograd.Function around Triton's kernels."""

import torch.fx

from .attention import (
    BlockMask,
    MaskTerm,
    RelativeBias,
    ScoreTerm,
    alibi_slopes,
    attention,
    attention_varlen,
    attention_weights,
)
from .core.backends import backend
from .core.batch_invariance import batch_invariant
from .core.catalog import OPERATIONS
from .cross_entropy import cross_entropy
from .dropout import dropout, dropout_mask
from .gated_activation import geglu, glu, reglu, swiglu
from .gated_linear import gated_linear
from .layer_norm import add_layer_norm, layer_norm
from .linear import linear
from .linear_cross_entropy import linear_cross_entropy
from .matmul import matmul
from .rms_norm import add_rms_norm, rms_norm
from .rotary import apply_rotary, apply_rotary_qk
from .softmax import log_softmax, softmax

__all__ = [
    "BlockMask",
    "MaskTerm",
    "RelativeBias",
    "ScoreTerm",
    "add_layer_norm",
    "add_rms_norm",
    "alibi_slopes",
    "apply_rotary",
    "apply_rotary_qk",
    "attention",
    "attention_varlen",
    "attention_weights",
    "backend",
    "batch_invariant",
    "cross_entropy",
    "dropout",
    "dropout_mask",
    "gated_linear",
    "geglu",
    "glu",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "log_softmax",
    "matmul",
    "reglu",
    "rms_norm",
    "softmax",
    "swiglu",
]

# For torch.fx a call of an op is one node. It finds functions where they are called from.
for _name in OPERATIONS:
    torch.fx.wrap(_name)
