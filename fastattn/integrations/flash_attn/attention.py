"""flash-attn's attention of queries, keys and values that are tensors of their own."""

from typing import Any

import torch

from ...ops import attention, attention_varlen
from .arguments import (
    BHSD,
    THD,
    check_layout,
    read_length,
    read_softcap,
    read_window,
)
from .pages import attend_to_pages

Window = tuple[int, int]


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Attention with the heads last but one, by flash-attn's name and arguments.

    The last query stands at the last key, as in flash-attn since 2.1. A query that sees no key gets
    output 0, and an lse of -inf, where flash-attn has +inf.

    Args:
        q: (B, M, H, Dk), float16, bfloat16, float32 or float64. Transposed views, not copies, go to
            `fastattn.attention`.
        k: (B, N, Hkv, Dk), of the dtype of q. Hkv divides H.
        v: (B, N, Hkv, Dv).
        dropout_p: the probability that a weight is zeroed, in [0, 1), with a seed from PyTorch's
            generator; to be 0 in evaluation.
        softmax_scale: the factor of the scores; None is Dk^-0.5.
        causal: a query sees no key after its own place.
        window_size: how many keys before and after its own place a query sees; -1 for all.
        softcap: scores become softcap * tanh(score / softcap); 0 for none.
        alibi_slopes: (H,) or (B, H); a score loses slope times the distance. They may learn.
        deterministic: changes nothing: gradients have the same bits every time.
        return_attn_probs: return lse as well.

    Returns:
        (B, M, H, Dv) in the dtype of q; with return_attn_probs (out, lse, None), lse being
        (B, H, M) in float32 (float64 for float64), which has its gradient too. The probabilities
        themselves, for tests alone in flash-attn, are not there: see `fastattn.attention_weights`.

    Raises:
        TypeError: an argument is no tensor or of an unsupported dtype.
        ValueError: a shape, device or value does not fit.

    Source: flash_attn/flash_attn_interface.py of flash-attn 2.8; the algorithm is that of Dao,
    "FlashAttention-2" (2023).

    Example:
        >>> q, k, v = (torch.randn(2, 5, 4, 16) for _ in range(3))
        >>> flash_attn_func(q, k, v, causal=True).shape
        torch.Size([2, 5, 4, 16])
    """
    op = "flash_attn_func"
    check_layout(op, BHSD, q=q, k=k, v=v)
    out, lse = attention(
        *(x.transpose(1, 2) for x in (q, k, v)),
        causal=causal,
        window=read_window(op, window_size),
        softcap=read_softcap(softcap),
        alibi_slopes=alibi_slopes,
        dropout_p=dropout_p,
        scale=softmax_scale,
        return_lse=True,
    )
    out = out.transpose(1, 2)
    return (out, lse, None) if return_attn_probs else out


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int | torch.Tensor,
    max_seqlen_k: int | torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None,
) -> Any:
    """Attention of sequences packed one after another, by flash-attn's name and arguments.

    Args:
        q: (T, H, Dk), the sequences' queries. Rows beyond the last sequence get output 0.
        k: (S, Hkv, Dk), their keys; with `block_table` (pages, page, Hkv, Dk), pages of any size.
        v: (S, Hkv, Dv), their values, or (pages, page, Hkv, Dv).
        cu_seqlens_q: (B + 1,) int32: where each sequence begins in q, and the end of the last one.
        cu_seqlens_k: (B + 1,) int32: the same for k and v.
        max_seqlen_q: the number of queries of the longest sequence, or more. A tensor of one
            element is read, which waits for its device.
        max_seqlen_k: the same for keys.
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic: as in
            `flash_attn_func`.
        return_attn_probs: return lse as well.
        block_table: (B, pages of a sequence) int32: in which pages each sequence's keys lie, of
            which there are as many as cu_seqlens_k says. There is no dropout then.

    Returns:
        (T, H, Dv) in the dtype of q; with return_attn_probs (out, lse, None), lse being (H, T).
        With a block_table gradients are the reference's, where flash-attn has none.

    Raises:
        TypeError: an argument is no tensor or of an unsupported dtype.
        ValueError: a shape, device or value does not fit.

    Source: as `flash_attn_func`.

    Example:
        >>> q, k, v = (torch.randn(5, 4, 16) for _ in range(3))
        >>> ends = torch.tensor([0, 2, 5], dtype=torch.int32)
        >>> flash_attn_varlen_func(q, k, v, ends, ends, 3, 3, causal=True).shape
        torch.Size([5, 4, 16])
    """
    op = "flash_attn_varlen_func"
    longest = read_length(op, "max_seqlen_q", max_seqlen_q)
    longest_keys = read_length(op, "max_seqlen_k", max_seqlen_k)
    options: dict[str, Any] = {
        "causal": causal,
        "window": read_window(op, window_size),
        "softcap": read_softcap(softcap),
        "alibi_slopes": alibi_slopes,
        "dropout_p": dropout_p,
        "scale": softmax_scale,
    }
    ends = (cu_seqlens_q, cu_seqlens_k)
    if block_table is not None:
        check_layout(op, THD, q=q)
        out, lse = attend_to_pages(op, q, k, v, *ends, longest, block_table, **options)
    else:
        check_layout(op, THD, q=q, k=k, v=v)
        out, lse = attention_varlen(
            q, k, v, *ends, longest, longest_keys, return_lse=True, **options
        )
    return (out, lse, None) if return_attn_probs else out
