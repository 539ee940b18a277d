"""Rotary positions, in place where flash-attn has them so: flash_attn.layers.rotary.

What is done in place is PyTorch's own copy into the tensor, of what `fastattn.apply_rotary`
returned. So autograd knows of it, also where the caller drops the result and goes on with the
tensor that was turned; and it refuses a leaf that wants a gradient, and what `unbind` returned.
"""

from typing import Any

import torch
from torch import nn

from ....ops import apply_rotary, apply_rotary_qk

Offsets = int | torch.Tensor


def apply_rotary_emb(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: Offsets = 0,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
) -> torch.Tensor:
    """Turn pairs of a head's columns by the angle of each token's position.

    Args:
        x: (B, S, H, D), or (T, H, D) with cu_seqlens; float16, bfloat16, float32 or float64.
        cos, sin: (positions, R/2), of any float dtype and without a gradient. The first R columns
            of a head are turned.
        interleaved: pairs are columns (2i, 2i + 1), otherwise (i, i + R/2).
        inplace: write the result over x.
        seqlen_offsets: the position of each sequence's first token, an int or (B,) int32 or int64.
        cu_seqlens: (B + 1,) int32: where each sequence begins in x, and the end of the last one.
        max_seqlen: is not needed.

    Returns:
        The turned tensor, shaped like x and of its dtype: x itself if in place. Differentiable.

    Raises:
        TypeError, ValueError: an argument does not fit, as in `fastattn.apply_rotary`. A position
            beyond the tables that only a tensor tells of comes out as NaN.

    Source: flash_attn/layers/rotary.py of flash-attn 2.8; Su et al., "RoFormer" (2021).

    Example:
        >>> x, angles = torch.tensor([[[[1.0, 2.0]]]]), torch.tensor([[torch.pi / 2]])
        >>> apply_rotary_emb(x, angles.cos(), angles.sin()).round().flatten().tolist()
        [-2.0, 1.0]
    """
    positions = _find_positions(x, seqlen_offsets, cu_seqlens)
    # Positions of packed tokens that a tensor says are each token's own already.
    cu_seqlens = None if isinstance(positions, torch.Tensor) else cu_seqlens
    turned = apply_rotary(
        x.transpose(-3, -2),
        cos,
        sin,
        interleaved=interleaved,
        positions=positions,
        cu_seqlens=cu_seqlens,
    ).transpose(-3, -2)
    return x.copy_(turned) if inplace else turned


def apply_rotary_emb_qkv_(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cos_k: torch.Tensor | None = None,
    sin_k: torch.Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: Offsets = 0,
    num_heads_q: int | None = None,
) -> torch.Tensor:
    """Turn queries and keys, which lie in one tensor with the values, in place.

    Args:
        qkv: (B, S, 3, H, D), or (B, S, H + 2 Hkv, D) with num_heads_q. It is written over.
        cos, sin: (positions, R/2).
        cos_k, sin_k: tables of the keys' own, or None for the same.
        interleaved, seqlen_offsets: as in `apply_rotary_emb`.
        num_heads_q: H, where heads of queries, keys and values lie in one dimension.

    Returns:
        qkv itself. Differentiable.

    Raises:
        TypeError, ValueError: an argument does not fit.
        RuntimeError: autograd does not allow qkv to be written over, as a leaf.

    Source: as `apply_rotary_emb`.

    Example:
        >>> qkv, angles = torch.ones(1, 1, 3, 1, 2), torch.tensor([[torch.pi / 2]])
        >>> apply_rotary_emb_qkv_(qkv, angles.cos(), angles.sin()).round().flatten().tolist()
        [-1.0, 1.0, -1.0, 1.0, 1.0, 1.0]
    """
    q, k = _part_queries_and_keys(qkv, num_heads_q)
    given: dict[str, Any] = {
        "interleaved": interleaved,
        "positions": _find_positions(q, seqlen_offsets, None),
    }
    q_heads, k_heads = q.transpose(1, 2), k.transpose(1, 2)
    if cos_k is None and sin_k is None:
        turned = apply_rotary_qk(q_heads, k_heads, cos, sin, **given)
    else:
        own = (cos if cos_k is None else cos_k, sin if sin_k is None else sin_k)
        turned = (
            apply_rotary(q_heads, cos, sin, **given),
            apply_rotary(k_heads, *own, **given),
        )
    q.copy_(turned[0].transpose(1, 2))
    k.copy_(turned[1].transpose(1, 2))
    return qkv


