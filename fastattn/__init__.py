"""Transformer building blocks as Triton kernels with exact, hand-written gradients."""

import os

if os.path.isfile(os.path.join(os.path.dirname(__file__), "kernels")):
    raise ImportError(
        "fastattn/kernels is a text file where the repository has a symbolic link to ../kernels: "
        "check out again with `git config core.symlinks true`, or install fastattn with pip"
    )

import torch.fx

from . import functional, nn, patching
from ._version import __version__
from .ops import (
    BlockMask,
    MaskTerm,
    RelativeBias,
    ScoreTerm,
    add_layer_norm,
    add_rms_norm,
    alibi_slopes,
    apply_rotary,
    apply_rotary_qk,
    attention,
    attention_varlen,
    attention_weights,
    backend,
    batch_invariant,
    cross_entropy,
    dropout,
    dropout_mask,
    gated_linear,
    geglu,
    glu,
    layer_norm,
    linear,
    linear_cross_entropy,
    log_softmax,
    matmul,
    reglu,
    rms_norm,
    softmax,
    swiglu,
)
from .ops.core.catalog import OPERATIONS as _OPERATIONS
from .patching import patch, unpatch

__all__ = [
    "BlockMask",
    "MaskTerm",
    "RelativeBias",
    "ScoreTerm",
    "__version__",
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
    "functional",
    "gated_linear",
    "geglu",
    "glu",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "log_softmax",
    "matmul",
    "nn",
    "patch",
    "patching",
    "reglu",
    "rms_norm",
    "softmax",
    "swiglu",
    "unpatch",
]

# For torch.fx a call of an op is one node, as a call of torch's own functions is.
for _name in _OPERATIONS:
    torch.fx.wrap(_name)
