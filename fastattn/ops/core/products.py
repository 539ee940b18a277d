"""Products inside Functions, and the one place that decides who multiplies: kernels or cuBLAS."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch

from .backends import INTERPRETED, current_backend, use_triton
from .batch_invariance import is_batch_invariant
from .lazy_imports import lazy_module
from .precision import product_precision
from .registration import kernel_op
from .sharding import is_distributed
from .tensor_kinds import is_plain

if TYPE_CHECKING:
    from ...kernels.matmul import matmul as kernels
else:
    kernels = lazy_module("fastattn.kernels.matmul.matmul")

Engine = Literal["auto", "kernels", "invariant", "torch"]
"""Who multiplies: "auto" asks `uses_cublas`; "invariant" are the kernels with tiles that depend on
feature sizes alone."""


def uses_cublas(
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    *,
    out_dtype: torch.dtype | None = None,
    activation: bool = False,
    epilogue: bool = False,
    copies: bool = False,
) -> bool:
    """Whether PyTorch's own product, cuBLAS on an NVIDIA GPU, computes (m, k) x (k, n).

    Plain products of every size go there, and products that add a bias, which cuBLAS does in the
    same launch. No measurement of our kernels stands against it yet; published ones of plain Triton
    beside cuBLAS on an H100 in float16 are 195 against 511 TFLOP/s at 2048 cubed, 525 against 585
    at 3072 cubed, and persistent with TMA 666 to 689 against about 790 at 8192 cubed. Small
    products are bound by the host, to which torch's call costs no more than a launch of ours.

    What cuBLAS would need another pass over memory for stays with our kernels: an epilogue, a
    result in another dtype than the operands', and operands that it would copy first. But for an
    activation alone the other pass is predicted to pay from ACTIVATION_COLUMNS summed on.

    Whoever wants our kernels all the same says `backend("triton")`, which does not ask here.

    Args:
        m, n, k: the sizes; no answer may depend on m, the number of tokens, which torch.compile
            would then guard.
        dtype: the operands' dtype.
        out_dtype: the result's dtype, None for the operands'.
        activation: whether an activation follows that is one pass of PyTorch's.
        epilogue: whether another one or a residual follows.
        copies: whether PyTorch would have to copy an operand, as one that is broadcast along one of
            several leading dimensions.
    """
    if activation and k < ACTIVATION_COLUMNS:
        return False
    return not epilogue and not copies and out_dtype in (None, dtype)


ACTIVATION_COLUMNS = 2048
"""From so many columns summed on, cuBLAS and then an activation beat our kernel with it.

Predicted, not measured: with an activation our kernel multiplies at 64 % of the tensor cores' peak
where cuBLAS does at 83 %, after which 4 bytes an element of 16 bits are moved once more. On an H100
(919 TFLOP/s at 1.7 GHz, 3.0 TB/s) both take the same time at 1700 columns, on an H200 (4.3 TB/s) at
1200, on an A100 (312 TFLOP/s, 1.4 TB/s) at 1250. Of 32 bits both sides of the comparison double.
"""

GATED_COLUMNS = 1024
"""From so many columns summed on, cuBLAS computes gate and up again faster than the fused kernel.