def apply_rotary_emb_kv_(
    kv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool = False,
    seqlen_offsets: Offsets = 0,
) -> torch.Tensor:
    """Turn keys, which lie in one tensor with the values, in place.

    Args:
        kv: (B, S, 2, Hkv, D). It is written over.
        cos, sin: (positions, R/2).
        interleaved, seqlen_offsets: as in `apply_rotary_emb`.

    Returns:
        kv itself. Differentiable.

    Raises:
        TypeError, ValueError: an argument does not fit.
        RuntimeError: autograd does not allow kv to be written over, as a leaf.

    Source: as `apply_rotary_emb`.

    Example:
        >>> kv, angles = torch.ones(1, 1, 2, 1, 2), torch.tensor([[torch.pi / 2]])
        >>> apply_rotary_emb_kv_(kv, angles.cos(), angles.sin()).round().flatten().tolist()
        [-1.0, 1.0, 1.0, 1.0]
    """
    if kv.ndim != 5 or kv.shape[2] != 2:
        raise ValueError(
            "apply_rotary_emb_kv_: kv must be (batch, length, 2, heads, head dimension), "
            f"got the shape {tuple(kv.shape)}"
        )
    apply_rotary_emb(kv[:, :, 0], cos, sin, interleaved, True, seqlen_offsets)
    return kv


