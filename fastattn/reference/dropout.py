"""Dropout in plain PyTorch, with the random numbers of the kernels."""

import math
from collections.abc import Sequence

import torch

_WORD = 0xFFFFFFFF
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85


def dropout(x: torch.Tensor, p: float = 0.5, *, seed: torch.Tensor | None = None) -> torch.Tensor:
    """Zero elements of x with probability p and scale the others by 1 / (1 - p)."""
    if p == 0.0:
        return x.clone()
    if seed is None:
        seed = torch.randint(2**62, (1,), device=x.device)
    keep = dropout_mask(seed, x.shape, p)
    return torch.where(keep, x * (1.0 / (1.0 - p)), 0.0)


def dropout_mask(seed: torch.Tensor, shape: Sequence[int], p: float) -> torch.Tensor:
    """The elements that dropout with this seed keeps: booleans of `shape`, on the seed's device.

    Element (row, column), where row counts over all but the last dimension, is kept if the upper 31
    bits of its random word reach p * 2^31. Four neighbouring columns share a Philox counter
    (column // 4, 0, row, row >> 32), keyed by the 64-bit seed.
    """
    cols = shape[-1] if len(shape) else 1
    # Not torch.Size.numel, which takes the lengths that torch.export leaves open for constants.
    rows = math.prod(shape[:-1])
    row = torch.arange(rows, device=seed.device)[:, None]
    quad = torch.arange((cols + 3) // 4, device=seed.device)[None, :]
    quad, row = torch.broadcast_tensors(quad, row)
    counter = (quad & _WORD, torch.zeros_like(quad), row & _WORD, row >> 32)
    words = torch.stack(_philox(counter, seed & _WORD, (seed >> 32) & _WORD), dim=-1)
    words = words.flatten(-2)[:, :cols]
    return ((words >> 1) >= int(p * 2**31)).reshape(shape)


def _philox(
    counter: tuple[torch.Tensor, ...], key_low: torch.Tensor, key_high: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Philox 4x32 with ten rounds, in int64 tensors that hold 32-bit words.

    Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (2011).
    """
    c0, c1, c2, c3 = counter
    for _ in range(10):
        # int64 products wrap around, but keep all 64 bits of the unsigned ones.
        a, b = c0 * _ROUND_A, c2 * _ROUND_B
        c0 = ((b >> 32) & _WORD) ^ c1 ^ key_low
        c2 = ((a >> 32) & _WORD) ^ c3 ^ key_high
        c1, c3 = b & _WORD, a & _WORD
        key_low, key_high = (key_low + _KEY_A) & _WORD, (key_high + _KEY_B) & _WORD
    return c0, c1, c2, c3
