"""PyTorch's own functions, as they were when fastattn was imported.

Somebody may put ours in their place, as `torch.nn.functional.linear = fastattn.functional.linear`
does. What ours is made of must not find ours there.
"""

from torch.nn.functional import (
    cross_entropy,
    dropout,
    gelu,
    layer_norm,
    leaky_relu,
    linear,
    log_softmax,
    relu,
    rms_norm,
    scaled_dot_product_attention,
    silu,
    softmax,
)

__all__ = [
    "cross_entropy",
    "dropout",
    "gelu",
    "layer_norm",
    "leaky_relu",
    "linear",
    "log_softmax",
    "relu",
    "rms_norm",
    "scaled_dot_product_attention",
    "silu",
    "softmax",
]
