"""Attention of Hugging Face's models by `fastattn.attention`."""

from typing import Any

import torch

from ...ops import attention, attention_weights
from ...ops.attention.terms import CausalFromFirst
from .batching import attend_continued, is_continued
from .compact import CompactMask
from .documents import documents_of_lengths, documents_of_positions
from .masks import NO_DOCUMENT
from .steps import attend_in_step, is_step

WITHOUT_MEANING = {
    "cache_position",
    "logits_indices",
    "logits_processor_args",
    "num_items_in_batch",
    "seq_idx",
}
"""Tensors that models hand on to every layer and that say nothing to attention: `seq_idx` says
again what `position_ids` does, and others are for what comes behind the model."""

OF_PAGES = {"block_table", "k_cache", "v_cache"}
"""What continuous batching hands on, which means something beside the places of documents alone."""


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    *,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    output_attentions: bool | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention, as `transformers.AttentionInterface` asks for it.

    Without a mask it is causal if `is_causal` or else `module.is_causal` says so and there is more
    than one query, the first of which stands at the first key. Packed documents are found in
    `position_ids` where the mask says nothing of documents, so that tokens see their own alone in
    every model that hands positions on.

    Args:
        module: the model's attention.
        query: (B, H, M, Dk).
        key: (B, Hkv, N, Dk).
        value: (B, Hkv, N, Dv).
        attention_mask: a `CompactMask`; booleans, True where a query sees a key, or numbers that
            are added to the scores, (B or 1, H or 1, M or 1, N or more); or (B, N), 0 where a key
            is padding.
        dropout: the probability that a weight is zeroed.
        scaling: of the scores, Dk^-0.5 if None.
        is_causal: see above; means nothing with a mask of four dimensions.
        softcap: see `fastattn.attention`.
        s_aux: (H,), sinks as gpt-oss has them.
        sinks: (B, H, M, 1), a sink for each query, as Inkling has them.
        position_bias: (B or 1, H or 1, M, N or more), added to the scores; it has its gradient.
        position_ids: (B or 1, M).
        cu_seq_lens_q: (documents + 1,) places where packed documents begin and end, for B = 1.
        cu_seq_lens_k: the same of keys. Without a mask, and with more keys than queries, each
            document's queries are its last tokens, as in continuous batching; see `batching.py`.
        output_attentions: whether the weights are wanted.
        sliding_window: counts in continuous batching alone; elsewhere the mask has it.
        kwargs: what else a model hands on. Tensors among it are refused, for what they mean to the
            scores is not known.

    Returns:
        The output (B, M, H, Dv), and the weights (B, H, M, N) or None. Dropout is not in these.

    Raises:
        ValueError: an unknown tensor is handed on, or a shape does not fit.
    """
    cumulative = (cu_seq_lens_q, cu_seq_lens_k)
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    packed = cu_seq_lens_q is not None and cu_seq_lens_k is not None and attention_mask is None
    sink = None if s_aux is None else s_aux.flatten()
    continued = packed and causal and is_continued(query, key, kwargs)
    _refuse_unknown(module, kwargs, OF_PAGES if continued else set())
    if continued:
        _refuse_in_batches(sinks=sinks, position_bias=position_bias)
        output = attend_continued(
            query,
            key,
            value,
            cumulative,  # type: ignore[arg-type]
            kwargs,
            sliding_window=sliding_window,
            dropout_p=float(dropout),
            softcap=softcap,
            scale=scaling,
            sinks=sink,
        )
        return output.transpose(1, 2).contiguous(), None
    query, key, value = _same_batch(query, key, value)
    all_keys = key.shape[2]
    keys, terms = _read_mask(attention_mask, query.shape[2], all_keys, causal, position_bias)
    if terms["document_ids"] is None:
        if cu_seq_lens_q is not None and cu_seq_lens_k is not None:
            of_queries = documents_of_lengths(cu_seq_lens_q, query.shape[2])
            terms["document_ids"] = (of_queries, documents_of_lengths(cu_seq_lens_k, keys))
        elif terms["causal"] and query.shape[2] == keys:
            terms["document_ids"] = _documents_of_positions(position_ids, query.shape[0], keys)
    if keys < all_keys:
        key, value = key[:, :, :keys], value[:, :, :keys]
    own = {"softcap": softcap, "scale": scaling}
    with_lse = bool(output_attentions) or sinks is not None
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    if not (with_lse or learns or dropout) and is_step(query, keys, **terms):
        mask = None if terms.get("mask") is None else attention_mask
        output = attend_in_step(query, key, value, mask, sinks=sink, **own)
        return output.transpose(1, 2).contiguous(), None
    terms.update(own)
    result = attention(
        query,
        key,
        value,
        sinks=sink,
        dropout_p=float(dropout),
        return_lse=with_lse,
        **terms,
    )
    if not isinstance(result, tuple):
        return result.transpose(1, 2).contiguous(), None
    output, lse = result
    if sinks is not None:
        output, lse = _with_sinks(output, lse, sinks)
    weights = None
    if output_attentions:
        weights = attention_weights(query, key, lse, **terms)
        weights = torch.nn.functional.pad(weights, (0, all_keys - keys))
    return output.transpose(1, 2).contiguous(), weights


def _read_mask(
    attention_mask: torch.Tensor | None,
    queries: int,
    keys: int,
    causal: bool,
    position_bias: torch.Tensor | None,
) -> tuple[int, dict[str, Any]]:
    """How many of the keys count, and the arguments of `fastattn.attention` that a mask becomes."""
    terms: dict[str, Any] = {"causal": False, "document_ids": None}
    bias = position_bias
    if isinstance(attention_mask, CompactMask) and attention_mask.shape[3] == keys:
        keys = attention_mask.seen
        terms.update(causal=attention_mask.causal, window=attention_mask.window)
        if attention_mask.document_ids is not None:
            of_queries, of_keys = attention_mask.document_ids
            terms["document_ids"] = (of_queries, of_keys[:, :keys])
    elif attention_mask is not None and attention_mask.dim() == 4:
        mask = attention_mask[..., :keys]
        if mask.dtype is torch.bool:
            terms["mask"] = mask
        else:
            bias = mask if bias is None else bias[..., :keys] + mask
    else:
        # One query is the last of a text, and sees all that came before.
        causal = causal and queries > 1
        keys = min(keys, queries) if causal else keys
        if causal and queries > keys:
            terms["score_mods"] = [CausalFromFirst()]
        else:
            terms["causal"] = causal
        if attention_mask is not None:
            terms["document_ids"] = _documents_of_padding(attention_mask, queries, keys)
    if bias is not None:
        terms["bias"] = bias[..., :keys]
    return keys, terms


def _refuse_unknown(module: torch.nn.Module, kwargs: dict[str, Any], known: set[str]) -> None:
    """Raise an error for a tensor whose meaning to the scores is unknown."""
    for name, given in kwargs.items():
        if isinstance(given, torch.Tensor) and name not in WITHOUT_MEANING | known:
            raise ValueError(
                f"{type(module).__name__} hands {name}, a tensor {tuple(given.shape)}, to its "
                'attention, and attn_implementation="fastattn" does not know what it means: load '
                'this model with attn_implementation="eager"'
            )


def _refuse_in_batches(**terms: torch.Tensor | None) -> None:
    for name, term in terms.items():
        if term is not None:
            raise ValueError(f"{name} and continuous batching exclude each other")


def _same_batch(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All three of one batch, for a single one of queries or keys serves every other."""
    if query.shape[0] == key.shape[0]:
        return query, key, value
    batch = max(query.shape[0], key.shape[0])
    return tuple(x.expand(batch, -1, -1, -1) for x in (query, key, value))  # type: ignore[return-value]


