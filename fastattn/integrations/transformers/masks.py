"""Masks of Hugging Face's models in linear memory.

transformers makes the mask of a forward pass once for each kind of layer: it calls the registered
mask function with a mask as a Python function of indices, and hands what that returns to every
attention. Ours returns a `CompactMask`, a tensor that knows what it follows from, wherever that is
known: causal, a window, chunks, packed documents, padding. Everything else becomes a boolean tensor
(B, 1, M, N), as for PyTorch's own attention.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers.masking_utils import causal_mask_function, sdpa_mask
from transformers.utils.import_utils import is_tracing

from .compact import CompactMask, Ids, compact_mask
from .patterns import Pattern, find_pattern
from .steps import FEW_QUERIES

NO_DOCUMENT = -(2**31)
"""The id of keys that are padding, which no query has."""


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    config: Any = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """The mask of a forward pass, as `transformers.AttentionMaskInterface` asks for it.

    Args:
        batch_size: B.
        q_length: M.
        kv_length: N.
        q_offset: the place of the first query.
        kv_offset: the place of the first key.
        mask_function: (batch, head, query, key) -> whether the query sees the key.
        attention_mask: (B, S) booleans, False where a token is padding.
        local_size: the size of the window or chunk that `mask_function` has.
        allow_is_causal_skip: whether None may be returned for what is plainly causal.
        allow_is_bidirectional_skip: the same for what sees everything.
        use_vmap: whether `mask_function` takes single indices only.
        device: where the mask is made.
        config: the model's configuration.
        kwargs: other arguments of `transformers.masking_utils.sdpa_mask`.

    Returns:
        None where attention needs no mask, a `CompactMask` (B, 1, M, N) where what is seen is
        known, or a boolean tensor of that shape.
    """
    pattern = find_pattern(
        mask_function,
        local_size,
        use_vmap,
        allow_is_causal_skip,
        allow_is_bidirectional_skip,
        config,
    )
    seen = _find_seen(pattern, q_length, kv_length, q_offset, kv_offset)
    if pattern is not None and seen is not None:
        shape = (batch_size, 1, q_length, kv_length)
        mask = _make_mask(pattern, shape, seen, kv_offset, attention_mask, device)
        skip = allow_is_causal_skip if pattern.causal else allow_is_bidirectional_skip
        if skip and _is_plain(mask):
            return None
        # Of one query it is small, and read faster than its parts.
        return mask if q_length > 1 else mask.dense()
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,  # type: ignore[arg-type]
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False,
        use_vmap=use_vmap,
        device=device,
        config=config,
        **kwargs,
    )


def _find_seen(
    pattern: Pattern | None, queries: int, keys: int, q_offset: int | torch.Tensor, kv_offset: int
) -> int | None:
    """How many keys there are up to the last query's own; None where attention cannot tell."""
    if pattern is None:
        return None
    if isinstance(q_offset, torch.Tensor):
        # A static cache. Of few queries the mask is small, and their place need not be waited for.
        if queries <= FEW_QUERIES or is_tracing(q_offset):
            return None
        q_offset = int(q_offset)
    seen = q_offset - kv_offset + queries
    if pattern.causal and queries <= seen <= keys:
        return seen
    # Without an order or a place, all keys are alike.
    placeless = not pattern.causal and pattern.window is None and pattern.chunk is None
    return keys if placeless or seen == keys else None


def _make_mask(
    pattern: Pattern,
    shape: tuple[int, int, int, int],
    seen: int,
    kv_offset: int,
    attention_mask: torch.Tensor | None,
    device: torch.device | str,
) -> CompactMask:
    """The mask of a pattern and of padding, as far as either matters."""
    _, _, queries, keys = shape
    padding = None if attention_mask is None else _cut(attention_mask, keys, kv_offset)
    traced = is_tracing(padding)
    if padding is not None and not traced and bool(padding[:, :seen].all()):
        padding = None
    window = pattern.window
    # What is traced would hold for these lengths alone if the window were compared with them.
    if window is not None and not traced:
        reach = window[0] if pattern.causal else min(window)
        window = window if reach < seen - 1 else None
    ids: Ids | None = None
    if pattern.documents is not None:
        ids = (pattern.documents, pattern.documents)
    elif pattern.chunk is not None and (
        traced or padding is not None or kv_offset + seen > pattern.chunk
    ):
        ids = _chunk_ids(pattern.chunk, queries, keys, seen, kv_offset, attention_mask, device)
    if padding is not None:
        one = padding.new_zeros((1, max(queries, keys)), dtype=torch.int32)
        of_queries, of_keys = (one[:, :queries], one[:, :keys]) if ids is None else ids
        ids = (of_queries, torch.where(padding, of_keys, NO_DOCUMENT))
    return compact_mask(
        shape, device, causal=pattern.causal, window=window, document_ids=ids, seen=seen
    )


def _cut(attention_mask: torch.Tensor, keys: int, kv_offset: int) -> torch.Tensor:
    """Which of the keys are no padding: (B, N)."""
    missing = keys + kv_offset - attention_mask.shape[-1]
    if missing > 0:
        attention_mask = torch.nn.functional.pad(attention_mask, (0, missing))
    return attention_mask[:, kv_offset : kv_offset + keys].bool()


def _chunk_ids(
    chunk: int,
    queries: int,
    keys: int,
    seen: int,
    kv_offset: int,
    attention_mask: torch.Tensor | None,
    device: torch.device | str,
) -> Ids:
    """The number of each token's chunk, counted from the first token that is no padding."""
    places = torch.arange(keys, device=device)[None] + kv_offset
    if attention_mask is not None:
        left = (attention_mask.cumsum(-1) == 0).sum(-1, keepdim=True)
        places = places - left
    ids = (places // chunk).int()
    return ids[:, seen - queries : seen], ids


def _is_plain(mask: CompactMask) -> bool:
    """Whether attention without a mask sees the same."""
    if mask.document_ids is not None or mask.window is not None:
        return False
    queries, keys = mask.shape[2:]
    # Without a mask the first query stands at the first key, and one query alone sees all keys.
    return not mask.causal or mask.seen == (queries if queries > 1 else keys)
