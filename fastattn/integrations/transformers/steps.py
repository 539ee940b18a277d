"""A few new queries of each sequence, and the keys of a cache that may have room for more."""

from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary
from transformers.utils.import_utils import is_tracing

from ...kernels.private import version_of
from ...ops import decode_attention
from ...ops.attention.terms import BooleanMask
from ...ops.core.sharding import is_distributed

FEW_QUERIES = 16
"""Up to so many new queries keys are read by `decode_attention`, and masks are dense."""

# Of masks that all layers of a forward pass get, each asked about once.
_known = WeakIdKeyDictionary()


def is_step(query: torch.Tensor, keys: int, mask: torch.Tensor | None = None, **terms: Any) -> bool:
    """Whether these are queries for `attend_in_step`.

    Args:
        query: (B, H, M, Dk).
        keys: N.
        mask: booleans of four dimensions, or None if all keys are seen.
        terms: others of `fastattn.attention`, none of which is to count.
    """
    queries = query.shape[2]
    if queries > FEW_QUERIES or queries >= keys or (mask is None and queries > 1):
        return False
    return all(term is None or term is False for term in terms.values()) and not is_distributed(
        query
    )


def attend_in_step(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **terms: Any,
) -> torch.Tensor:
    """Attention that reads no key behind the last that a mask shows: (B, H, M, Dv).

    How many there are is found on the device, of a static cache too.

    Args:
        query, key, value: (B, heads, M or N, D).
        attention_mask: booleans (B or 1, H or 1, M or 1, N or more), True where a query sees a key;
            None if all are seen.
        terms: softcap, scale and sinks of `fastattn.decode_attention`.
    """
    batch, keys = query.shape[0], key.shape[2]
    if attention_mask is None:
        lengths = torch.full((batch,), keys, dtype=torch.int32, device=query.device)
        masks = []
    else:
        lengths = _count_shown(attention_mask, keys).expand(batch)
        masks = [BooleanMask(attention_mask[..., :keys])]
    return decode_attention(
        query, key, value, lengths=lengths, causal=False, score_mods=masks, **terms
    )


def _count_shown(mask: torch.Tensor, keys: int) -> torch.Tensor:
    """(B or 1,): up to which of its keys a sequence sees any."""
    if is_tracing(mask) or mask.is_inference():
        return _find_last(mask, keys)
    version = version_of(mask), keys
    known = _known.get(mask)
    if known is None or known[0] != version:
        known = (version, _find_last(mask, keys))
        _known[mask] = known
    return known[1]


def _find_last(mask: torch.Tensor, keys: int) -> torch.Tensor:
    shown = mask[..., :keys].flatten(1, 2).any(1)
    numbers = torch.arange(1, keys + 1, dtype=torch.int32, device=mask.device)
    return torch.where(shown, numbers, 0).amax(-1)
