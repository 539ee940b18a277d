"""What activation checkpointing keeps of attention."""

from contextlib import AbstractContextManager
from typing import Any

from ..core.flops import NAMESPACE

KEPT = (
    "aten._scaled_dot_product_cudnn_attention",
    "aten._scaled_dot_product_efficient_attention",
    "aten._scaled_dot_product_flash_attention",
    "aten._scaled_dot_product_flash_attention_for_cpu",
    f"{NAMESPACE}.attention_forward",
)
"""Ours, and those of PyTorch that `functional.scaled_dot_product_attention` may call."""


def save_attention() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Keep the outputs of attention where all else of a block is computed again.

    It is for `context_fn` of `torch.utils.checkpoint.checkpoint`. What attention keeps is small, o
    and a number for each query, and computing it again would cost the most. The reference backend
    has no attention to keep: there all is computed again.

    Returns:
        Two contexts, for the forward and for computing again.

    Example:
        >>> import fastattn, torch
        >>> from torch.utils.checkpoint import checkpoint
        >>> def block(x):
        ...     return fastattn.attention(x, x, x, causal=True)
        >>> x = torch.randn(1, 2, 8, 16, requires_grad=True)
        >>> y = checkpoint(block, x, use_reentrant=False, context_fn=fastattn.save_attention)
        >>> y.sum().backward()
    """
    # Imported late: it takes long, and few ask for it.
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    def choose(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        kept = str(op).rpartition(".")[0] in KEPT
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(choose)
