"""Seeds of dropout."""

import torch

from .sharding import is_distributed, take_from_first_rank


def draw_seed(like: torch.Tensor) -> torch.Tensor:
    """A one-element int64 seed, drawn on the device of `like` without a synchronisation.

    It comes from PyTorch's own generator of that device: `torch.manual_seed`, checkpointing,
    compilation and graph capture treat it as they treat PyTorch's dropout. The ranks that share a
    DTensor share the first one's seed.
    """
    seed = torch.randint(2**62, (1,), device=like.device)
    if is_distributed(like):
        take_from_first_rank(seed, like)
    return seed
