"""The residual addition before a norm, in plain PyTorch."""

import torch

from .dropout import dropout


def add_residual(
    x: torch.Tensor,
    residual: torch.Tensor,
    dropout_p: float,
    residual_dtype: torch.dtype | None,
    seed: torch.Tensor | None,
) -> torch.Tensor:
    """dropout(x) + residual, summed in at least float32 and rounded once, to `residual_dtype`."""
    if residual_dtype is None:
        residual_dtype = torch.promote_types(x.dtype, residual.dtype)
    branch = x.to(torch.promote_types(x.dtype, torch.float32))
    if dropout_p > 0.0:
        branch = dropout(branch, dropout_p, seed=seed)
    return (branch + residual).to(residual_dtype)
