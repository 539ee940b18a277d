"""Our attention under torch's own name, for code that nobody wants to edit."""

import contextlib

import torch.nn.functional

from .dot_product_attention import scaled_dot_product_attention


def replace_sdpa() -> contextlib.ExitStack:
    """Make `torch.nn.functional.scaled_dot_product_attention` ours, everywhere in this process.

    It stays so, or until the block ends in whose `with` statement this is called. What timm,
    diffusers, torchvision or a model of one's own call as `F.scaled_dot_product_attention` is then
    `fastattn.functional.scaled_dot_product_attention`. What has imported the function itself,
    `from torch.nn.functional import scaled_dot_product_attention`, before this call keeps torch's.

    Returns:
        A context manager whose end puts back what was there.

    Example:
        >>> import fastattn, torch
        >>> import torch.nn.functional as F
        >>> q = k = v = torch.randn(1, 2, 8, 16)
        >>> with fastattn.replace_sdpa():
        ...     F.scaled_dot_product_attention is fastattn.functional.scaled_dot_product_attention
        True
        >>> F.scaled_dot_product_attention is fastattn.functional.scaled_dot_product_attention
        False
    """
    functional, name = torch.nn.functional, "scaled_dot_product_attention"
    undo = contextlib.ExitStack()
    undo.callback(setattr, functional, name, getattr(functional, name))
    setattr(functional, name, scaled_dot_product_attention)
    return undo
