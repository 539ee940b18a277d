"""Seeds of dropout."""

import torch


def draw_seed(like: torch.Tensor) -> torch.Tensor:
    """A one-element int64 seed, drawn on the device of `like` without a synchronisation.

    It comes from PyTorch's own generator of that device: `torch.manual_seed`, checkpointing,
    compilation and graph capture treat it as they treat PyTorch's dropout.
    """
    return torch.randint(2**62, (1,), device=like.device)
