"""Attention of packed queries to keys and values in pages."""

import torch

from ...ops import decode_attention
from ...ops.attention.arguments import check_cumulative
from .arguments import check_layout

PAGES = ("pages", "page", "heads", "head dimension")

TILE = 64
"""Queries that are attended with together: as many of each sequence are padding at most."""


def attend_to_pages(
    op: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    block_table: torch.Tensor,
    *,
    causal: bool,
    window: tuple[int | None, int | None] | None,
    alibi_slopes: torch.Tensor | None,
    dropout_p: float,
    softcap: float | None,
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of packed sequences, each to the first keys of its pages.

    A sequence's queries go to `decode_attention` in tiles, the last of which ends at its last
    query: there are no more than the numbers of tokens and sequences allow, so that nothing waits.

    Args:
        op: whose arguments these are.
        q: (T, H, Dk).
        k, v: (pages, page, Hkv, D).
        cu_seqlens_q, cu_seqlens_k: (B + 1,), where queries and keys of each sequence would begin
            and end.
        max_seqlen_q: queries of the longest sequence, or more.
        block_table: (B, pages of a sequence).
        causal, window, alibi_slopes, dropout_p, softcap, scale: as in `fastattn.attention_varlen`.

    Returns:
        out (T, H, Dv) and lse (H, T), of rows beyond the last sequence 0 and -inf.

    Raises:
        TypeError: an argument is no tensor or of an unsupported dtype.
        ValueError: a shape does not fit, or there is dropout.
    """
    check_layout(op, PAGES, k=k, v=v)
    check_cumulative(op, "cu_seqlens_q", cu_seqlens_q, q, max_seqlen_q)
    tokens, batch = len(q), cu_seqlens_q.numel() - 1
    if cu_seqlens_k.shape != (batch + 1,) or block_table.shape[:-1] != (batch,):
        raise ValueError(
            f"{op}: block_table must be (B, pages) and cu_seqlens_k (B + 1,) for {batch} sequences,"
            f" got the shapes {tuple(block_table.shape)} and {tuple(cu_seqlens_k.shape)}"
        )
    if dropout_p:
        raise ValueError(f"{op}: dropout_p must be 0 with a block_table, got {dropout_p}")
    if tokens * batch == 0:
        statistics = torch.promote_types(q.dtype, torch.float32)
        lse = q.new_full((q.shape[1], tokens), float("-inf"), dtype=statistics)
        return q.new_zeros((tokens, q.shape[1], v.shape[3])), lse
    # A tile in front of others has fewer keys, which is where its queries stand if they are causal.
    alike = causal or (window is None and alibi_slopes is None)
    tile = max(min(max_seqlen_q, TILE) if alike else max_seqlen_q, 1)
    begins, ends = cu_seqlens_q[:-1].long(), cu_seqlens_q[1:].long()
    tiles_of = (ends - begins + tile - 1) // tile
    last_tiles = tiles_of.cumsum(0)

    number = torch.arange((tokens + batch * (tile - 1)) // tile, device=q.device)
    sequence = torch.searchsorted(last_tiles, number, right=True).clamp(max=batch - 1)
    behind = (last_tiles[sequence] - 1 - number) * tile
    token = (ends[sequence] - behind)[:, None] + torch.arange(-tile, 0, device=q.device)
    lengths = cu_seqlens_k.diff().long()[sequence] - (behind if causal else 0)
    lengths = torch.where(behind >= 0, lengths, 0).clamp(min=0)
    if alibi_slopes is not None and alibi_slopes.ndim == 2:
        alibi_slopes = alibi_slopes[sequence]
    out, lse = decode_attention(
        q[token.clamp(0, tokens - 1)].transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        lengths=lengths,
        block_table=block_table[sequence],
        causal=causal,
        window=window,
        alibi_slopes=alibi_slopes,
        softcap=softcap,
        scale=scale,
        return_lse=True,
    )

    token = torch.arange(tokens, device=q.device)
    sequence = torch.searchsorted(ends, token, right=True)
    beyond = sequence >= batch
    sequence = sequence.clamp(max=batch - 1)
    behind = (ends[sequence] - 1 - token).clamp(min=0)
    place = last_tiles[sequence] - 1 - behind // tile, tile - 1 - behind % tile
    out = out[place[0], :, place[1]].masked_fill(beyond[:, None, None], 0.0)
    lse = lse[place[0], :, place[1]].masked_fill(beyond[:, None], float("-inf"))
    return out, lse.T
