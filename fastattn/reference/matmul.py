"""Matrix products in plain PyTorch."""

import torch


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b, with leading dimensions broadcast."""
    return torch.matmul(a, b)
