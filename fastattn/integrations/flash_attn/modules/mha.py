"""Multi-head attention of flash_attn.modules.mha: its parameters, and the core of its options."""

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .... import ops
from ....nn import Linear
from ..arguments import part_packed, refuse
from ..attention import Window, flash_attn_func, flash_attn_varlen_func
from ..layers.rotary import RotaryEmbedding


class FlashCrossAttention(nn.Module):
    """Attention of queries to keys and values that lie in one tensor, without parameters.

    Args:
        causal: a query sees no key after its own place.
        softmax_scale, alibi_slopes, window_size, deterministic: as in `flash_attn_func`.
        attention_dropout: its dropout_p, in training.

    Raises:
        TypeError, ValueError: as in `flash_attn_func`, when called.

    Source: flash_attn/modules/mha.py of flash-attn 2.8.

    Example:
        >>> FlashCrossAttention()(torch.randn(2, 3, 4, 8), torch.randn(2, 5, 2, 2, 8)).shape
        torch.Size([2, 3, 4, 8])
    """

    alibi_slopes: torch.Tensor | None

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        alibi_slopes: torch.Tensor | None = None,
        window_size: Window = (-1, -1),
        deterministic: bool = False,
    ) -> None:
        super().__init__()
        self.causal = causal
        self.softmax_scale = softmax_scale
        self.drop = nn.Dropout(attention_dropout)
        self.register_buffer("alibi_slopes", alibi_slopes, persistent=False)
        self.window_size = window_size
        self.deterministic = deterministic

    def forward(
        self,
        q: torch.Tensor,
        kv: torch.Tensor,
        causal: bool | None = None,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
        cu_seqlens_k: torch.Tensor | None = None,
        max_seqlen_k: int | None = None,
    ) -> torch.Tensor:
        """Attention of q (B, M, H, D) to kv (B, N, 2, Hkv, D), or of packed sequences of both.

        `causal` takes the place of the module's own. With cu_seqlens all of the lengths are needed,
        q is (T, H, D) and kv (S, 2, Hkv, D).
        """
        dim = 2 if cu_seqlens is None else 1
        k, v = part_packed("FlashCrossAttention", "kv", kv, 2, dim)
        lengths = () if cu_seqlens is None else (cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen_k)
        return self._attend(q, k, v, causal, lengths)

    def _attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        causal: bool | None,
        lengths: tuple[Any, ...],
    ) -> torch.Tensor:
        function: Any = flash_attn_varlen_func if lengths else flash_attn_func
        slopes = self.alibi_slopes
        return function(
            q,
            k,
            v,
            *lengths,
            dropout_p=self.drop.p if self.training else 0.0,
            softmax_scale=self.softmax_scale,
            causal=self.causal if causal is None else causal,
            window_size=self.window_size,
            alibi_slopes=None if slopes is None else slopes.float(),
        )


