"""Attention: softmax(terms(scale q k^T)) v, of one sequence a batch element or of packed ones."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .. import reference
from .arguments import check_float_tensor, check_shape
from .attention_function import AttentionFunction, parted
from .attention_sharding import attention_of_shards
from .attention_terms import (
    Alibi,
    BooleanMask,
    Causal,
    KeyLengths,
    MaskTerm,
    ScoreTerm,
    Softcap,
    Term,
    WindowLeft,
    WindowRight,
    description,
)
from .backends import use_triton
from .catalog import Normal, Sample, operation
from .precision import autocast, product_precision, without_autocast
from .products import check_same_dtype
from .registration import call
from .sharding import is_distributed

WIDEST_HEAD = 1024
"""The largest head dimension that the kernels have tiles for."""


def _terms(
    op: str,
    q: torch.Tensor,
    batch: int,
    queries: int,
    keys: int,
    *,
    causal: bool = False,
    window: int | Sequence[int | None] | None = None,
    mask: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    softcap: float | None = None,
    kv_lengths: torch.Tensor | None = None,
    score_mods: Sequence[Term] = (),
) -> list[Term]:
    """The terms that the arguments ask for, in the order in which they apply."""
    heads = q.shape[1]
    terms: list[Term] = []
    if softcap is not None:
        if not softcap > 0.0:
            raise ValueError(f"{op}: softcap must be positive, got {softcap}")
        terms.append(Softcap(softcap))
    if alibi_slopes is not None:
        _check_constant(op, "alibi_slopes", alibi_slopes, q)
        if alibi_slopes.shape not in ((heads,), (batch, heads)):
            raise ValueError(
                f"{op}: alibi_slopes must have shape ({heads},) or ({batch}, {heads}), "
                f"got {tuple(alibi_slopes.shape)}"
            )
        terms.append(Alibi(alibi_slopes))
    if not isinstance(score_mods, Sequence):
        raise TypeError(f"{op}: score_mods must be a sequence of terms, got {score_mods!r}")
    for term in score_mods:
        if not isinstance(term, ScoreTerm | MaskTerm):
            raise TypeError(f"{op}: score_mods must hold ScoreTerm and MaskTerm, got {term!r}")
        for tensor in term.tensors:
            _check_constant(op, f"score_mods: a tensor of {type(term).__name__}", tensor, q)
    terms.extend(score_mods)
    if causal:
        terms.append(Causal())
    left, right = _window(op, window)
    if left is not None:
        terms.append(WindowLeft(left))
    if right is not None:
        terms.append(WindowRight(right))
    if mask is not None:
        _check_constant(op, "mask", mask, q)
        if mask.dtype is not torch.bool:
            raise TypeError(f"{op}: mask must be boolean, True where attended, got {mask.dtype}")
        terms.append(
            BooleanMask(_four_dimensions(op, "mask", mask, q, batch, queries, keys), queries, keys)
        )
    if kv_lengths is not None:
        _check_constant(op, "kv_lengths", kv_lengths, q)
        if kv_lengths.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{op}: kv_lengths must be int32 or int64, got {kv_lengths.dtype}")
        check_shape(op, "kv_lengths", kv_lengths, (batch,))
        terms.append(KeyLengths(kv_lengths))
    return terms


def _check_constant(op: str, name: str, tensor: object, q: torch.Tensor) -> None:
    """A tensor on the device of q that asks for no gradient."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    if tensor.device != q.device:
        raise ValueError(f"{op}: {name} must be on {q.device}, got {tensor.device}")
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op}: {name} must not require a gradient, for it would get none")


def _window(op: str, window: int | Sequence[int | None] | None) -> tuple[int | None, int | None]:
    """How many keys to the left and to the right of its own place a query sees."""
    sides = window if isinstance(window, Sequence) else (window, None)
    if len(sides) != 2 or not all(side is None or isinstance(side, int) for side in sides):
        raise TypeError(f"{op}: window must be an integer, a pair of them, or None, got {window!r}")
    left, right = sides
    if min(left or 0, right or 0) < 0:
        raise ValueError(f"{op}: window must not be negative, got {window}")
    return left, right


def _four_dimensions(
    op: str, name: str, x: torch.Tensor, q: torch.Tensor, batch: int, queries: int, keys: int
) -> torch.Tensor:
    """`x` with leading dimensions of 1, checked to broadcast to (B, H, M, N)."""
    wanted = (batch, q.shape[1], queries, keys)
    full = x.reshape((1,) * (4 - x.dim()) + x.shape) if x.dim() < 4 else x
    fits = full.dim() == 4 and all(
        size in (1, want) for size, want in zip(full.shape, wanted, strict=True)
    )
    if not fits:
        raise ValueError(f"{op}: {name} must broadcast to {wanted}, got {tuple(x.shape)}")
    return full


