"""torch.nn with fastattn's modules in place of torch's: `import fastattn.nn as nn`.

Names that fastattn does not define are torch.nn's own.
"""

from typing import TYPE_CHECKING, Any

import torch.nn

if TYPE_CHECKING:
    from torch.nn import *  # noqa: F403  # pyright: ignore[reportWildcardImportFromLibrary]

from .attention import Attention
from .block import TransformerBlock, TransformerStack, add_norm
from .cache import CacheStack, KVCache
from .context_cache import ContextCache, EncoderDecoderCache
from .dropout import Dropout
from .expert_parallel import shard_experts
from .experts import Experts, MixtureOfExperts, TopKRouter
from .latent_attention import LatentAttention
from .linear import Linear
from .lora import LoRALinear, apply_lora, lora_state_dict, merge_lora
from .loss import CrossEntropyLoss, LinearCrossEntropyLoss, LinearLogProb
from .mlp import MLP, GatedMLP
from .multihead_attention import MultiheadAttention
from .norm import GatedRMSNorm, LayerNorm, RMSNorm
from .page_table import OutOfPages
from .paged_cache import PagedKVCache
from .patches import PatchEmbedding
from .plain_experts import PlainExperts
from .positions import LearnedPositions, SinusoidalPositions
from .ring_cache import RingKVCache
from .rotary import RotaryEmbedding
from .score_positions import AlibiPositions, RelativePositionBias, ScorePositions
from .softmax import LogSoftmax, Softmax
from .transformer import (
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)

__all__ = [
    "MLP",
    "AlibiPositions",
    "Attention",
    "CacheStack",
    "ContextCache",
    "CrossEntropyLoss",
    "Dropout",
    "EncoderDecoderCache",
    "Experts",
    "GatedMLP",
    "GatedRMSNorm",
    "KVCache",
    "LatentAttention",
    "LayerNorm",
    "LearnedPositions",
    "Linear",
    "LinearCrossEntropyLoss",
    "LinearLogProb",
    "LoRALinear",
    "LogSoftmax",
    "MixtureOfExperts",
    "MultiheadAttention",
    "OutOfPages",
    "PagedKVCache",
    "PatchEmbedding",
    "PlainExperts",
    "RMSNorm",
    "RelativePositionBias",
    "RingKVCache",
    "RotaryEmbedding",
    "ScorePositions",
    "SinusoidalPositions",
    "Softmax",
    "TopKRouter",
    "Transformer",
    "TransformerBlock",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "TransformerStack",
    "add_norm",
    "apply_lora",
    "lora_state_dict",
    "merge_lora",
    "shard_experts",
]


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return getattr(torch.nn, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *(name for name in dir(torch.nn) if not name.startswith("_"))})
