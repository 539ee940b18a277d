"""Who else attends to caches, where it is installed. None of them has a backward.

What calls these packages was written by their sources and has not been run: they need a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def flash_attention() -> Callable[..., Any]:
    """flash-attn's, of caches of queries; its pages are of 256 keys."""
    from flash_attn import flash_attn_with_kvcache  # type: ignore[import-not-found]

    return by_flash(flash_attn_with_kvcache, "block_table")


def flash_attention_3() -> Callable[..., Any]:
    """The same of flash-attn 3, which has pages of any size."""
    from flash_attn_interface import flash_attn_with_kvcache  # type: ignore[import-not-found]

    return by_flash(flash_attn_with_kvcache, "page_table")


def by_flash(attention: Callable[..., Any], table: str) -> Callable[..., Any]:
    """A function of flash-attn's that calls a table of pages so."""

    def decode(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        lengths: torch.Tensor,
        block_table: torch.Tensor | None = None,
    ) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        pages = {} if block_table is None else {table: block_table}
        return attention(q, k, v, cache_seqlens=lengths, **pages).transpose(1, 2)

    return decode


def varlen_attention() -> Callable[..., Any]:
    """PyTorch's own attention to pages."""
    from torch.nn.attention.varlen import varlen_attn

    def decode(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        lengths: torch.Tensor,
        block_table: torch.Tensor,
    ) -> torch.Tensor:
        batch, heads, _, dim = q.shape
        starts = torch.arange(batch + 1, dtype=torch.int32, device=q.device)
        keys = block_table.shape[1] * k.shape[2]
        o = varlen_attn(
            q.view(batch, heads, dim),
            k.transpose(1, 2),
            v.transpose(1, 2),
            starts,
            None,
            1,
            keys,
            enable_gqa=True,
            seqused_k=lengths,
            block_table=block_table,
        )
        assert isinstance(o, torch.Tensor)
        return o.view(batch, heads, 1, -1)

    return decode


WORKSPACE = 128 * 2**20
"""Bytes that FlashInfer is given for its plans and partial results."""


def flashinfer_attention() -> Callable[..., Any]:
    """FlashInfer's, which plans on the host: once for each table here, as for a model's layers."""
    from flashinfer import (  # type: ignore[import-not-found]
        BatchDecodeWithPagedKVCacheWrapper,
    )

    plans: dict[int, Any] = {}

    def decode(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        lengths: torch.Tensor,
        block_table: torch.Tensor,
    ) -> torch.Tensor:
        key = block_table.data_ptr()
        if key not in plans:
            plans[key] = plan(q, k, lengths, block_table)
        return plans[key].run(q.squeeze(2), (k, v)).unsqueeze(2)

    def plan(
        q: torch.Tensor, k: torch.Tensor, lengths: torch.Tensor, block_table: torch.Tensor
    ) -> Any:
        (_, heads, _, dim), (_, key_heads, page, _) = q.shape, k.shape
        pages = (lengths + page - 1) // page
        ends = torch.cat((pages.new_zeros(1), pages.cumsum(0))).int()
        place = torch.arange(block_table.shape[1], device=q.device)
        used = block_table[place < pages[:, None]]
        last = (lengths - 1) % page + 1
        workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device=q.device)
        made = BatchDecodeWithPagedKVCacheWrapper(workspace, "HND")
        types = {"q_data_type": q.dtype, "data_type": k.dtype}
        made.plan(ends, used, last.int(), heads, key_heads, dim, page, **types)
        return made

    return decode


MLA_PAGE = 64
"""Keys of a page, of which FlashMLA has one size."""


def flash_mla_attention() -> Callable[..., Any]:
    """FlashMLA's; a cache that lies in a row is pages in their order."""
    from flash_mla import (  # type: ignore[import-not-found]
        flash_mla_with_kvcache,
        get_mla_metadata,
    )

    plans: dict[int, Any] = {}

    def decode(
        q: torch.Tensor, k: torch.Tensor, value_dim: int, lengths: torch.Tensor
    ) -> torch.Tensor:
        batch, heads, _, dim = q.shape
        key = lengths.data_ptr()
        if key not in plans:
            count = batch * k.shape[2] // MLA_PAGE
            table = torch.arange(count, dtype=torch.int32, device=q.device).view(batch, -1)
            plans[key] = table, *get_mla_metadata(lengths, heads, 1)
        table, metadata, splits = plans[key]
        pages = k.view(-1, MLA_PAGE, 1, dim)
        o, _ = flash_mla_with_kvcache(
            q.transpose(1, 2), pages, table, lengths, value_dim, metadata, splits
        )
        return o.transpose(1, 2)

    return decode


OF_CACHES = {"flash-attn": flash_attention, "flash-attn 3": flash_attention_3}
OF_PAGES = {**OF_CACHES, "varlen_attn": varlen_attention, "FlashInfer": flashinfer_attention}
OF_LATENTS = {"FlashMLA": flash_mla_attention}