def _check(op: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: str) -> None:
    """q, k and v fit together; `layout` has their dimensions, among which heads and lengths."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_float_tensor(op, name, x, like=q)
        if x.dim() != len(layout):
            raise ValueError(
                f"{op}: {name} must have {len(layout)} dimensions ({', '.join(layout)}), "
                f"got the shape {tuple(x.shape)}"
            )
    for place, meaning in enumerate(layout):
        if meaning in "BN" and k.shape[place] != v.shape[place]:
            raise ValueError(
                f"{op}: k and v must have the same length and batch, "
                f"got {tuple(k.shape)} and {tuple(v.shape)}"
            )
        if meaning == "B" and q.shape[place] != k.shape[place]:
            raise ValueError(
                f"{op}: q and k must have the same batch, got {tuple(q.shape)} and {tuple(k.shape)}"
            )
        if meaning == "H" and (
            k.shape[place] != v.shape[place]
            or k.shape[place] == 0
            or q.shape[place] % k.shape[place] != 0
        ):
            raise ValueError(
                f"{op}: k and v must have the same number of heads, one that divides that of q, "
                f"got {q.shape[place]}, {k.shape[place]} and {v.shape[place]}"
            )
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"{op}: q and k must have the same head dimension, got {q.shape[-1]} and {k.shape[-1]}"
        )
    for name, x in (("q", q), ("v", v)):
        if not 0 < x.shape[-1] <= WIDEST_HEAD:
            raise ValueError(
                f"{op}: the head dimension of {name} must be in [1, {WIDEST_HEAD}], "
                f"got {x.shape[-1]}"
            )


def _cast(
    op: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v in autocast's dtype, or else in the one that they have to have in common."""
    q, k, v = autocast(q, k, v)
    for name, x in (("k", k), ("v", v)):
        check_same_dtype(op, name, x, "q", q)
    return q, k, v


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
    composed = _terms("attention", q, q.shape[0], q.shape[2], k.shape[2], **terms)
    return reference.attention(q, k, v, scale=scale, return_lse=return_lse, **parted(composed))


def _prefix(length: int) -> Callable[[str | torch.device], torch.Tensor]:
    """For samples: key lengths of two batch elements, all of the keys and none of them."""
    return lambda device: torch.tensor([length, 0], device=device)


def _random_mask(*shape: int) -> Callable[[str | torch.device], torch.Tensor]:
    """For samples: a mask that keeps three scores of five, but none of the first query's."""

    def make(device: str | torch.device) -> torch.Tensor:
        place = torch.arange(math.prod(shape)).reshape(shape)
        keep = place * 7919 % 5 < 3
        keep[..., 0, :] = False
        return keep.to(device)

    return make