Predicted in the same way: the kernel of gated_linear's backward multiplies at 53 % of the peak and
cuBLAS at 80 %, but gate and up are then written and read again, 8 bytes an element. Both take the
same time at 960 columns on an H100, at 670 on an H200 and at 700 on an A100.
"""


def recomputes_by_cublas(k: int) -> bool:
    """Whether cuBLAS computes the gate and up of gated_linear again in its backward.

    Args:
        k: how many columns x has; no answer may depend on the number of tokens.
    """
    return k >= GATED_COLUMNS


def choose_engine(tensor: torch.Tensor) -> Engine:
    """Who multiplies for an op that starts now on `tensor`.

    A Function asks in its forward and hands the answer to every product of its backward, which may
    run outside of `backend(...)` and in another thread.
    """
    if not use_triton(tensor):
        return "torch"
    if is_batch_invariant():
        return "invariant"
    # Our registered ops have rules for how shards multiply.
    if INTERPRETED or current_backend() == "triton" or is_distributed(tensor):
        return "kernels"
    return "auto"


def check_same_dtype(
    op: str, name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor
) -> None:
    """Operands of a product have one dtype, as torch has it; autocast has been heard before."""
    if tensor.dtype is not other.dtype:
        raise TypeError(
            f"{op}: {name} must have {other_name}'s dtype {other.dtype}, got {tensor.dtype}"
        )


def product(
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    out_dtype: torch.dtype | None = None,
    accumulate_into: torch.Tensor | None = None,
    engine: Engine | None = None,
) -> torch.Tensor:
    """a @ b, for use inside Functions: autograd does not see it.

    Sums are in float32 (float64 for float64) and rounded once, to the result's dtype. Float32
    operands multiply as torch's own setting says, see `product_precision`.

    Args:
        a: (M, K), any strides.
        b: (K, N), of a's dtype, any strides.
        out_dtype: the result's dtype, None for a's.
        accumulate_into: (M, N), contiguous, float32 (float64 for float64), to which the product is
            added in its dtype. It must be the caller's own, never a user's: its memory is used for
            the result unless something traces, so only the result may be used afterwards.
        engine: what `choose_engine` said in the forward; None asks now.

    Returns:
        (M, N): the product, or its sum with accumulate_into, in that one's dtype.
    """
    if engine is None:
        engine = choose_engine(a)
    if accumulate_into is not None:
        out_dtype = accumulate_into.dtype
    elif out_dtype is None:
        out_dtype = a.dtype
    m, k = a.shape
    if engine == "auto" and uses_cublas(m, b.shape[1], k, a.dtype, out_dtype=out_dtype):
        engine = "torch"
    if engine == "torch":
        return _torch_product(a, b, out_dtype, accumulate_into)
    precision = product_precision(a.dtype)
    invariant = engine == "invariant"
    if accumulate_into is None:
        return matmul_forward(a, b, out_dtype, precision, invariant)
    if is_plain((a, b, accumulate_into)):
        # Not through a registered op, which must not change its arguments.
        from ...kernels.matmul.matmul import matmul_accumulate

        return matmul_accumulate(accumulate_into, a, b, precision, invariant)
    return accumulate_into + matmul_forward(a, b, out_dtype, precision, invariant)


def _torch_product(
    a: torch.Tensor, b: torch.Tensor, out_dtype: torch.dtype, total: torch.Tensor | None
) -> torch.Tensor:
    """The same by PyTorch; operands are widened where the result is wider than they are."""
    computed = torch.promote_types(a.dtype, out_dtype)
    a, b = a.to(computed), b.to(computed)
    if total is None:
        return (a @ b).to(out_dtype)
    return total.addmm_(a, b) if is_plain((a, b, total)) else torch.addmm(total, a, b)


def product_sharding(*args: Any) -> list[tuple[list[Any], list[Any]]]:
    """DTensor's rule for a @ b: rows, columns and a batch stay sharded, sums come out partial."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    last = len(args[0].shape) - 1
    acceptable = [
        (Replicate(), Replicate(), Replicate()),
        (Shard(last - 1), Shard(last - 1), Replicate()),
        (Shard(last), Replicate(), Shard(last)),
        (Partial(), Shard(last), Shard(last - 1)),
        *((Shard(dim), Shard(dim), Shard(dim)) for dim in range(last - 1)),
    ]
    others = [None] * (len(args) - 2)
    return [([out], [a, b, *others]) for out, a, b in acceptable]


@kernel_op(
    kernels.matmul_forward,
    sharding=product_sharding,
    flops=lambda a, b, *_: 2 * a.numel() * b.shape[-1],
)
def matmul_forward(
    a: torch.Tensor,
    b: torch.Tensor,
    out_dtype: torch.dtype,
    precision: str,
    batch_invariant: bool,
) -> torch.Tensor:
    """a @ b, see matmul_forward in kernels/matmul/matmul.py."""
    return a.new_empty((*a.shape[:-1], b.shape[-1]), dtype=out_dtype)


def empty_head_gradients(
    x: torch.Tensor, weight: torch.Tensor, wanted: Sequence[int]
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """What the gradients of a head's operands look like: dx in x's dtype, dweight and dbias in
    float32 (float64 for float64), None where `wanted` has 0."""
    dx_wanted, dweight_wanted, dbias_wanted = map(bool, wanted)
    computed = torch.promote_types(x.dtype, torch.float32)
    return (
        x.new_empty(x.shape) if dx_wanted else None,
        x.new_empty(weight.shape, dtype=computed) if dweight_wanted else None,
        x.new_empty(weight.shape[:1], dtype=computed) if dbias_wanted else None,
    )