def _documents_of_padding(
    attention_mask: torch.Tensor, queries: int, keys: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ids of queries and of keys, of which padding has one that no query has."""
    if attention_mask.dim() != 2 or attention_mask.shape[1] < keys:
        raise ValueError(
            f"attention_mask must have the shape (B, 1, M, N) or (B, N) with N = {keys}, got "
            f"{tuple(attention_mask.shape)}"
        )
    real = attention_mask[:, :keys].bool()
    of_queries = real.new_zeros((1, queries), dtype=torch.int32)
    of_keys = torch.where(real, 0, NO_DOCUMENT).int()
    return of_queries, of_keys


def _documents_of_positions(
    position_ids: torch.Tensor | None, batch: int, queries: int
) -> torch.Tensor | None:
    """The document of each token where positions of this shape tell."""
    if position_ids is None or position_ids.dim() != 2 or queries == 1:
        return None
    if position_ids.shape[1] != queries or position_ids.shape[0] not in (1, batch):
        return None
    return documents_of_positions(position_ids)


def _with_sinks(
    output: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What attention gives with one more score for each query, (B, H, M, 1), without a value."""
    sinks = sinks.to(lse.dtype)
    kept = (lse[..., None] - sinks).sigmoid()
    lse = torch.logaddexp(lse, sinks[..., 0])
    return (output * kept).to(output.dtype), lse
