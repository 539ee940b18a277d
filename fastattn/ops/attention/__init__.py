"""Attention: the op, its variants, and the terms of its scores and masks."""

from .attention import attention
from .bias_terms import RelativeBias, alibi_slopes
from .block_terms import BlockMask
from .checkpointing import save_attention
from .python_terms.block_masks import create_block_mask
from .python_terms.terms import and_masks, mask_mod, or_masks, score_mod
from .relative_shift import RelativeShift
from .terms import MaskTerm, ScoreTerm
from .triangle import triangle_attention
from .varlen import attention_varlen
from .weights import attention_weights

__all__ = [
    "BlockMask",
    "MaskTerm",
    "RelativeBias",
    "RelativeShift",
    "ScoreTerm",
    "alibi_slopes",
    "and_masks",
    "attention",
    "attention_varlen",
    "attention_weights",
    "create_block_mask",
    "mask_mod",
    "or_masks",
    "save_attention",
    "score_mod",
    "triangle_attention",
]