def _slopes(heads: int) -> Callable[[str | torch.device], torch.Tensor]:
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
            alibi_slopes=_slopes(4),
            scale=0.25,
            return_lse=True,
        ),
        Sample(
            "a mask for each head",
            q=(2, 2, 33, 32),
            k=(2, 1, 48, 32),
            v=(2, 1, 48, 32),
            mask=_random_mask(2, 33, 48),
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
            alibi_slopes=_slopes(4),
            mask=_random_mask(2, 1, 40, 70),
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
    _check(op, q, k, v, "BHND")
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
    q, k, v = _cast(op, q, k, v)
    batch, queries, keys = q.shape[0], q.shape[2], k.shape[2]
    terms = _terms(
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
    o, lse = _launch(q, k, v, None, None, queries, keys, terms, scale)
    return (o, lse) if return_lse else o


def _launch(
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


def _cumulative(*lengths: int) -> Callable[[str | torch.device], torch.Tensor]:
    """For samples: where sequences of these lengths begin and end."""
    return lambda device: torch.tensor([0, *lengths], device=device).cumsum(0).int()


def _reference_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    **terms: Any,
) -> Any:
    """`attention_varlen` by the reference."""
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    composed = _varlen_terms(q, *lengths, **terms)
    return reference.attention_varlen(
        q, k, v, *lengths, scale=scale, return_lse=return_lse, **parted(composed)
    )


def _varlen_terms(
    q: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    **terms: Any,
) -> list[Term]:
    batch = cu_seqlens_q.numel() - 1
    return _terms("attention_varlen", q, batch, max_seqlen_q, max_seqlen_k, **terms)


@operation(
    reference=_reference_varlen,
    samples=(
        Sample(
            "smallest",
            q=(5, 2, 4),
            k=(6, 1, 4),
            v=(6, 1, 4),
            cu_seqlens_q=_cumulative(2, 0, 3),
            cu_seqlens_k=_cumulative(3, 1, 2),
            max_seqlen_q=3,
            max_seqlen_k=3,
            return_lse=True,
        ),
        Sample(
            "causal",
            q=(90, 2, 32),
            k=(90, 2, 32),
            v=(90, 2, 32),
            cu_seqlens_q=_cumulative(50, 7, 33),
            cu_seqlens_k=_cumulative(50, 7, 33),
            max_seqlen_q=50,
            max_seqlen_k=50,
            causal=True,
        ),
        Sample(
            "cross, with everything",
            q=(60, 4, 40),
            k=(101, 2, 40),
            v=(101, 2, 80),
            cu_seqlens_q=_cumulative(1, 40, 0, 19),
            cu_seqlens_k=_cumulative(33, 50, 18, 0),
            max_seqlen_q=48,
            max_seqlen_k=50,
            causal=True,
            window=[30, 3],
            softcap=3.0,
            alibi_slopes=_slopes(4),
            mask=_random_mask(4, 1, 48, 50),
            return_lse=True,
        ),
        Sample(
            "rows of no sequence",
            q=(20, 2, 16),
            k=(20, 2, 16),
            v=(20, 2, 16),
            cu_seqlens_q=_cumulative(9, 4),
            cu_seqlens_k=_cumulative(9, 4),
            max_seqlen_q=9,
            max_seqlen_k=9,
            return_lse=True,
        ),
    ),
)
def attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
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
    """Attention of sequences that lie packed one after another, each of its own length.

    Each is attended to by itself alone, as `attention` would, including the places of queries: the
    last query of a sequence stands at its last key. Sequences may be empty. Rows of q beyond the
    last sequence get output 0 and an lse of -inf.

    Args:
        q: (T, H, Dk), the sequences' queries, of any strides with a unit last one.
        k: (S, Hkv, Dk), their keys.
        v: (S, Hkv, Dv), their values.
        cu_seqlens_q: (B + 1,) int32: where each sequence begins in q, and the end of the last one.
        cu_seqlens_k: (B + 1,) int32: the same for k and v.
        max_seqlen_q: the number of queries of the longest sequence, or more.
        max_seqlen_k: the number of keys of the longest sequence, or more.
        causal, window, alibi_slopes, softcap, scale, score_mods: as in `attention`.
        mask: booleans that broadcast to (B, H, max_seqlen_q, max_seqlen_k).
        kv_lengths: (B,), as in `attention`, beside cu_seqlens_k.
        return_lse: return the logsumexp of each query's scores as well.

    Returns:
        o (T, H, Dv) in the dtype of q; with return_lse (o, lse), lse being (H, T) in float32
        (float64 for float64).

    Raises:
        TypeError: an argument is no tensor or of an unsupported dtype.
        ValueError: a shape, device or value does not fit. Cumulative lengths are looked into on a
            CPU alone; on a GPU that would mean waiting for it.
    """
    op = "attention_varlen"
    _check(op, q, k, v, "NHD")
    _check_cumulative(op, "cu_seqlens_q", cu_seqlens_q, q, max_seqlen_q)
    _check_cumulative(op, "cu_seqlens_k", cu_seqlens_k, k, max_seqlen_k)
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"{op}: cu_seqlens_q and cu_seqlens_k must have the same shape, "
            f"got {tuple(cu_seqlens_q.shape)} and {tuple(cu_seqlens_k.shape)}"
        )
    q, k, v = _cast(op, q, k, v)
    cumulative = (cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous())
    lengths = (*cumulative, max_seqlen_q, max_seqlen_k)
    terms = _varlen_terms(
        q,
        *lengths,
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
            return reference.attention_varlen(
                q, k, v, *lengths, scale=scale, return_lse=return_lse, **parted(terms)
            )
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    o, lse = _launch(q, k, v, *lengths, terms, scale)
    o = o[0].transpose(0, 1)
    return (o, lse[0]) if return_lse else o


def _check_cumulative(
    op: str, name: str, cumulative: torch.Tensor, x: torch.Tensor, longest: int
) -> None:
    _check_constant(op, name, cumulative, x)
    if cumulative.dtype is not torch.int32 or cumulative.dim() != 1 or cumulative.numel() == 0:
        raise ValueError(
            f"{op}: {name} must be int32 of shape (B + 1,), "
            f"got {cumulative.dtype} of shape {tuple(cumulative.shape)}"
        )
    if cumulative.device.type != "cpu" or torch.compiler.is_compiling():
        return
    lengths = cumulative.diff()
    if cumulative[0] != 0 or (lengths < 0).any() or cumulative[-1] > x.shape[0]:
        raise ValueError(
            f"{op}: {name} must rise from 0 to at most {x.shape[0]}, got {cumulative.tolist()}"
        )
    if (lengths > longest).any():
        raise ValueError(
            f"{op}: {name} has a sequence of {lengths.max().item()}, more than the {longest} of "
            f"max_seqlen_{name[-1]}"
        )
