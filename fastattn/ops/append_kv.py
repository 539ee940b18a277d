"""Appending keys and values to caches, in place."""

import torch

from .core.arguments import check_constant, check_device, check_float_tensor, check_integers
from .core.sharding import refuse_distributed
from .core.tensor_kinds import is_plain
from .decode_arguments import EIGHT_BITS, find_capacity
from .rotary import apply_rotary

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def append_kv(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor | None,
    k: torch.Tensor,
    v: torch.Tensor | None,
    *,
    lengths: torch.Tensor,
    block_table: torch.Tensor | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    interleaved: bool = False,
    k_scale: torch.Tensor | float = 1.0,
    v_scale: torch.Tensor | float = 1.0,
) -> None:
    """Write the keys and values of new tokens into their caches, in place, behind what is there.

    Token i of a sequence goes to place lengths + i. Nothing is waited for: where a cache has no
    room left nothing is written, on a GPU without a word (keep an upper bound on the host), on a
    CPU with an error. Nothing is recorded for gradients.

    Args:
        k_cache: (B, Hkv, N, Dk), or with `block_table` pages (P, Hkv, page, Dk), as
            `decode_attention` reads it. Any strides.
        v_cache: as k_cache, with Dv columns; None where there are no values, as in latent caches.
        k: (B, Hkv, M, Dk), of any float dtype.
        v: (B, Hkv, M, Dv), or None.
        lengths: (B,) int32 or int64: how many keys each sequence has before; `decode_attention`
            is then told lengths + M.
        block_table: (B, pages) int32 or int64.
        cos, sin, interleaved: tables that k is turned by first, as `apply_rotary` does.
        positions: (B, M) int32 or int64, where tables have each token; lengths + i if None.
        k_scale, v_scale: for caches of 8 bits: a number, or a tensor () or (Hkv,), by which what
            is stored has to be multiplied to be what it was. Numbers are rounded to the nearest,
            and end at the dtype's largest.

    Raises:
        TypeError: an argument is no tensor or of an unsupported dtype.
        ValueError: a shape or device does not fit, or there is no room (CPU).

    Example:
        >>> k_cache, v_cache = torch.zeros(2, 1, 4, 16, 8)
        >>> k, v = torch.randn(2, 1, 4, 3, 8)
        >>> fastattn.append_kv(k_cache, v_cache, k, v, lengths=torch.tensor([5]))
        >>> torch.equal(k_cache[:, :, 5:8], k)
        True
    """
    op = "append_kv"
    refuse_distributed(op, k_cache=k_cache, v_cache=v_cache, k=k, v=v, lengths=lengths)
    check_float_tensor(op, "k", k)
    check_constant(op, "lengths", lengths, k)
    check_integers(op, "lengths", lengths)
    if k.dim() != 4 or lengths.shape != k.shape[:1]:
        raise ValueError(
            f"{op}: k must be (B, Hkv, M, Dk) and lengths (B,), got the shapes {tuple(k.shape)} "
            f"and {tuple(lengths.shape)}"
        )
    if (v_cache is None) != (v is None):
        raise ValueError(f"{op}: values need a cache, and their cache values")
    new = torch.arange(k.shape[2], device=k.device)
    places = lengths.long()[:, None] + new
    if cos is not None:
        k = apply_rotary(
            k,
            cos,
            sin,
            positions=places if positions is None else positions,
            interleaved=interleaved,
        )
    with torch.no_grad():
        for name, cache, x, scale in (("k", k_cache, k, k_scale), ("v", v_cache, v, v_scale)):
            if cache is not None and x is not None:
                _check_cache(op, name, cache, x, k, block_table)
                _write(op, cache, x, places, block_table, scale)


def _check_cache(
    op: str,
    name: str,
    cache: torch.Tensor,
    x: torch.Tensor,
    k: torch.Tensor,
    block_table: torch.Tensor | None,
) -> None:
    check_device(op, f"{name}_cache", cache, k)
    check_float_tensor(op, name, x, like=k)
    if cache.requires_grad:
        raise ValueError(f"{op}: {name}_cache must not require a gradient: it is written in place")
    batch = cache.shape[:1] if block_table is None else x.shape[:1]
    fits = cache.dim() == 4 and (*batch, cache.shape[1], x.shape[2], cache.shape[3]) == x.shape
    if not fits or x.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"{op}: {name} and {name}_cache must fit each other and k, got the shapes "
            f"{tuple(x.shape)} and {tuple(cache.shape)}"
        )
    if block_table is not None:
        check_device(op, "block_table", block_table, k)
        check_integers(op, "block_table", block_table)
        if block_table.dim() != 2 or block_table.shape[0] != k.shape[0]:
            raise ValueError(
                f"{op}: block_table must be ({k.shape[0]}, pages), got {tuple(block_table.shape)}"
            )


def _write(
    op: str,
    cache: torch.Tensor,
    x: torch.Tensor,
    places: torch.Tensor,
    block_table: torch.Tensor | None,
    scale: torch.Tensor | float,
) -> None:
    """Write x (B, Hkv, M, D) to places (B, M)."""
    if x.shape[2] == 0 or x.shape[0] == 0:
        return
    room = find_capacity(cache, block_table)
    if places.device.type == "cpu" and is_plain((places,)) and (places >= room).any():
        needed = int(places.max()) + 1
        raise ValueError(f"{op}: there is room for {room} keys, and {needed} are needed")
    if room == 0:
        return
    # Tokens without room write once more what the last one with room writes, or if there is none,
    # what stands in the last place already: one place then never gets two numbers.
    token = torch.minimum(torch.arange(x.shape[2], device=x.device), room - 1 - places[:, :1])
    place = places[:, :1] + token
    sequence = torch.arange(x.shape[0], device=x.device)[:, None]
    element, row = sequence, place
    if block_table is not None:
        page = cache.shape[2]
        element, row = block_table.long().gather(1, place // page), place % page
    # (B, M, Hkv, D)
    written = _store_as(x, cache.dtype, scale)[sequence, :, token.clamp(min=0)]
    bits = cache.view(torch.uint8) if cache.dtype is torch.float8_e4m3fn else cache
    bits[element, :, row] = torch.where(
        (token >= 0)[..., None, None], written, bits[element, :, row]
    )


def _store_as(x: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor | float) -> torch.Tensor:
    """x in a cache's dtype; float8 as its bits."""
    if dtype not in EIGHT_BITS:
        return x.to(dtype)
    scale = scale.reshape(-1, 1, 1) if isinstance(scale, torch.Tensor) else scale
    largest = LARGEST[dtype]
    x = (x.to(torch.promote_types(x.dtype, torch.float32)) / scale).clamp(-largest, largest)
    return x.round().to(dtype) if dtype is torch.int8 else x.to(dtype).view(torch.uint8)
