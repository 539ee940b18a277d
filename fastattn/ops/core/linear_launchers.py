"""The launchers of linear, how DTensor may shard what they take, and the backward's products."""

from typing import TYPE_CHECKING, Any

import torch

from ...reference import torch_functions as F
from .lazy_imports import lazy_module
from .precision import product_precision
from .products import Engine, uses_cublas
from .registration import kernel_op
from .sharding import is_distributed, rowwise
from .tensor_kinds import is_plain

if TYPE_CHECKING:
    from ...kernels.matmul import linear_backward as backward_kernels
    from ...kernels.matmul import matmul as product_kernels
else:
    backward_kernels = lazy_module("fastattn.kernels.matmul.linear_backward")
    product_kernels = lazy_module("fastattn.kernels.matmul.matmul")

Placements = list[tuple[list[Any], list[Any]]]


def shard_rows_or_features(
    rows: tuple[int, ...],
    features: tuple[int, ...],
    outputs: tuple[int, ...],
    sums: tuple[int, ...],
) -> Any:
    """DTensor's rule: rows stay sharded along any leading dimension, or features along the last.

    Args:
        rows: places of the arguments (..., columns), of which the first is never None.
        features: places of the arguments that have the features of the output: in their last
            dimension if they are made of rows, in their first if they are parameters.
        outputs: places of the outputs that are made of rows.
        sums: places of the outputs that are sums over rows.
    """
    by_rows = rowwise(rows_in=rows, rows_out=outputs, summed_out=sums)

    def rule(*args: Any) -> Placements:
        from torch.distributed.tensor import Replicate, Shard

        last = Shard(len(args[rows[0]].shape) - 1)
        of_outputs: list[Any] = [None] * (len(outputs) + len(sums))
        for place in outputs:
            of_outputs[place] = last
        for place in sums:
            of_outputs[place] = Shard(0)
        of_inputs = [
            None
            if not hasattr(arg, "shape")
            else Replicate()
            if place not in features
            else last
            if place in rows
            else Shard(0)
            for place, arg in enumerate(args)
        ]
        return [*by_rows(*args), (of_outputs, of_inputs)]

    return rule


_rows_or_features_out = shard_rows_or_features((0, 3), (1, 2, 3), outputs=(0, 1), sums=())


def _forward_sharding(*args: Any) -> Placements:
    """Rows or features out stay sharded; features in too, where nothing follows the product."""
    from torch.distributed.tensor import Partial, Shard

    x, _, bias, residual, _, keep, _, activation, _ = args
    acceptable = _rows_or_features_out(*args)
    if bias is not None or residual is not None or activation is not None or keep:
        return acceptable
    # The product then comes out as partial sums.
    of_inputs = [Shard(len(x.shape) - 1), Shard(1), *[None] * 7]
    return [*acceptable, ([Partial(), Partial()], of_inputs)]


@kernel_op(
    product_kernels.linear_forward,
    sharding=_forward_sharding,
    flops=lambda x, weight, *_: 2 * x.numel() * weight.shape[0],
)
def linear_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out_dtype: torch.dtype,
    # An int and no bool: DTensor hears integers and what follows one, see `sharding.check_order`.
    keep: int,
    precision: str,
    activation: str | None,
    batch_invariant: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(y, what was activated), see linear_forward in kernels/matmul/matmul.py."""
    shape = (*x.shape[:-1], weight.shape[0])
    return x.new_empty(shape, dtype=out_dtype), x.new_empty(shape) if keep else None


@kernel_op(
    backward_kernels.linear_backward,
    sharding=shard_rows_or_features((0, 1), (0, 1), outputs=(0,), sums=(1,)),
)
def linear_backward(
    dy: torch.Tensor,
    saved: torch.Tensor | None,
    dpre_dtype: torch.dtype,
    # An int and no bool: DTensor hears integers and what follows one, see `sharding.check_order`.
    with_bias: int,
    from_output: int,
    activation: str | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(dpre unless that is dy, dbias), see kernels/matmul/linear_backward.py."""
    is_dy = activation is None and dy.dtype is dpre_dtype
    dpre = None if is_dy else dy.new_empty(dy.shape, dtype=dpre_dtype)
    computed = torch.promote_types(dy.dtype, torch.float32)
    return dpre, dy.new_empty(dy.shape[-1:], dtype=computed) if with_bias else None


def _weight_gradient_sharding(*args: Any) -> Placements:
    """Sums over rows come out partial; columns of either operand stay sharded."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    last = len(args[0].shape) - 1
    acceptable = [
        (Replicate(), Replicate(), Replicate()),
        (Shard(0), Shard(last), Replicate()),
        (Shard(1), Replicate(), Shard(last)),
        *((Partial(), Shard(dim), Shard(dim)) for dim in range(last)),
    ]
    return [([out], [dpre, x, None, None]) for out, dpre, x in acceptable]


@kernel_op(
    product_kernels.linear_weight_gradient,
    sharding=_weight_gradient_sharding,
    flops=lambda dpre, x, *_: 2 * dpre.numel() * x.shape[-1],
)
def linear_weight_gradient(
    dpre: torch.Tensor, x: torch.Tensor, out_dtype: torch.dtype, precision: str
) -> torch.Tensor:
    """dpre^T x, see linear_weight_gradient in kernels/matmul/matmul.py."""
    return x.new_empty((dpre.shape[-1], x.shape[-1]), dtype=out_dtype)


def apply_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, engine: Engine
) -> torch.Tensor:
    """x @ weight^T + bias, rounded once: (..., K), (N, K) and (N,) to (..., N)."""
    n, k = weight.shape
    if engine == "torch" or (engine == "auto" and uses_cublas(x.shape[0], n, k, x.dtype)):
        return F.linear(x, weight, bias)
    settings = (x.dtype, 0, product_precision(x.dtype), None, engine == "invariant")
    return linear_forward(x, weight, bias, None, *settings)[0]


def multiply_weight(
    dpre: torch.Tensor, weight: torch.Tensor, engine: Engine, total: torch.Tensor | None = None
) -> torch.Tensor:
    """dpre @ weight: (..., N) x (N, K), added to `total` (..., K) where that is given.

    `total` must be the caller's own: its memory may be used for the result.
    """
    n, k = weight.shape
    if engine == "auto" and uses_cublas(dpre.shape[0], k, n, dpre.dtype):
        if total is None:
            return dpre @ weight
        add = torch.Tensor.addmm_ if is_plain((dpre, weight, total)) else torch.addmm
        return add(total.reshape(-1, k), dpre.reshape(-1, n), weight).reshape(total.shape)
    if total is not None and is_distributed(dpre):
        # Sums over shards come out partial, which an epilogue would first add up.
        return total + multiply_weight(dpre, weight, engine)
    precision, invariant = product_precision(dpre.dtype), engine == "invariant"
    settings = (dpre.dtype, 0, precision, None, invariant)
    return linear_forward(dpre, weight.t(), None, total, *settings)[0]


def sum_over_rows(dpre: torch.Tensor, x: torch.Tensor, engine: Engine) -> torch.Tensor:
    """dpre^T @ x over all rows: (..., N) and (..., K) to (N, K)."""
    n, k = dpre.shape[-1], x.shape[-1]
    if engine == "auto" and uses_cublas(n, k, dpre.shape[0], dpre.dtype):
        return dpre.reshape(-1, n).t() @ x.reshape(-1, k)
    return linear_weight_gradient(dpre, x, x.dtype, product_precision(x.dtype))