def _part_queries_and_keys(
    qkv: torch.Tensor, num_heads_q: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of both, through which autograd knows what is written."""
    if qkv.ndim == 5 and qkv.shape[2] == 3:
        return qkv[:, :, 0], qkv[:, :, 1]
    both = 0 if num_heads_q is None or qkv.ndim != 4 else qkv.shape[2] - num_heads_q
    if num_heads_q is None or both <= 0 or both % 2:
        raise ValueError(
            "apply_rotary_emb_qkv_: qkv must be (batch, length, 3, heads, head dimension), or "
            "(batch, length, H + 2 Hkv, head dimension) with num_heads_q = H, "
            f"got the shape {tuple(qkv.shape)} and num_heads_q={num_heads_q}"
        )
    return qkv[:, :, :num_heads_q], qkv[:, :, num_heads_q : num_heads_q + both // 2]


def _find_positions(
    x: torch.Tensor, seqlen_offsets: Offsets, cu_seqlens: torch.Tensor | None
) -> torch.Tensor | int:
    """`positions` of `fastattn.apply_rotary`: of all tokens where each sequence has its offset."""
    if not isinstance(seqlen_offsets, torch.Tensor):
        return seqlen_offsets
    tokens = torch.arange(x.shape[-3], device=x.device)
    if cu_seqlens is None:
        return seqlen_offsets.long()[:, None] + tokens
    # Tokens beyond the last sequence count as its own.
    last = cu_seqlens.numel() - 2
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), tokens, right=True).clamp(max=last)
    return seqlen_offsets.long()[sequence] + tokens - cu_seqlens.long()[sequence]


apply_rotary_emb_func = apply_rotary_emb


class RotaryEmbedding(nn.Module):
    """Rotary positions of queries, keys and values in one tensor or two, in place.

    Args:
        dim: R, the number of columns of a head that are turned.
        base: the base of the frequencies.
        interleaved: pairs are columns (2i, 2i + 1), otherwise (i, i + R/2).
        scale_base: of xPos, which lets keys shrink and queries grow with distance; None is without.
        device: of the frequencies.

    Raises:
        TypeError, ValueError: as in `apply_rotary_emb_qkv_`, when called.

    Source: as `apply_rotary_emb`; xPos is that of Sun et al., "A Length-Extrapolatable
    Transformer" (2022).

    Example:
        >>> RotaryEmbedding(8)(torch.randn(2, 5, 3, 4, 16)).shape
        torch.Size([2, 5, 3, 4, 16])
    """

    inv_freq: torch.Tensor
    scale: torch.Tensor | None

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        device: Any = None,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.base = float(base)
        self.interleaved = interleaved
        self.scale_base = scale_base
        columns = torch.arange(0, dim, 2, device=device, dtype=torch.float32)
        self.register_buffer("inv_freq", self._make_frequencies(device), persistent=False)
        scale = None if scale_base is None else (columns + 0.4 * dim) / (1.4 * dim)
        self.register_buffer("scale", scale, persistent=False)
        # By flash-attn's names, which models of others read.
        self._seq_len_cached = 0
        self._cos_cached: torch.Tensor | None = None
        self._sin_cached: torch.Tensor | None = None
        self._cos_k_cached: torch.Tensor | None = None
        self._sin_k_cached: torch.Tensor | None = None

    def _make_frequencies(self, device: Any) -> torch.Tensor:
        columns = torch.arange(0, self.dim, 2, device=device, dtype=torch.float32)
        return self.base ** (-columns / self.dim)

    def _update_cos_sin_cache(
        self, seqlen: int, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        """Make tables of so many positions, unless there are such on this device and dtype."""
        made = self._cos_cached
        if made is not None and seqlen <= self._seq_len_cached:
            trainable = not (self.training and made.is_inference())
            if made.device == device and made.dtype is dtype and trainable:
                return
        self._seq_len_cached = seqlen
        places = torch.arange(seqlen, device=device, dtype=torch.float32)
        # In float32, whatever the model was moved to: 16 bits do not hold a large position.
        frequencies = self.inv_freq
        if frequencies.dtype is not torch.float32:
            frequencies = self._make_frequencies(device)
        angles = torch.outer(places, frequencies.to(device))
        cos, sin = angles.cos(), angles.sin()
        if self.scale is None or self.scale_base is None:
            self._cos_cached, self._sin_cached = cos.to(dtype), sin.to(dtype)
            return
        power = (places - seqlen // 2) / self.scale_base
        scale = self.scale.to(device=device, dtype=torch.float32) ** power[:, None]
        self._cos_cached, self._sin_cached = (cos * scale).to(dtype), (sin * scale).to(dtype)
        self._cos_k_cached, self._sin_k_cached = (cos / scale).to(dtype), (sin / scale).to(dtype)

    def forward(
        self,
        qkv: torch.Tensor,
        kv: torch.Tensor | None = None,
        seqlen_offset: Offsets = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
    ) -> Any:
        """Turn queries and keys in place.

        Args:
            qkv: as in `apply_rotary_emb_qkv_`; beside kv the queries alone, (B, S, H, D).
            kv: (B, S, 2, Hkv, D), or None.
            seqlen_offset: as seqlen_offsets there. With a tensor, max_seqlen says how many
                positions there are at most.
            max_seqlen: how many positions the tables shall have at least.
            num_heads_q: as there.

        Returns:
            qkv, or (q, kv).
        """
        if max_seqlen is None and not isinstance(seqlen_offset, torch.Tensor):
            max_seqlen = qkv.shape[1] + seqlen_offset
        if max_seqlen is not None:
            self._update_cos_sin_cache(max_seqlen, device=qkv.device, dtype=qkv.dtype)
        cos, sin = self._cos_cached, self._sin_cached
        if cos is None or sin is None:
            raise ValueError("RotaryEmbedding: a seqlen_offset in a tensor needs max_seqlen")
        cos_k, sin_k = self._cos_k_cached, self._sin_k_cached
        if kv is None:
            tables = (cos, sin, cos_k, sin_k)
            return apply_rotary_emb_qkv_(qkv, *tables, self.interleaved, seqlen_offset, num_heads_q)
        own = (cos if cos_k is None else cos_k, sin if sin_k is None else sin_k)
        return (
            apply_rotary_emb(qkv, cos, sin, self.interleaved, True, seqlen_offset),
            apply_rotary_emb_kv_(kv, *own, self.interleaved, seqlen_offset),
        )
