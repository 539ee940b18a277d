"""What `torch.utils.flop_counter.FlopCounterMode` counts for our registered ops.

As there, a product of (M, K) and (K, N) is 2 M N K, nothing else counts, and attention counts all
pairs of a query and a key, whatever its masks. An op that computes a product again counts it again.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch

from ...kernels.private import dispatch_modes
from .lazy_imports import PACKAGE

NAMESPACE = PACKAGE.replace(".", "_")
"""Of the registered ops: that of the package, so that a copy of it has ops of its own."""

Formula = Callable[..., int]
"""A launcher's arguments to what it computes."""


def tell_counters(name: str, formula: Formula) -> None:
    """Let counters know of the op `fastattn::<name>`, if there can be any.

    A counter has copied the formulas that there were when it was made, so those that count now are
    told too: the op may have been registered since.
    """
    module: Any = sys.modules.get("torch.utils.flop_counter")
    if module is None:
        return
    op = getattr(getattr(torch.ops, NAMESPACE), name)

    def count(*args: Any, out_val: Any = None) -> int:
        return formula(*args)

    if op not in module.flop_registry:
        module.register_flop_formula(op, get_raw=True)(count)
    for mode in dispatch_modes():
        counter: Any = getattr(mode, "counter", None)
        if isinstance(counter, module.FlopCounterMode):
            counter.flop_registry.setdefault(op, count)


def pairs(
    q: torch.Tensor,
    k: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
) -> int:
    """The pairs of a query and a key, over all heads, of q (B, H, M, Dk) and k (B, Hkv, N, Dk).

    Lengths of packed sequences that cannot be read, as those of fake tensors, are taken for equal.
    """
    batch, heads, queries, _ = q.shape
    keys = k.shape[2]
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return batch * heads * queries * keys
    if not (_is_readable(cu_seqlens_q) and _is_readable(cu_seqlens_k)):
        return heads * queries * keys // max(cu_seqlens_q.shape[0] - 1, 1)
    lengths = cu_seqlens_q.diff().long(), cu_seqlens_k.diff().long()
    return heads * int((lengths[0] * lengths[1]).sum())


def _is_readable(tensor: torch.Tensor) -> bool:
    return type(tensor) is torch.Tensor and not tensor.is_meta
