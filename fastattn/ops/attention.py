"""Attention: softmax(terms(scale q k^T)) v, of one sequence a batch element."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .. import reference
from .attention_arguments import cast, check_qkv, composed_terms
from .attention_function import AttentionFunction, parted
from .attention_sharding import attention_of_shards
from .attention_terms import (
    Term,
    description,
)
from .backends import use_triton
from .catalog import Normal, Sample, operation
from .precision import product_precision, without_autocast
from .registration import call
from .sharding import is_distributed


def _reference_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    **terms: Any,
) -> Any:
    """`attention` by the reference."""
    composed = composed_terms("attention", q, q.shape[0], q.shape[2], k.shape[2], **terms)
    return reference.attention(q, k, v, scale=scale, return_lse=return_lse, **parted(composed))


def _prefix(length: int) -> Callable[[str | torch.device], torch.Tensor]:
    """For samples: key lengths of two batch elements, all of the keys and none of them."""
    return lambda device: torch.tensor([length, 0], device=device)


def random_mask(*shape: int) -> Callable[[str | torch.device], torch.Tensor]:
    """For samples: a mask that keeps three scores of five, but none of the first query's."""

    def make(device: str | torch.device) -> torch.Tensor:
        place = torch.arange(math.prod(shape)).reshape(shape)
        keep = place * 7919 % 5 < 3
        keep[..., 0, :] = False
        return keep.to(device)

    return make


def slopes(heads: int) -> Callable[[str | torch.device], torch.Tensor]:
    """For samples: ALiBi's slopes."""
    return lambda device: alibi_slopes(heads).to(device)


def alibi_slopes(num_heads: int) -> torch.Tensor:
    """The slopes of ALiBi for a number of heads: (num_heads,) float32 on the CPU.

    For a power of two H these are 2^(-8/H), 2^(-16/H), ..., 2^-8; for other numbers those of the
    next smaller power of two, followed by every second one of the next larger.

    Source: Press et al., "Train Short, Test Long" (2021).
    """
    if num_heads < 1:
        raise ValueError(f"alibi_slopes: num_heads must be positive, got {num_heads}")
    whole = 1 << (num_heads.bit_length() - 1)
    slopes = 2.0 ** (torch.arange(1, whole + 1) * (-8.0 / whole))
    between = 2.0 ** ((2 * torch.arange(num_heads - whole) + 1) * (-4.0 / whole))
    return torch.cat((slopes, between))


