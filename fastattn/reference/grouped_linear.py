"""Grouped linear layers in plain PyTorch."""

from itertools import pairwise

import torch

from . import torch_functions as F


def grouped_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    offsets: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    transposed: bool = False,
) -> torch.Tensor:
    """x_r W_e^T + b_e of each row with its expert, 0 of rows of none."""
    weight = weight.mT if transposed else weight
    if _is_readable(offsets):
        return _by_slices(x, weight, offsets, bias)
    return _by_masks(x, weight, offsets, bias)


def _by_slices(
    x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Each expert on its own rows."""
    places = offsets.tolist()
    results = [
        F.linear(x[start:end], weight[expert], None if bias is None else bias[expert])
        for expert, (start, end) in enumerate(pairwise(places))
        if end > start
    ]
    # Something of each argument, so that each has a gradient, if only of zeros.
    nothing = x[:0].sum() + weight[:0].sum() + (0.0 if bias is None else bias[:0].sum())
    left = x.new_zeros(x.shape[0] - places[-1], weight.shape[1]) + nothing
    return torch.cat([*results, left])


def _by_masks(
    x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Each expert on all rows, where their spread cannot be read without leaving a traced graph."""
    row = torch.arange(x.shape[0], device=x.device)
    y = x.new_zeros(x.shape[0], weight.shape[1])
    for expert in range(weight.shape[0]):
        own = ((row >= offsets[expert]) & (row < offsets[expert + 1]))[:, None]
        # What others have here may be infinite, which times 0 would be NaN.
        rows = torch.where(own, x, 0.0)
        result = F.linear(rows, weight[expert], None if bias is None else bias[expert])
        y = torch.where(own, result, y)
    return y


def _is_readable(offsets: torch.Tensor) -> bool:
    """Whether this is eager, and offsets have numbers."""
    eager = not torch.compiler.is_compiling() and type(offsets) is torch.Tensor
    return eager and not offsets.is_meta
