"""Matrix products."""

from typing import Any

import torch

from .. import reference
from .core.apply import call
from .core.arguments import check_float_tensor
from .core.catalog import Sample, operation
from .core.gradients import gradients
from .core.precision import autocast, product_precision
from .core.products import check_same_dtype, choose_engine, matmul_forward, uses_cublas
from .core.sharding import is_distributed


class MatmulFunction(torch.autograd.Function):
    """a @ b by the kernels, for operands with equal leading dimensions."""

    @staticmethod
    def forward(a: torch.Tensor, b: torch.Tensor, batch_invariant: bool) -> torch.Tensor:
        return matmul_forward(a, b, a.dtype, product_precision(a.dtype), batch_invariant)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
        *tensors, ctx.batch_invariant = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        tensors = (dout, *ctx.saved_tensors)
        options = (ctx.batch_invariant, *ctx.needs_input_grad[:2])
        return *gradients(_matmul_backward, _matmul_backward_formula, tensors, options), None


def _matmul_backward(
    dout: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    batch_invariant: bool,
    for_a: bool,
    for_b: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    precision = product_precision(a.dtype)
    da = matmul_forward(dout, b.mT, a.dtype, precision, batch_invariant) if for_a else None
    # Over the rows of all, the gradient of one matrix is a sum over the batch in any case.
    alone = batch_invariant and b.dim() > 2
    db = matmul_forward(a.mT, dout, b.dtype, precision, alone) if for_b else None
    return da, db


def _matmul_backward_formula(
    dout: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    batch_invariant: bool,
    for_a: bool,
    for_b: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """What _matmul_backward computes, in PyTorch."""
    return dout @ b.mT if for_a else None, a.mT @ dout if for_b else None


@operation(
    reference=reference.matmul,
    samples=(
        Sample("smallest", a=(3, 4), b=(4, 2)),
        Sample("batch", a=(2, 3, 20, 24), b=(2, 3, 24, 40)),
        Sample("odd sizes, several tiles", a=(67, 70), b=(70, 35)),
        Sample("long sums, split", a=(5, 1500), b=(1500, 6)),
        Sample("broadcast batch", a=(2, 1, 7, 9), b=(3, 9, 4)),
        Sample("a matrix for all", a=(2, 3, 7, 9), b=(9, 4)),
        Sample("vectors", a=(130,), b=(130,)),
        Sample("vector and batch", a=(9,), b=(3, 9, 4)),
        Sample("batch and vector", a=(3, 4, 9), b=(9,)),
        Sample("outer product", a=(33, 1), b=(1, 40)),
        Sample("one element", a=(1, 1), b=(1, 1)),
        Sample("nothing to sum", a=(3, 0), b=(0, 4)),
        Sample("no rows", a=(0, 5), b=(5, 4)),
    ),
)
def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The product of two matrices, or of batches of them, with the meaning of torch.matmul.

    Products of float16, bfloat16 and float32 are summed in float32 (float64 for float64) and
    rounded once. Float32 operands multiply in full precision, or in TF32 where
    `torch.set_float32_matmul_precision` or `torch.backends.cuda.matmul.allow_tf32` say so.

    On a GPU a plain product is PyTorch's own (cuBLAS) unless that would have to copy an operand
    that is broadcast; inside `backend("triton")` it is always fastattn's kernel, whose result is
    the same bit for bit whenever it is computed again.

    Args:
        a: (..., M, K) or (K,), float16, bfloat16, float32 or float64. Any strides: transposed and
            broadcast operands are read in place by the kernel, and only a layout without a unit
            stride along either of the last two dimensions is copied.
        b: (..., K, N) or (K,), of a's dtype. Leading dimensions of both are broadcast.

    Returns:
        (..., M, N), without the dimensions that a vector lacks, of a's dtype, or autocast's; any
        number of times differentiable in a and b.

    Raises:
        TypeError: an argument is no tensor, of an unsupported dtype, or of another one than a.
        ValueError: a shape or device does not fit.

    Example:
        >>> fastattn.matmul(torch.randn(5, 3, 8), torch.randn(8, 4)).shape
        torch.Size([5, 3, 4])
    """
    _check(a, b)
    a, b = autocast(a, b)
    check_same_dtype("matmul", "b", b, "a", a)
    engine = choose_engine(a)
    if engine == "torch":
        return reference.matmul(a, b)
    if a.dim() == 1 or b.dim() == 1:
        out = matmul(a[None] if a.dim() == 1 else a, b[:, None] if b.dim() == 1 else b)
        out = out.squeeze(-2) if a.dim() == 1 else out
        return out.squeeze(-1) if b.dim() == 1 else out
    invariant = engine == "invariant"
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    if engine == "auto" and uses_cublas(
        a.shape[-2], b.shape[-1], a.shape[-1], a.dtype, copies=len(batch) > 1 and _broadcast(a, b)
    ):
        return reference.matmul(a, b)
    if b.dim() == 2 and a.dim() > 2 and not is_distributed(a):
        # One product over the rows of all, whose gradients then need no sum over the batch.
        rows = call(MatmulFunction, a.reshape(-1, a.shape[-1]), b, invariant)
        return rows.view(*a.shape[:-1], b.shape[-1])
    a = a.expand(*batch, *a.shape[-2:])
    b = b.expand(*batch, *b.shape[-2:])
    return call(MatmulFunction, a, b, invariant)


def _broadcast(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether an operand has to be repeated to get the other's leading dimensions."""
    return a.shape[:-2] != b.shape[:-2] and b.dim() > 2


def _check(a: torch.Tensor, b: torch.Tensor) -> None:
    op = "matmul"
    check_float_tensor(op, "a", a)
    check_float_tensor(op, "b", b, like=a)
    for name, operand in (("a", a), ("b", b)):
        if operand.dim() == 0:
            raise ValueError(f"{op}: {name} must have at least one dimension, got a scalar")
    inner = b.shape[0] if b.dim() == 1 else b.shape[-2]
    if a.shape[-1] != inner:
        raise ValueError(
            f"{op}: b must have {a.shape[-1]} rows for an a of shape {tuple(a.shape)}, "
            f"got the shape {tuple(b.shape)}"
        )
    for size, other in zip(reversed(a.shape[:-2]), reversed(b.shape[:-2]), strict=False):
        if size != other and 1 not in (size, other):
            raise ValueError(
                f"{op}: b must have leading dimensions that broadcast with {tuple(a.shape[:-2])}, "
                f"got {tuple(b.shape[:-2])}"
            )
