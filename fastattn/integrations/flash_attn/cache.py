"""flash-attn's attention to a cache of keys and values."""

from typing import Any

import torch

from ...ops import append_kv, apply_rotary, decode_attention
from .arguments import BHSD, check_layout, read_softcap, read_window
from .attention import Window


def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    cache_seqlens: int | torch.Tensor | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: torch.Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Attention to a cache of keys and values, to which k and v are appended first, in place.

    Args:
        q: (B, M, H, D), float16, bfloat16, float32 or float64.
        k_cache: (B, N, Hkv, D), or with `block_table` (pages, page, Hkv, D) of pages of any size.
            Beside flash-attn's dtypes it may be int8 or float8_e4m3fn, unscaled.
        v_cache: (B, N, Hkv, Dv), or (pages, page, Hkv, Dv).
        k: (B, new, Hkv, D), to be appended, or None.
        v: (B, new, Hkv, Dv).
        rotary_cos: (positions, R/2), by which q and k are turned: keys, and queries if `causal` or
            in a window, at the positions behind cache_seqlens; otherwise all queries at
            cache_seqlens. Positions count from cache_leftpad.
        rotary_sin: as rotary_cos.
        cache_seqlens: how many keys there are before, an integer or (B,); None for all of N.
        cache_batch_idx: (B,): which element of the cache is each sequence's.
        cache_leftpad: (B,): the first key of each sequence that counts.
        block_table: (B, pages of a sequence).
        softmax_scale: the factor of the scores; None is D^-0.5.
        causal: a query sees no key after its own place; the last query stands at the last key.
        window_size: how many keys before and after its own place a query sees; -1 for all.
        softcap: scores become softcap * tanh(score / softcap); 0 for none.
        rotary_interleaved: pairs are columns (2i, 2i + 1), or (i, i + R/2).
        alibi_slopes: (H,) or (B, H).
        num_splits: in how many parts the keys go; 0 for what fits the device.
        return_softmax_lse: return lse as well.

    Returns:
        (B, M, H, Dv) in the dtype of q; with return_softmax_lse (out, lse), lse being (B, H, M) in
        float32.

    Raises:
        TypeError: an argument is no tensor or of an unsupported dtype.
        ValueError: a shape, device or value does not fit; on a CPU also where there is no room.

    Source: flash_attn/flash_attn_interface.py of flash-attn 2.8.

    Example:
        >>> k_cache, v_cache = torch.zeros(2, 1, 16, 2, 8)
        >>> q, k, v = torch.randn(1, 1, 4, 8), *torch.randn(2, 1, 1, 2, 8)
        >>> flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=3).shape
        torch.Size([1, 1, 4, 8])
    """
    op = "flash_attn_with_kvcache"
    check_layout(op, BHSD, q=q, k_cache=k_cache, v_cache=v_cache)
    batch, queries = q.shape[:2]
    if cache_batch_idx is not None:
        if block_table is not None:
            raise ValueError(f"{op}: cache_batch_idx and block_table exclude each other")
        # A sequence whose keys lie in one page, the cache's element.
        block_table = cache_batch_idx[:, None]
    room = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    if cache_seqlens is None:
        cache_seqlens = room
    if not isinstance(cache_seqlens, torch.Tensor):
        cache_seqlens = torch.full((batch,), cache_seqlens, dtype=torch.int32, device=q.device)
    positions = cache_seqlens if cache_leftpad is None else cache_seqlens - cache_leftpad
    caches = k_cache.transpose(1, 2), v_cache.transpose(1, 2)
    window = read_window(op, window_size)
    lengths = cache_seqlens
    turned = {"cos": rotary_cos, "sin": rotary_sin, "interleaved": rotary_interleaved}
    q = q.transpose(1, 2)
    if k is not None or v is not None:
        check_layout(op, BHSD, k=k, v=v)  # type: ignore[arg-type]
        assert k is not None
        assert v is not None
        new = torch.arange(k.shape[1], device=q.device)
        append_kv(
            *caches,
            k.transpose(1, 2),
            v.transpose(1, 2),
            lengths=cache_seqlens,
            block_table=block_table,
            positions=positions[:, None] + new,
            **turned,
        )
        lengths = cache_seqlens + k.shape[1]
    if rotary_cos is not None:
        step = torch.arange(queries, device=q.device)
        if not causal and window is None:
            step = torch.zeros_like(step)
        q = apply_rotary(q, positions=positions[:, None] + step, **turned)
    out, lse = decode_attention(
        q,
        *caches,
        lengths=lengths,
        block_table=block_table,
        causal=causal,
        window=window,
        starts=cache_leftpad,
        softcap=read_softcap(softcap),
        alibi_slopes=alibi_slopes,
        scale=softmax_scale,
        splits=num_splits or None,
        return_lse=True,
    )
    out = out.transpose(1, 2)
    return (out, lse) if return_softmax_lse else out
