"""torch.nn with fastattn's modules in place of torch's: `import fastattn.nn as nn`.

Names that fastattn does not define are torch.nn's own.
"""

from typing import Any

import torch.nn

from .dropout import Dropout
from .linear import Linear
from .loss import CrossEntropyLoss, LinearCrossEntropyLoss
from .mlp import MLP, GatedMLP
from .norm import LayerNorm, RMSNorm
from .rotary import RotaryEmbedding
from .softmax import LogSoftmax, Softmax

__all__ = [
    "MLP",
    "CrossEntropyLoss",
    "Dropout",
    "GatedMLP",
    "LayerNorm",
    "Linear",
    "LinearCrossEntropyLoss",
    "LogSoftmax",
    "RMSNorm",
    "RotaryEmbedding",
    "Softmax",
]


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return getattr(torch.nn, name)
