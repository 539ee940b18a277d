"""Transformer building blocks as Triton kernels with exact, hand-written gradients."""

import os

if os.path.isfile(os.path.join(os.path.dirname(__file__), "kernels")):
    raise ImportError(
        "fastattn/kernels is a text file where the repository has a symbolic link to ../kernels: "
        "check out again with `git config core.symlinks true`, or install fastattn with pip"
    )

from . import functional, nn
from ._version import __version__
from .ops import (
    MaskTerm,
    ScoreTerm,
    add_layer_norm,
    add_rms_norm,
    alibi_slopes,
    apply_rotary,
    apply_rotary_qk,
    attention,
    attention_varlen,
    backend,
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

__all__ = [
    "MaskTerm",
    "ScoreTerm",
    "__version__",
    "add_layer_norm",
    "add_rms_norm",
    "alibi_slopes",
    "apply_rotary",
    "apply_rotary_qk",
    "attention",
    "attention_varlen",
    "backend",
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
    "reglu",
    "rms_norm",
    "softmax",
    "swiglu",
]
