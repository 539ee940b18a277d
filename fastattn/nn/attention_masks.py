"""What torch.nn.MultiheadAttention's masks mean to attention, and attention under them."""

import functools
import operator
import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .. import functional, ops
from ..ops.attention.arguments import WIDEST_HEAD
from ..ops.attention.bias_terms import AdditiveBias
from ..ops.attention.terms import BooleanMask, CausalFromFirst, Term


class Masks(NamedTuple):
    """The masks of a call as attention takes them; each broadcasts to (B, H, L, S).

    Attributes:
        keep: booleans, True where a query sees a key; it sees what all of them keep.
        bias: floats that are added to the scores.
    """

    keep: list[torch.Tensor]
    bias: list[torch.Tensor]

    def make_terms(self) -> list[Term]:
        """The terms of `fastattn.attention`, which reads each mask where it lies."""
        return [
            *(AdditiveBias(bias) for bias in self.bias),
            *(BooleanMask(keep) for keep in self.keep),
        ]

    def join_masks(self, dtype: torch.dtype) -> torch.Tensor | None:
        """The one mask of torch's scaled_dot_product_attention."""
        keep = functools.reduce(operator.and_, self.keep) if self.keep else None
        if not self.bias:
            return keep
        bias = functools.reduce(operator.add, self.bias).to(dtype)
        return bias if keep is None else torch.where(keep, bias, float("-inf"))

    def add_to_scores(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores (B, H, L, S) with the biases added, -inf where a key is not seen."""
        for bias in self.bias:
            scores = scores + bias.to(scores.dtype)
        for keep in self.keep:
            scores = torch.where(keep, scores, float("-inf"))
        return scores


def collect_masks(
    attn_mask: torch.Tensor | None,
    key_padding_mask: torch.Tensor | None,
    heads: int,
    added_keys: int = 0,
) -> Masks:
    """torch's masks, whose booleans are True where a key is masked, as attention takes them.

    Args:
        attn_mask: (L, S), (B * heads, L, S) or None.
        key_padding_mask: (B, S), (S,) or None.
        heads: the number of heads.
        added_keys: keys beyond S, which every query sees.

    Returns:
        (1 or B, 1 or heads, 1 or L, S + added_keys) each, without a copy of what is the same for
        several batch elements, heads or queries.
    """
    found = Masks([], [])
    if attn_mask is None and key_padding_mask is None:
        return found
    if attn_mask is not None:
        if key_padding_mask is not None and attn_mask.dtype is not key_padding_mask.dtype:
            warnings.warn(
                "Support for mismatched key_padding_mask and attn_mask is deprecated. "
                "Use same type for both instead.",
                stacklevel=2,
            )
        attn_mask = (
            attn_mask[None, None] if attn_mask.dim() == 2 else attn_mask.unflatten(0, (-1, heads))
        )
    if key_padding_mask is not None:
        key_padding_mask = key_padding_mask.view(-1, 1, 1, key_padding_mask.shape[-1])
    for mask in (attn_mask, key_padding_mask):
        if mask is None:
            continue
        if added_keys:
            mask = F.pad(mask, (0, added_keys))
        if mask.dtype is torch.bool:
            found.keep.append(~mask)
        else:
            found.bias.append(mask)
    return found


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    masks: Masks,
    causal: bool,
    dropout_p: float,
    kernels: bool,
) -> torch.Tensor:
    """softmax(q k^T / sqrt(D) and masks) v, (B, H, L, D); 0 for queries without keys."""
    if not kernels or dropout_p == 1.0 or max(q.shape[-1], v.shape[-1]) > WIDEST_HEAD:
        mask = masks.join_masks(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, mask, dropout_p, causal)
    terms = masks.make_terms()
    if causal:
        terms.append(CausalFromFirst())
    return ops.attention(q, k, v, dropout_p=dropout_p, score_mods=terms)


def attend_with_weights(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, masks: Masks, dropout_p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attend` by kernels, and the weights (B, H, L, S) after dropout.

    Queries without keys have NaN for weights, as in torch.
    """
    scores = masks.add_to_scores(ops.matmul(q * q.shape[-1] ** -0.5, k.mT))
    # torch's autocast has softmax in float32 on a GPU, and the product after it not.
    wide = torch.float32 if q.is_cuda and torch.is_autocast_enabled("cuda") else None
    weights = functional.dropout(ops.softmax(scores, dtype=wide), dropout_p)
    return ops.matmul(weights, v), weights
