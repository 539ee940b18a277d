"""Rotary positions in plain PyTorch."""

import torch


def apply_rotary(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    interleaved: bool = False,
    positions: torch.Tensor | int | None = None,
    cu_seqlens: torch.Tensor | None = None,
    inverse: bool = False,
) -> torch.Tensor:
    """Turn pairs of x's columns, (B, H, S, D) or (H, S, D), by the angle of each token."""
    computed = torch.promote_types(x.dtype, torch.float32)
    if cos.dim() == 2:
        rows = _table_rows(x.shape[-2], positions, cu_seqlens, x.device)
        cos, sin = _taken(cos, rows), _taken(sin, rows)
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
    sin: torch.Tensor,
    *,
    interleaved: bool = False,
    positions: torch.Tensor | int | None = None,
    cu_seqlens: torch.Tensor | None = None,
    inverse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """apply_rotary of both."""
    options = {
        "interleaved": interleaved,
        "positions": positions,
        "cu_seqlens": cu_seqlens,
        "inverse": inverse,
    }
    return apply_rotary(q, cos, sin, **options), apply_rotary(k, cos, sin, **options)


def _table_rows(
    length: int,
    positions: torch.Tensor | int | None,
    cu_seqlens: torch.Tensor | None,
    device: torch.device,
) -> torch.Tensor:
    """The position of each token: (S,), or the tensor that was given."""
    if isinstance(positions, torch.Tensor):
        return positions
    token = torch.arange(length, device=device)
    if cu_seqlens is not None:
        sequence = torch.searchsorted(cu_seqlens, token.to(cu_seqlens.dtype), right=True) - 1
        token = token - cu_seqlens[sequence]
    return token + (positions or 0)


def _taken(table: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Rows of a table; NaN for those that it does not have."""
    present = (rows >= 0) & (rows < table.shape[0])
    taken = table[rows.clamp(0, table.shape[0] - 1)]
    return torch.where(present[..., None], taken, torch.nan)
