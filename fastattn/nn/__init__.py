"""torch.nn with fastattn's modules in place of torch's: `import fastattn.nn as nn`.

Names that fastattn does not define are torch.nn's own.
"""

from typing import Any

import torch.nn

from .dropout import Dropout
from .loss import CrossEntropyLoss
from .norm import LayerNorm, RMSNorm
from .rotary import RotaryEmbedding
from .softmax import LogSoftmax, Softmax

__all__ = [
    "CrossEntropyLoss",
    "Dropout",
    "LayerNorm",
    "LogSoftmax",
    "RMSNorm",
    "RotaryEmbedding",
    "Softmax",
]


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return getattr(torch.nn, name)