@operation(
    reference=_reference_attention,
    samples=(
        Sample("smallest", q=(1, 2, 3, 4), k=(1, 1, 5, 4), v=(1, 1, 5, 4), causal=True),
        Sample("causal", q=(1, 2, 70, 64), k=(1, 2, 70, 64), v=(1, 2, 70, 64), causal=True),
        Sample("full", q=(1, 2, 65, 32), k=(1, 2, 65, 32), v=(1, 2, 65, 32)),
        Sample(
            "cross, heads of 80 and 40, lse",
            q=(2, 4, 19, 80),
            k=(2, 2, 50, 80),
            v=(2, 2, 50, 40),
            return_lse=True,
        ),
        Sample(
            "more queries than keys",
            q=(1, 2, 50, 24),
            k=(1, 2, 19, 24),
            v=(1, 2, 19, 16),
            causal=True,
            return_lse=True,
        ),
        Sample(
            "window, one key head",
            q=(1, 4, 70, 32),
            k=(1, 1, 70, 32),
            v=(1, 1, 70, 32),
            causal=True,
            window=20,
        ),
        Sample(
            "window to both sides",
            q=(1, 2, 66, 16),
            k=(1, 2, 90, 16),
            v=(1, 2, 90, 16),
            window=[9, 4],
        ),
        Sample(
            "softcap and ALiBi",
            q=Normal((1, 4, 40, 32), scale=2.0),
            k=(1, 2, 40, 32),
            v=(1, 2, 40, 32),
            causal=True,
            softcap=4.0,
            alibi_slopes=slopes(4),
            scale=0.25,
            return_lse=True,
        ),
        Sample(
            "a mask for each head",
            q=(2, 2, 33, 32),
            k=(2, 1, 48, 32),
            v=(2, 1, 48, 32),
            mask=random_mask(2, 33, 48),
            return_lse=True,
        ),
        Sample(
            "key lengths",
            q=(2, 2, 20, 16),
            k=(2, 2, 37, 16),
            v=(2, 2, 37, 16),
            kv_lengths=_prefix(21),
            return_lse=True,
        ),
        Sample(
            "everything",
            q=(2, 4, 40, 48),
            k=(2, 2, 70, 48),
            v=(2, 2, 70, 96),
            causal=True,
            window=[30, 2],
            softcap=3.0,
            alibi_slopes=slopes(4),
            mask=random_mask(2, 1, 40, 70),
            kv_lengths=_prefix(60),
            return_lse=True,
        ),
        Sample("negative scale", q=(1, 1, 20, 16), k=(1, 1, 20, 16), v=(1, 1, 20, 16), scale=-0.5),
        Sample("one query", q=(2, 4, 1, 64), k=(2, 2, 45, 64), v=(2, 2, 45, 64), causal=True),
        Sample("no queries", q=(1, 2, 0, 16), k=(1, 2, 9, 16), v=(1, 2, 9, 16)),
        Sample("no keys", q=(1, 2, 9, 16), k=(1, 2, 0, 16), v=(1, 2, 0, 16), return_lse=True),
    ),
)
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    window: int | Sequence[int | None] | None = None,
    mask: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    kv_lengths: torch.Tensor | None = None,
    score_mods: Sequence[Term] = (),
    return_lse: bool = False,
) -> Any:
    """Attention: for each query, the mean of the values weighted by softmax of the scores.

    The score of a query and a key is scale q . k, to which apply in this order: `softcap`, ALiBi,
    `score_mods` in the order given, and all masks. A query that no mask leaves a key gets output 0,
    an lse of -inf and gradients of 0. Query i stands at key i + N - M: the last query at the last
    key. Query head h uses the key head h // (H // Hkv).

    Memory is linear in M + N but for what an explicit mask takes itself. Gradients have the same
    bits every time. Autocast applies as to a product.

    Args:
        q: (B, H, M, Dk), float16, bfloat16, float32 or float64. Read in place by any strides with
            a unit last one, as are k and v: (B, M, H, D) storage transposed, or slices of a packed
            projection, cost no copy.
        k: (B, Hkv, N, Dk), of the dtype of q. Hkv divides H.
        v: (B, Hkv, N, Dv).
        causal: a query sees no key after its own place.
        window: how many keys before its own place a query sees, or (before, after); None for all.
        mask: booleans that broadcast to (B, H, M, N), True where a query sees a key.
        alibi_slopes: (H,) or (B, H); the score loses slope times the distance from a query's place
            to the key. See `fastattn.alibi_slopes`.
        softcap: a positive number; scores become softcap * tanh(score / softcap).
        scale: Dk^-0.5 if None.
        kv_lengths: (B,) int32 or int64: the number of keys that count in each batch element. Places
            are those of all N keys.
        score_mods: terms of one's own, see `fastattn.ScoreTerm` and `fastattn.MaskTerm`.
        return_lse: return the logsumexp of each query's scores as well.

    Returns:
        o (B, H, M, Dv) in the dtype of q; with return_lse (o, lse), lse being (B, H, M) in float32
        (float64 for float64), to base e. Both are any number of times differentiable in q, k and v;
        masks, slopes and the tensors of terms get no gradient.

    Raises:
        TypeError: an argument is no tensor or of an unsupported dtype.
        ValueError: a shape, device or value does not fit.

    Source: Vaswani et al., "Attention Is All You Need" (2017); the algorithm is that of Dao,
    "FlashAttention-2" (2023); ALiBi of Press et al., "Train Short, Test Long" (2021).
    """
    op = "attention"
    check_qkv(op, q, k, v, "BHND")
    if is_distributed(q):
        options = {
            "causal": causal,
            "window": window,
            "softcap": softcap,
            "scale": scale,
            "return_lse": return_lse,
        }
        tensors = {"mask": mask, "alibi_slopes": alibi_slopes, "kv_lengths": kv_lengths}
        return attention_of_shards(attention, q, k, v, score_mods, tensors, options)
    q, k, v = cast(op, q, k, v)
    batch, queries, keys = q.shape[0], q.shape[2], k.shape[2]
    terms = composed_terms(
        op,
        q,
        batch,
        queries,
        keys,
        causal=causal,
        window=window,
        mask=mask,
        alibi_slopes=alibi_slopes,
        softcap=softcap,
        kv_lengths=kv_lengths,
        score_mods=score_mods,
    )
    if not use_triton(q):
        with without_autocast(q):
            return reference.attention(q, k, v, scale=scale, return_lse=return_lse, **parted(terms))
    o, lse = launch(q, k, v, None, None, queries, keys, terms, scale)
    return (o, lse) if return_lse else o


def launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    terms: Sequence[Term],
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(o, lse) by the kernels."""
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    settings = (
        max_seqlen_q,
        max_seqlen_k,
        scale,
        product_precision(q.dtype),
        description(terms, q.dtype),
        [number for term in terms for number in term.floats],
        [number for term in terms for number in term.integers],
    )
    tensors = [tensor for term in terms for tensor in term.tensors]
    # Only derivatives of gradients ask for the terms themselves, and there are none when compiling.
    kept = None if torch.compiler.is_compiling() else tuple(terms)
    return call(AttentionFunction, q, k, v, cu_seqlens_q, cu_seqlens_k, kept, settings, *tensors)
