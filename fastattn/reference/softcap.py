"""The softcap of scores and logits in plain PyTorch."""

import torch


def softcapped(x: torch.Tensor, softcap: float) -> torch.Tensor:
    """softcap * tanh(x / softcap), or x itself where that caps nothing."""
    return softcap * torch.tanh(x / softcap) if caps(softcap, x.dtype) else x


def caps(softcap: float, dtype: torch.dtype) -> bool:
    """Whether a softcap has room in numbers of a dtype.

    Near the largest of them, and at infinity, it changes no digit of what a score or logit may be,
    and a gradient times the cap is infinite.
    """
    limits = torch.finfo(dtype)
    return softcap < limits.max * limits.eps