class FlashSelfAttention(FlashCrossAttention):
    """Attention of queries, keys and values that lie in one tensor, without parameters.

    Args:
        causal, softmax_scale, attention_dropout, window_size, alibi_slopes, deterministic: as in
            `FlashCrossAttention`.

    Raises:
        TypeError, ValueError: as in `flash_attn_func`, when called.

    Source: as `FlashCrossAttention`.

    Example:
        >>> FlashSelfAttention(causal=True)(torch.randn(2, 5, 3, 4, 8)).shape
        torch.Size([2, 5, 4, 8])
    """

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        window_size: Window = (-1, -1),
        alibi_slopes: torch.Tensor | None = None,
        deterministic: bool = False,
    ) -> None:
        super().__init__(
            causal, softmax_scale, attention_dropout, alibi_slopes, window_size, deterministic
        )

    def forward(
        self,
        qkv: torch.Tensor,
        causal: bool | None = None,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> torch.Tensor:
        """Attention of qkv (B, S, 3, H, D), or (T, 3, H, D) with cu_seqlens and max_seqlen."""
        dim = 2 if cu_seqlens is None else 1
        q, k, v = part_packed("FlashSelfAttention", "qkv", qkv, 3, dim)
        lengths = () if cu_seqlens is None else (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
        return self._attend(q, k, v, causal, lengths)


class MHA(nn.Module):
    """Multi-head attention with flash-attn's arguments and names of parameters.

    Args:
        embed_dim: C, the number of columns of input and output.
        num_heads: H, which divides it.
        num_heads_kv: Hkv, which divides H; None is H.
        cross_attn: keys and values come from another input, through projections of their own.
        qkv_proj_bias, out_proj_bias: whether the projections have biases.
        dropout: of attention's weights, in training.
        softmax_scale, window_size: as in `flash_attn_func`.
        causal: a query sees no key after its own place.
        rotary_emb_dim: how many columns of a head rotary positions turn; 0 is without.
        rotary_emb_base, rotary_emb_scale_base, rotary_emb_interleaved: as in `RotaryEmbedding`.
        use_alibi: scores lose slopes times the distance.
        return_residual: return the input as well.
        checkpointing: attention is computed again in the backward.
        layer_idx: is kept.
        fused_bias_fc, use_flash_attn: change nothing: what is computed is the same.
        dwconv: must be left out.
        device, dtype: of the parameters.

    Raises:
        ValueError: heads do not divide what they must.
        NotImplementedError: an option that is not supported is given; the message names it.

    Source: as `FlashCrossAttention`.

    Example:
        >>> MHA(32, 4, causal=True, rotary_emb_dim=8)(torch.randn(2, 5, 32)).shape
        torch.Size([2, 5, 32])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_heads_kv: int | None = None,
        cross_attn: bool = False,
        qkv_proj_bias: bool = True,
        out_proj_bias: bool = True,
        dropout: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        layer_idx: int | None = None,
        dwconv: bool = False,
        rotary_emb_dim: int = 0,
        rotary_emb_base: float = 10000.0,
        rotary_emb_scale_base: float | None = None,
        rotary_emb_interleaved: bool = False,
        use_alibi: bool = False,
        window_size: Window = (-1, -1),
        fused_bias_fc: bool = False,
        use_flash_attn: bool = False,
        return_residual: bool = False,
        checkpointing: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        refuse("MHA", dwconv=dwconv)
        if cross_attn and rotary_emb_dim > 0:
            raise NotImplementedError("MHA: rotary_emb_dim is not supported beside cross_attn")
        heads_kv = num_heads if num_heads_kv is None else num_heads_kv
        if embed_dim % num_heads or num_heads % heads_kv:
            raise ValueError(
                "MHA: num_heads must divide embed_dim, and num_heads_kv num_heads, "
                f"got {embed_dim}, {num_heads} and {heads_kv}"
            )
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_heads_kv = heads_kv
        self.head_dim = embed_dim // num_heads
        self.cross_attn = cross_attn
        self.causal = causal
        self.layer_idx = layer_idx
        self.rotary_emb_dim = rotary_emb_dim
        self.use_flash_attn = use_flash_attn
        self.return_residual = return_residual
        self.checkpointing = checkpointing
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        keys = 2 * heads_kv * self.head_dim
        if cross_attn:
            self.Wq = Linear(embed_dim, embed_dim, bias=qkv_proj_bias, **factory)
            self.Wkv = Linear(embed_dim, keys, bias=qkv_proj_bias, **factory)
        else:
            self.Wqkv = Linear(embed_dim, embed_dim + keys, bias=qkv_proj_bias, **factory)
        self.out_proj = Linear(embed_dim, embed_dim, bias=out_proj_bias, **factory)
        if rotary_emb_dim > 0:
            self.rotary_emb = RotaryEmbedding(
                rotary_emb_dim,
                rotary_emb_base,
                rotary_emb_interleaved,
                rotary_emb_scale_base,
                device,
            )
        slopes = ops.alibi_slopes(num_heads).to(device) if use_alibi else None
        self.inner_cross_attn = FlashCrossAttention(
            causal, softmax_scale, dropout, slopes, window_size
        )

    def forward(
        self,
        x: torch.Tensor,
        x_kv: torch.Tensor | None = None,
        key_padding_mask: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
        mixer_subset: Any = None,
        inference_params: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Attend.

        Args:
            x: (B, S, C), or (T, C) with cu_seqlens.
            x_kv: (B, N, C), what keys and values come from with cross_attn; None is x.
            cu_seqlens: (B + 1,) int32: where each packed sequence begins, and the last one's end.
            max_seqlen: the number of tokens of the longest sequence, or more.
            mixer_subset: with cross_attn, an index of those tokens of x that attend.
            key_padding_mask, inference_params: must be left out.
            kwargs: causal, which takes the place of the module's own; with cross_attn also
                cu_seqlens_k and max_seqlen_k.

        Returns:
            Shaped like x; with return_residual (that, x).

        Raises:
            NotImplementedError: an argument that must be left out is given.
        """
        refuse("MHA", key_padding_mask=key_padding_mask, inference_params=inference_params)
        if cu_seqlens is not None:
            refuse("MHA with cu_seqlens", rotary_emb_dim=self.rotary_emb_dim or None)
            kwargs |= {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
            if not self.cross_attn:
                kwargs |= {"cu_seqlens_k": cu_seqlens, "max_seqlen_k": max_seqlen}
        if self.cross_attn:
            q = self.Wq(x if mixer_subset is None else x[:, mixer_subset])
            kv = self.Wkv(x if x_kv is None else x_kv)
        else:
            refuse("MHA without cross_attn", x_kv=x_kv, mixer_subset=mixer_subset)
            # Slices, for what a split returns may not be written over.
            qkv = self.Wqkv(x)
            q, kv = qkv[..., : self.embed_dim], qkv[..., self.embed_dim :]
        q = q.unflatten(-1, (self.num_heads, self.head_dim))
        kv = kv.unflatten(-1, (2, self.num_heads_kv, self.head_dim))
        if self.rotary_emb_dim > 0:
            q, kv = self.rotary_emb(q, kv)
        if self.checkpointing:
            context = checkpoint(self.inner_cross_attn, q, kv, use_reentrant=False, **kwargs)
        else:
            context = self.inner_cross_attn(q, kv, **kwargs)
        out = self.out_proj(context.flatten(-2))
        return (out, x) if self.return_residual else out
