"""Rotary positions in plain PyTorch."""

import torch


def apply_rotary(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor | None = None,
    *,
    interleaved: bool = False,
    full_width: bool = False,
    positions: torch.Tensor | int | None = None,
    cu_seqlens: torch.Tensor | None = None,
    inverse: bool = False,
) -> torch.Tensor:
    """Turn pairs of x's columns, (B, H, S, D) or (H, S, D), by the angle of each token."""
    cos, sin = split_tables(cos, sin, interleaved, full_width)
    computed = torch.promote_types(x.dtype, torch.float32)
    if cos.dim() == 2:
        if isinstance(positions, torch.Tensor):
            rows = positions
        elif cu_seqlens is not None:
            rows = _find_places(cu_seqlens, x.shape[-2]) + (positions or 0)
        else:
            # A slice, which DTensor can take of a table too.
            first = positions or 0
            rows = slice(first, first + x.shape[-2])
        cos, sin = _take_rows(cos, rows), _take_rows(sin, rows)
    if cos.dim() == 3:
        # The same angles for every head.
        cos, sin = cos[:, None], sin[:, None]
    cos, sin = cos.to(computed), sin.to(computed)
    if inverse:
        sin = -sin
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half].to(computed), x[..., 2 * half :]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
    else:
        a, b = turned[..., :half], turned[..., half:]
    pair = (a * cos - b * sin, b * cos + a * sin)
    turned = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat((turned.to(x.dtype), rest), dim=-1)


def apply_rotary_qk(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor | None = None,
    *,
    interleaved: bool = False,
    full_width: bool = False,
    positions: torch.Tensor | int | None = None,
    cu_seqlens: torch.Tensor | None = None,
    inverse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """apply_rotary of both."""
    options = {
        "interleaved": interleaved,
        "full_width": full_width,
        "positions": positions,
        "cu_seqlens": cu_seqlens,
        "inverse": inverse,
    }
    return apply_rotary(q, cos, sin, **options), apply_rotary(k, cos, sin, **options)


def split_tables(
    cos: torch.Tensor, sin: torch.Tensor | None, interleaved: bool, full_width: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of R/2 columns each, as views of the tables in any of their forms."""
    if sin is None:
        pairs = torch.view_as_real(cos.resolve_conj())
        return pairs[..., 0], pairs[..., 1]
    if not full_width:
        return cos, sin
    if interleaved:
        return cos[..., ::2], sin[..., ::2]
    half = cos.shape[-1] // 2
    return cos[..., :half], sin[..., :half]


def _find_places(cu_seqlens: torch.Tensor, length: int) -> torch.Tensor:
    """The place (S,) of each token in its sequence."""
    # Else PyTorch copies it all the same, and warns.
    cu_seqlens = cu_seqlens.contiguous()
    token = torch.arange(length, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens, token.to(cu_seqlens.dtype), right=True) - 1
    return token - cu_seqlens[sequence]


def _take_rows(table: torch.Tensor, rows: torch.Tensor | slice) -> torch.Tensor:
    """Rows of a table; NaN for those that it does not have."""
    if isinstance(rows, slice):
        return table[rows]
    present = (rows >= 0) & (rows < table.shape[0])
    taken = table[rows.clamp(0, table.shape[0] - 1)]
    return torch.where(present[..., None], taken, torch.nan)
