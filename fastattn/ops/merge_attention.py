"""Merging attention over parts of the keys into attention over all of them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..reference.merge_attention import merge_attention as reference
from .core.apply import call
from .core.arguments import check_device, check_float_tensor, check_shape
from .core.backends import use_triton
from .core.catalog import Normal, Sample, operation
from .core.gradients import gradients
from .core.lazy_imports import lazy_module
from .core.registration import kernel_op

if TYPE_CHECKING:
    from ..kernels.decode import merge
else:
    merge = lazy_module("fastattn.kernels.decode.merge")


@kernel_op(merge.merge_attention_forward)
def merge_attention_forward(
    parts: torch.Tensor, part_lse: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """(o, lse), see merge_attention_forward in kernels/decode/merge.py."""
    return parts.new_empty(parts.shape[1:], dtype=dtype), part_lse.new_empty(part_lse.shape[1:])


@kernel_op(merge.merge_attention_backward)
def merge_attention_backward(
    do: torch.Tensor,
    dlse: torch.Tensor,
    parts: torch.Tensor,
    part_lse: torch.Tensor,
    lse: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dparts, dpart_lse), see merge_attention_backward in kernels/decode/merge.py."""
    return parts.new_empty(parts.shape), part_lse.new_empty(part_lse.shape)


class MergeAttentionFunction(torch.autograd.Function):
    """merge_attention_forward."""

    @staticmethod
    def forward(parts: torch.Tensor, part_lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return merge_attention_forward(parts, part_lse, parts.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.save_for_backward(*inputs, output[1])

    @staticmethod
    def backward(
        ctx: Any, do: torch.Tensor, dlse: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return gradients(
            merge_attention_backward, _backward_formula, (do, dlse, *ctx.saved_tensors)
        )


def _backward_formula(
    do: torch.Tensor,
    dlse: torch.Tensor,
    parts: torch.Tensor,
    part_lse: torch.Tensor,
    lse: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What merge_attention_backward computes, in PyTorch; lse is a function of part_lse here."""
    _, pullback, *_ = torch.func.vjp(reference, parts, part_lse)
    return pullback((do, dlse))


@operation(
    reference=reference,
    samples=(
        Sample("smallest", o=(2, 3, 4), lse=Normal((2, 3), torch.float32)),
        Sample("three parts", o=(3, 2, 4, 5, 40), lse=Normal((3, 2, 4, 5), torch.float32)),
        Sample("many parts", o=(37, 3, 16), lse=Normal((37, 3), torch.float32, scale=4.0)),
        Sample("wide", o=(2, 3, 576), lse=Normal((2, 3), torch.float32, mean=50.0)),
        Sample("one part", o=(1, 9, 24), lse=Normal((1, 9), torch.float32)),
        Sample("no rows", o=(2, 0, 16), lse=Normal((2, 0), torch.float32)),
    ),
)
def merge_attention(
    o: torch.Tensor | Sequence[torch.Tensor], lse: torch.Tensor | Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over all keys, of the outputs and logsumexps over parts of them.

    The keys of a query may lie in several places, as in pages, on several devices, or in a prefix
    that many sequences share. `attention(..., return_lse=True)` over each, merged, equals attention
    over all of them. A sink belongs to one part alone.

    Args:
        o: (S, ..., D), or S tensors (..., D): the output of each part, float16, bfloat16, float32
            or float64.
        lse: (S, ...), or S tensors (...), float32 (float64 for float64): the logsumexp of each
            query's scores in a part, to base e. -inf says that it has no keys there; what o is then
            does not count.

    Returns:
        (o, lse): (..., D) of o's dtype, and (...) of lse's. A query without keys in any part has 0
        and -inf. Both are any number of times differentiable in both.

    Raises:
        TypeError: an argument is no tensor or of an unsupported dtype.
        ValueError: a shape or device does not fit, or there are no parts.

    Example:
        >>> q, k, v = torch.randn(3, 1, 2, 6, 8)
        >>> parts = [
        ...     fastattn.attention(q, k[:, :, keys], v[:, :, keys], return_lse=True)
        ...     for keys in (slice(0, 4), slice(4, 6))
        ... ]
        >>> o, lse = fastattn.merge_attention(*zip(*parts))
        >>> torch.testing.assert_close(o, fastattn.attention(q, k, v))

    Source: Milakov and Gimelshein, "Online Normalizer Calculation for Softmax" (2018).
    """
    op = "merge_attention"
    o, lse = _stack(op, "o", o), _stack(op, "lse", lse)
    check_float_tensor(op, "o", o)
    check_float_tensor(op, "lse", lse)
    check_device(op, "lse", lse, o)
    expected = torch.promote_types(o.dtype, torch.float32)
    if lse.dtype is not expected:
        raise TypeError(f"{op}: lse must be {expected} where o is {o.dtype}, got {lse.dtype}")
    if o.dim() < 2 or o.shape[0] == 0 or o.shape[-1] == 0:
        raise ValueError(
            f"{op}: o must be (S, ..., D) of one part and one column at least, got the shape "
            f"{tuple(o.shape)}"
        )
    check_shape(op, "lse", lse, o.shape[:-1])
    return call(MergeAttentionFunction, o, lse) if use_triton(o) else reference(o, lse)


def _stack(op: str, name: str, parts: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
    """The parts as one tensor."""
    if isinstance(parts, torch.Tensor) or not isinstance(parts, Sequence):
        return parts
    if not parts:
        raise ValueError(f"{op}: {name} must have one part at least")
    for part in parts:
        check_float_tensor(op, name, part)
    return torch.stack(list(parts))
