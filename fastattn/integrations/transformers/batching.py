"""Attention for continuous batching: sequences one after another, with keys of earlier calls.

transformers' cache either gathers the keys of all sequences before attention, or where each has one
new token, and the name says so, hands over its pages with a table of them.
"""

from typing import Any

import torch

from ...ops import append_kv, attention_varlen, decode_attention


def is_continued(query: torch.Tensor, key: torch.Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether packed sequences may have keys of earlier calls, which stand before the new ones."""
    return kwargs.get("read_index") is not None or query.shape[2] != key.shape[2]


def attend_continued(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cumulative: tuple[torch.Tensor, torch.Tensor],
    kwargs: dict[str, Any],
    *,
    sliding_window: int | None,
    dropout_p: float,
    **terms: Any,
) -> torch.Tensor:
    """Causal attention of each sequence's queries, its last tokens, to its own keys.

    Args:
        query: (1, H, T, Dk), of all sequences.
        key: (1, Hkv, S, Dk); with pages (1, Hkv, T, Dk), to be appended.
        value: as key.
        cumulative: (sequences + 1,) each: where queries and keys of each sequence begin and end.
            Sequences without queries, at the end, are padding.
        kwargs: `max_length_q` and `max_length_k`; or `block_table` (sequences, pages), `k_cache`
            and `v_cache` (pages, page, Hkv, D).
        sliding_window: how many keys a query sees, its own among them; None for all.
        dropout_p, terms: softcap, scale and sinks, as in `fastattn.attention_varlen`.

    Returns:
        (1, H, T, Dv).
    """
    of_queries, of_keys = (ends.int() for ends in cumulative)
    terms["causal"] = True
    terms["window"] = None if sliding_window is None else sliding_window - 1
    if kwargs.get("block_table") is not None:
        pages = kwargs["block_table"], kwargs["k_cache"], kwargs["v_cache"]
        return _attend_to_pages(query, key, value, of_keys, *pages, **terms)
    output = attention_varlen(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        of_queries,
        of_keys,
        int(kwargs.get("max_length_q") or query.shape[2]),
        int(kwargs.get("max_length_k") or key.shape[2]),
        dropout_p=dropout_p,
        **terms,
    )
    return output.transpose(0, 1)[None]


def _attend_to_pages(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    of_keys: torch.Tensor,
    block_table: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    **terms: Any,
) -> torch.Tensor:
    """The same where each sequence has one token, which is written into its page."""
    sequences = query.shape[2]
    lengths = of_keys.diff()[:sequences]
    # Padding has no keys and no pages: it does again what the first sequence does.
    place = torch.arange(sequences, device=query.device)
    place = torch.where(lengths > 0, place, 0)
    lengths, table = lengths[place], block_table[place]
    # (sequences, heads, 1, D)
    q, k, v = (x[0].transpose(0, 1)[place, :, None] for x in (query, key, value))
    caches = k_cache.transpose(1, 2), v_cache.transpose(1, 2)
    append_kv(*caches, k, v, lengths=lengths - 1, block_table=table)
    output = decode_attention(q, *caches, lengths=lengths, block_table=table, **terms)
    return output[:, :, 0].transpose(0, 1)[None]
