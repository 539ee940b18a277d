"""Transformer building blocks as Triton kernels with exact, hand-written gradients."""

from ._version import __version__
from .ops import (
    add_layer_norm,
    add_rms_norm,
    backend,
    dropout,
    dropout_mask,
    layer_norm,
    rms_norm,
)

__all__ = [
    "__version__",
    "add_layer_norm",
    "add_rms_norm",
    "backend",
    "dropout",
    "dropout_mask",
    "layer_norm",
    "rms_norm",
]
