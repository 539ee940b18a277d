"""The two functions of flash-attn that transformers keeps for a name with "flash" in it."""

import torch

from ...ops import attention, attention_varlen

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
    s_aux: torch.Tensor | None = None,
) -> torch.Tensor:
    """`fastattn.attention` with flash-attn's arguments.

    Args:
        q: (B, M, H, Dk).
        k: (B, N, Hkv, Dk).
        v: (B, N, Hkv, Dv).
        dropout_p: see `fastattn.attention`.
        softmax_scale: its `scale`.
        causal: see there.
        window_size: how many keys before and after its place a query sees; -1 for all.
        softcap: 0 for none.
        s_aux: its `sinks`, (H,).

    Returns:
        (B, M, H, Dv).
    """
    output = attention(
        *(x.transpose(1, 2) for x in (q, k, v)),
        causal=causal,
        window=_window(window_size),
        softcap=softcap or None,
        sinks=s_aux,
        dropout_p=dropout_p,
        scale=softmax_scale,
    )
    return output.transpose(1, 2)


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    s_aux: torch.Tensor | None = None,
) -> torch.Tensor:
    """`fastattn.attention_varlen` with flash-attn's arguments; q (T, H, Dk), the result (T, H, Dv).

    See `flash_attn_func` and `fastattn.attention_varlen`.
    """
    return attention_varlen(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        int(max_seqlen_q),
        int(max_seqlen_k),
        causal=causal,
        window=_window(window_size),
        softcap=softcap or None,
        sinks=s_aux,
        dropout_p=dropout_p,
        scale=softmax_scale,
    )


def _window(window_size: Window) -> tuple[int | None, int | None] | None:
    left, right = (None if reach < 0 else reach for reach in window_size)
    return None if left is None and right is None else (left, right)
