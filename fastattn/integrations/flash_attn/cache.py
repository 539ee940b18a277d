"""flash-attn's attention to a cache of keys and values: a name that says what is to come."""

from typing import Any

import torch

from .arguments import refuse_cache
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
    """Attention to a cache of keys and values, which is not there yet: importing it is no error.

    Raises:
        NotImplementedError: always; it names the op to come.

    Source: flash_attn/flash_attn_interface.py of flash-attn 2.8.

    Example:
        >>> flash_attn_with_kvcache(None, None, None)
        Traceback (most recent call last):
        NotImplementedError: flash_attn_with_kvcache: it needs attention to a cache of keys and \
values, the op decode_attention, which fastattn does not have yet; flash_attn_func with the keys \
and values so far computes the same
    """
    refuse_cache("flash_attn_with_kvcache", "it")
