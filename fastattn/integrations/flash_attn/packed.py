"""flash-attn's attention of queries, keys and values that lie in one tensor, or keys and values.

Each part is a view, so forward nothing is copied. The gradient arrives in one tensor too, into
which autograd copies those of the parts once.
"""

from typing import Any

import torch

from .arguments import part_packed
from .attention import Window, flash_attn_func, flash_attn_varlen_func


def flash_attn_qkvpacked_func(
    qkv: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` of queries, keys and values in one tensor.

    Args:
        qkv: (B, S, 3, H, D).
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
            return_attn_probs: as in `flash_attn_func`.

    Returns:
        (B, S, H, D), or (out, lse, None), as `flash_attn_func`.

    Raises:
        TypeError, ValueError: as `flash_attn_func`.

    Source: flash_attn/flash_attn_interface.py of flash-attn 2.8.

    Example:
        >>> flash_attn_qkvpacked_func(torch.randn(2, 5, 3, 4, 16), causal=True).shape
        torch.Size([2, 5, 4, 16])
    """
    q, k, v = part_packed("flash_attn_qkvpacked_func", "qkv", qkv, 3, 2)
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_kvpacked_func(
    q: torch.Tensor,
    kv: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` of keys and values in one tensor.

    Args:
        q: (B, M, H, D).
        kv: (B, N, 2, Hkv, D).
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
            return_attn_probs: as in `flash_attn_func`.

    Returns:
        (B, M, H, D), or (out, lse, None), as `flash_attn_func`.

    Raises:
        TypeError, ValueError: as `flash_attn_func`.

    Source: as `flash_attn_qkvpacked_func`.

    Example:
        >>> flash_attn_kvpacked_func(torch.randn(2, 3, 4, 16), torch.randn(2, 5, 2, 2, 16)).shape
        torch.Size([2, 3, 4, 16])
    """
    k, v = part_packed("flash_attn_kvpacked_func", "kv", kv, 2, 2)
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_varlen_qkvpacked_func(
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int | torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_varlen_func` of queries, keys and values in one tensor.

    Args:
        qkv: (T, 3, H, D).
        cu_seqlens: (B + 1,) int32: where each sequence begins, and the end of the last one.
        max_seqlen: the number of tokens of the longest sequence, or more.
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
            return_attn_probs: as in `flash_attn_func`.

    Returns:
        (T, H, D), or (out, lse, None), as `flash_attn_varlen_func`.

    Raises:
        TypeError, ValueError: as `flash_attn_varlen_func`.

    Source: as `flash_attn_qkvpacked_func`.

    Example:
        >>> ends = torch.tensor([0, 2, 5], dtype=torch.int32)
        >>> flash_attn_varlen_qkvpacked_func(torch.randn(5, 3, 4, 16), ends, 3).shape
        torch.Size([5, 4, 16])
    """
    q, k, v = part_packed("flash_attn_varlen_qkvpacked_func", "qkv", qkv, 3, 1)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_varlen_kvpacked_func(
    q: torch.Tensor,
    kv: torch.Tensor,
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
) -> Any:
    """`flash_attn_varlen_func` of keys and values in one tensor.

    Args:
        q: (T, H, D).
        kv: (S, 2, Hkv, D).
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k: as in `flash_attn_varlen_func`.
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
            return_attn_probs: as in `flash_attn_func`.

    Returns:
        (T, H, D), or (out, lse, None), as `flash_attn_varlen_func`.

    Raises:
        TypeError, ValueError: as `flash_attn_varlen_func`.

    Source: as `flash_attn_qkvpacked_func`.

    Example:
        >>> ends = torch.tensor([0, 2, 5], dtype=torch.int32)
        >>> q, kv = torch.randn(5, 4, 16), torch.randn(5, 2, 2, 16)
        >>> flash_attn_varlen_kvpacked_func(q, kv, ends, ends, 3, 3).shape
        torch.Size([5, 4, 16])
    """
    k, v = part_packed("flash_attn_varlen_kvpacked_func", "kv", kv, 2, 1)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )
