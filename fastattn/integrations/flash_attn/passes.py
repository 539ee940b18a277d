"""flash-attn's forward and backward as functions by themselves, which ring attention calls.

In a ring every process holds some of the keys. Forward it merges outputs by their lse; backward it
hands each block of keys the merged output and lse, of which the kernels take the weights again.
"""

from typing import Any

import torch

from ...ops import attention, attention_varlen
from ...ops.core.random import draw_seed
from .arguments import (
    BHSD,
    THD,
    check_layout,
    read_length,
    read_softcap,
    read_window,
    refuse,
)
from .gradients import Lengths, Options, Rows, differentiate
from .pages import attend_to_pages

Passed = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _flash_attn_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    return_softmax: bool,
) -> Passed:
    """Attention of (B, S, H, D) without a record for autograd.

    Args:
        q, k, v, dropout_p, softmax_scale, causal, softcap, alibi_slopes: as in `flash_attn_func`.
        window_size_left, window_size_right: its window_size.
        return_softmax: means nothing here.

    Returns:
        (out, lse, an empty tensor, the seed of dropout), lse being (B, H, M) in float32.

    Raises:
        TypeError, ValueError: as in `flash_attn_func`.

    Source: flash_attn/flash_attn_interface.py of flash-attn 2.8.

    Example:
        >>> q, k, v = torch.randn(3, 2, 5, 4, 16)
        >>> out, lse, *_ = _flash_attn_forward(q, k, v, 0.0, 0.25, True, -1, -1, 0.0, None, False)
        >>> out.shape, lse.shape
        (torch.Size([2, 5, 4, 16]), torch.Size([2, 4, 5]))
    """
    op = "_flash_attn_forward"
    check_layout(op, BHSD, q=q, k=k, v=v)
    seed = _make_seed(q, dropout_p)
    with torch.no_grad():
        out, lse = attention(
            *(x.transpose(1, 2) for x in (q, k, v)),
            **_read_terms(op, causal, window_size_left, window_size_right, softcap, alibi_slopes),
            dropout_p=dropout_p,
            dropout_seed=seed,
            scale=softmax_scale,
            return_lse=True,
        )
    return out.transpose(1, 2), lse, q.new_empty(0), seed


def _flash_attn_varlen_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int | torch.Tensor,
    max_seqlen_k: int | torch.Tensor,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    return_softmax: bool = False,
    block_table: torch.Tensor | None = None,
    leftpad_k: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    zero_tensors: bool = False,
) -> Passed:
    """Attention of packed sequences (T, H, D) without a record for autograd.

    Args:
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
            causal, softcap, alibi_slopes, block_table: as in `flash_attn_varlen_func`.
        window_size_left, window_size_right: its window_size.
        return_softmax: means nothing here.
        leftpad_k, seqused_k: must be None.
        zero_tensors: changes nothing: rows beyond the last sequence are 0 always.

    Returns:
        (out, lse, an empty tensor, the seed of dropout), lse being (H, T) in float32.

    Raises:
        TypeError, ValueError, NotImplementedError: as in `flash_attn_varlen_func`.

    Source: as `_flash_attn_forward`.

    Example:
        >>> q, k, v = torch.randn(3, 5, 4, 16)
        >>> ends = torch.tensor([0, 2, 5], dtype=torch.int32)
        >>> out, lse, *_ = _flash_attn_varlen_forward(q, k, v, ends, ends, 3, 3, 0.0, 0.25, True)
        >>> out.shape, lse.shape
        (torch.Size([5, 4, 16]), torch.Size([4, 5]))
    """
    op = "_flash_attn_varlen_forward"
    refuse(op, leftpad_k=leftpad_k, seqused_k=seqused_k)
    seed = _make_seed(q, dropout_p)
    longest = read_length(op, "max_seqlen_q", max_seqlen_q)
    longest_keys = read_length(op, "max_seqlen_k", max_seqlen_k)
    options: dict[str, Any] = {
        **_read_terms(op, causal, window_size_left, window_size_right, softcap, alibi_slopes),
        "dropout_p": dropout_p,
        "scale": softmax_scale,
    }
    ends = (cu_seqlens_q, cu_seqlens_k)
    with torch.no_grad():
        if block_table is not None:
            check_layout(op, THD, q=q)
            out, lse = attend_to_pages(op, q, k, v, *ends, longest, block_table, **options)
        else:
            check_layout(op, THD, q=q, k=k, v=v)
            options |= {"dropout_seed": seed, "return_lse": True}
            out, lse = attention_varlen(q, k, v, *ends, longest, longest_keys, **options)
    return out, lse, q.new_empty(0), seed


def _flash_attn_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    dq: torch.Tensor | None,
    dk: torch.Tensor | None,
    dv: torch.Tensor | None,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    deterministic: bool,
    rng_state: torch.Tensor | None = None,
) -> None:
    """Write the gradients of q, k and v (B, S, H, D) into the tensors that are given for them.

    The weights are exp(score - lse) and the output is as given, so both may be those of more keys
    than k has: what is written is then this block's part of the gradients.

    Args:
        dout: (B, M, H, Dv), the gradient of out.
        q, k, v: as in `_flash_attn_forward`.
        out: (B, M, H, Dv), of all keys.
        softmax_lse: (B, H, M), of all keys.
        dq, dk, dv: shaped like q, k and v, of any float dtype, written over; None for those that
            are not wanted.
        dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap,
            alibi_slopes: as in `_flash_attn_forward`.
        deterministic: changes nothing: the bits are the same every time.
        rng_state: the seed that the forward returned; only dropout needs it.

    Returns:
        None, where flash-attn returns the sums of dout out by rows.

    Raises:
        TypeError, ValueError: an argument does not fit.

    Source: as `_flash_attn_forward`.

    Example:
        >>> q, k, v = torch.randn(3, 2, 5, 4, 16)
        >>> settings = (0.0, 0.25, True, -1, -1, 0.0, None, False)
        >>> out, lse, *_ = _flash_attn_forward(q, k, v, *settings)
        >>> dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        >>> _flash_attn_backward(torch.ones_like(out), q, k, v, out, lse, dq, dk, dv, *settings)
        >>> torch.allclose(dv.sum(1), torch.full((2, 4, 16), 5.0))
        True
    """
    op = "_flash_attn_backward"
    check_layout(op, BHSD, dout=dout, q=q, k=k, v=v, out=out)
    terms = _read_terms(op, causal, window_size_left, window_size_right, softcap, alibi_slopes)
    dout, q, k, v, out = (x.transpose(1, 2) for x in (dout, q, k, v, out))
    found = differentiate(
        op,
        Rows(dout, q, k, v, out, softmax_lse),
        None,
        Options(terms, softmax_scale, dropout_p, rng_state),
        (dq is not None, dk is not None or dv is not None),
    )
    _write((dq, dk, dv), [None if x is None else x.transpose(1, 2) for x in found])


def _flash_attn_varlen_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    dq: torch.Tensor | None,
    dk: torch.Tensor | None,
    dv: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int | torch.Tensor,
    max_seqlen_k: int | torch.Tensor,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    deterministic: bool,
    rng_state: torch.Tensor | None = None,
    zero_tensors: bool = False,
) -> None:
    """`_flash_attn_backward` of packed sequences (T, H, D).

    Args:
        dout, q, k, v, out, dq, dk, dv: as there, of packed rows.
        softmax_lse: (H, T), of all keys.
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k: as in `flash_attn_varlen_func`.
        dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap,
            alibi_slopes, deterministic, rng_state: as in `_flash_attn_backward`.
        zero_tensors: changes nothing: rows beyond the last sequence are 0 always.

    Returns:
        None.

    Raises:
        TypeError, ValueError: an argument does not fit.

    Source: as `_flash_attn_forward`.

    Example: as in `_flash_attn_backward`, with the four lengths after dv.
    """
    op = "_flash_attn_varlen_backward"
    check_layout(op, THD, dout=dout, q=q, k=k, v=v, out=out)
    terms = _read_terms(op, causal, window_size_left, window_size_right, softcap, alibi_slopes)
    longest = [
        read_length(op, name, length)
        for name, length in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k))
    ]
    dout, q, k, v, out = (x.transpose(0, 1)[None] for x in (dout, q, k, v, out))
    found = differentiate(
        op,
        Rows(dout, q, k, v, out, softmax_lse[None]),
        Lengths(cu_seqlens_q, cu_seqlens_k, *longest),
        Options(terms, softmax_scale, dropout_p, rng_state),
        (dq is not None, dk is not None or dv is not None),
    )
    _write((dq, dk, dv), [None if x is None else x[0].transpose(0, 1) for x in found])


def _make_seed(q: torch.Tensor, dropout_p: float) -> torch.Tensor:
    """A seed for dropout, or 0 where nobody will read it."""
    return draw_seed(q) if dropout_p > 0.0 else torch.zeros(1, dtype=torch.int64, device=q.device)


def _read_terms(
    op: str,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: torch.Tensor | None,
) -> dict[str, Any]:
    """The options of `fastattn.attention` that change scores."""
    return {
        "causal": causal,
        "window": read_window(op, (window_size_left, window_size_right)),
        "softcap": read_softcap(softcap),
        "alibi_slopes": None if alibi_slopes is None else alibi_slopes.detach(),
    }


def _write(places: tuple[torch.Tensor | None, ...], found: list[torch.Tensor | None]) -> None:
    with torch.no_grad():
        for place, gradient in zip(places, found, strict=True):
            if place is not None and gradient is not None:
                place.copy_(gradient)
