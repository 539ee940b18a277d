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
    add_layer_norm,
    add_rms_norm,
    apply_rotary,
    apply_rotary_qk,
    backend,
    cross_entropy,
    dropout,
    dropout_mask,
    geglu,
    glu,
    layer_norm,
    log_softmax,
    reglu,
    rms_norm,
    softmax,
    swiglu,
)

__all__ = [
    "__version__",
    "add_layer_norm",
    "add_rms_norm",
    "apply_rotary",
    "apply_rotary_qk",
    "backend",
    "cross_entropy",
    "dropout",
    "dropout_mask",
    "functional",
    "geglu",
    "glu",
    "layer_norm",
    "log_softmax",
    "nn",
    "reglu",
    "rms_norm",
    "softmax",
    "swiglu",
]
