"""What launchers do on the host before a kernel starts."""

import torch


def rows_of(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """`x` (..., cols) as rows that a kernel can walk with one stride: (tensor, row stride).

    Rows with a unit last stride and a common distance are read in place, whatever that distance.
    Other layouts are copied once.
    """
    cols = x.shape[-1]
    if x.is_contiguous():
        return x, cols
    rows = x.reshape(-1, cols)
    if rows.stride(1) != 1 and cols > 1:
        rows = rows.contiguous()
    return rows, rows.stride(0)


def dropout_scalars(p: float) -> tuple[int, float]:
    """The threshold that `dropout_keep` compares 31 random bits with, and the kept values' scale."""
    return int(p * 2**31), 1.0 / (1.0 - p)
