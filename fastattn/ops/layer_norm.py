"""LayerNorm, alone and with the residual addition before it."""

import torch

from .. import reference
from .core.backends import use_triton
from .core.catalog import Normal, Sample, make_seed, operation
from .core.norm import check_dtype, check_norm, check_residual, fused_norm
from .core.sharding import is_distributed
from .dropout import dropout


@operation(
    reference=reference.layer_norm,
    samples=(
        Sample("smallest", x=(2, 5), weight=(5,), bias=(5,)),
        Sample("several rows a tile", x=(3, 7, 64), weight=(64,), bias=(64,)),
        Sample("more rows than programs, odd width", x=(37, 130), weight=(130,), bias=(130,)),
        Sample("one dimension", x=(33,), weight=(33,), eps=1e-5),
        Sample("one element a row", x=(5, 1), weight=(1,), bias=(1,)),
        Sample("no weight", x=(2, 3, 96)),
        Sample("no bias", x=(2, 3, 96), weight=(96,)),
        Sample("exactly a power of two", x=(5, 2048), weight=(2048,), bias=(2048,)),
        Sample(
            "float32 parameters",
            x=(9, 40),
            weight=Normal((40,), torch.float32),
            bias=Normal((40,), torch.float32),
        ),
        Sample("float32 result", x=(9, 40), weight=(40,), bias=(40,), out_dtype=torch.float32),
        Sample("wide backward", x=(3, 9000), weight=(9000,), bias=(9000,)),
        Sample("wide forward", x=(2, 20001), weight=(20001,), bias=(20001,)),
        Sample("mean far from zero", x=Normal((4, 50), mean=100.0), weight=(50,), bias=(50,)),
        Sample("wide, mean far from zero", x=Normal((2, 20001), mean=100.0), weight=(20001,)),
        Sample("no rows", x=(0, 16), weight=(16,), bias=(16,)),
    ),
)
def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Layer normalization over the last dimension.

    y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias with the biased variance, computed in
    float32 (float64 for float64) whatever the inputs' dtype; autocast does not change it.

    Args:
        x: (..., cols), float16, bfloat16, float32 or float64. Any strides; rows with a unit last
            stride at one common distance are read in place, other layouts are copied.
        weight: (cols,), of any float dtype, or None for ones.
        bias: (cols,), of any float dtype, or None for zeros.
        eps: added to the variance.
        out_dtype: the dtype of y, to which it is rounded once; None is x's.

    Returns:
        y, shaped like x, any number of times differentiable in x, weight and bias.

    Raises:
        TypeError: an argument is no tensor or of an unsupported dtype.
        ValueError: a shape, device or value does not fit.

    Source: Ba, Kiros and Hinton, "Layer Normalization" (2016).

    Example:
        >>> y = fastattn.layer_norm(torch.randn(3, 8), torch.ones(8), torch.zeros(8))
        >>> y.shape
        torch.Size([3, 8])
    """
    check_norm("layer_norm", x, weight, bias, eps)
    check_dtype("layer_norm", "out_dtype", out_dtype, x)
    if not use_triton(x):
        return reference.layer_norm(x, weight, bias, eps, out_dtype=out_dtype)
    y, _ = fused_norm(x, weight, bias, eps, centered=True, out_dtype=out_dtype)
    return y


@operation(
    reference=reference.add_layer_norm,
    samples=(
        Sample("smallest", x=(2, 5), residual=(2, 5), weight=(5,), bias=(5,)),
        Sample("several rows a tile", x=(3, 7, 64), residual=(3, 7, 64), weight=(64,), bias=(64,)),
        Sample(
            "dropout on the branch",
            x=(37, 130),
            residual=(37, 130),
            weight=(130,),
            bias=(130,),
            dropout_p=0.25,
            seed=make_seed(7),
        ),
        Sample(
            "float32 residual stream",
            x=(9, 72),
            residual=Normal((9, 72), torch.float32),
            weight=(72,),
            bias=(72,),
        ),
        Sample(
            "float32 new residual",
            x=(9, 72),
            residual=(9, 72),
            weight=(72,),
            residual_dtype=torch.float32,
        ),
        Sample(
            "wide, with dropout",
            x=(3, 20001),
            residual=(3, 20001),
            weight=(20001,),
            bias=(20001,),
            dropout_p=0.5,
            seed=make_seed(2**40 + 3),
        ),
    ),
)
def add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    dropout_p: float = 0.0,
    residual_dtype: torch.dtype | None = None,
    seed: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add a residual branch to its stream and normalize the sum, in one kernel.

    new_residual = dropout(x) + residual; y = layer_norm(new_residual).

    Args:
        x: (..., cols), the branch; see `layer_norm` for dtypes and strides.
        residual: the stream, shaped like x, of any float dtype.
        weight, bias, eps: as in `layer_norm`.
        dropout_p: the probability, in [0, 1), that an element of x is zeroed.
        residual_dtype: the dtype of new_residual; None is the promotion of x's and residual's.
        seed: the seed of the dropout, int64 of one element; None draws one from PyTorch.
        out_dtype: the dtype of y; None is x's.

    Returns:
        (y, new_residual), shaped like x. Both are differentiable in x, residual,
        weight and bias, any number of times.

    Raises:
        TypeError, ValueError: as in `layer_norm`.

    Example:
        >>> branch, residual = torch.randn(2, 3, 8)
        >>> y, summed = fastattn.add_layer_norm(branch, residual, torch.ones(8), torch.zeros(8))
        >>> torch.equal(summed, branch + residual)
        True
    """
    check_norm("add_layer_norm", x, weight, bias, eps)
    check_residual("add_layer_norm", x, residual, dropout_p, residual_dtype, seed)
    check_dtype("add_layer_norm", "out_dtype", out_dtype, x)
    if dropout_p > 0.0 and is_distributed(x):
        x, dropout_p = dropout(x, dropout_p, seed=seed), 0.0
    options = {
        "dropout_p": dropout_p,
        "residual_dtype": residual_dtype,
        "seed": seed,
        "out_dtype": out_dtype,
    }
    if not use_triton(x):
        return reference.add_layer_norm(x, residual, weight, bias, eps, **options)
    return fused_norm(x, weight, bias, eps, centered=True, residual=residual, **options)
