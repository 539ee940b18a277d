"""RMSNorm, alone and with the residual addition before it."""

import torch

from .. import reference
from ..reference.rms_norm import default_eps
from .core.backends import use_triton
from .core.catalog import Normal, Sample, make_seed, operation
from .core.norm import (
    Casting,
    check_casting,
    check_dtype,
    check_norm,
    check_residual,
    fused_norm,
)
from .core.sharding import is_distributed
from .dropout import dropout


@operation(
    reference=reference.rms_norm,
    samples=(
        Sample("smallest", x=(2, 5), weight=(5,), bias=(5,), eps=1e-3),
        Sample("several rows a tile", x=(3, 7, 64), weight=(64,), eps=1e-6),
        Sample(
            "more rows than programs, odd width", x=(37, 130), weight=(130,), bias=(130,), eps=1e-5
        ),
        Sample("one dimension", x=(33,), weight=(33,), eps=1e-5),
        Sample("one element a row", x=(5, 1), weight=(1,), eps=0.1),
        Sample("no weight", x=(2, 3, 96), eps=1e-6),
        Sample("exactly a power of two", x=(5, 2048), weight=(2048,), eps=1e-6),
        Sample("float32 weight", x=(9, 40), weight=Normal((40,), torch.float32), eps=1e-6),
        Sample("Llama's casting", x=(9, 72), weight=(72,), eps=1e-6, casting="llama"),
        Sample(
            "Gemma's offset", x=(9, 72), weight=(72,), eps=1e-6, weight_offset=1.0, casting="gemma"
        ),
        Sample("T5's casting", x=(9, 72), weight=(72,), eps=1e-6, casting="t5"),
        Sample(
            "Llama's casting, float32 weight and result",
            x=(9, 72),
            weight=Normal((72,), torch.float32),
            eps=1e-6,
            casting="llama",
            out_dtype=torch.float32,
        ),
        Sample("wide backward", x=(3, 9000), weight=(9000,), bias=(9000,), eps=1e-6),
        Sample("wide forward", x=(2, 20001), weight=(20001,), eps=1e-6),
        Sample("large values", x=Normal((4, 50), scale=100.0, mean=1000.0), weight=(50,), eps=1e-6),
        Sample("no rows", x=(0, 16), weight=(16,), eps=1e-6),
    ),
)
def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float | None = None,
    *,
    bias: torch.Tensor | None = None,
    weight_offset: float = 0.0,
    casting: Casting = "float32",
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Root-mean-square normalization over the last dimension.

    y = x / sqrt(mean(x^2) + eps) * (weight + weight_offset) + bias, computed in float32 (float64
    for float64) whatever the inputs' dtype; autocast does not change it.

    Args:
        x: (..., cols), float16, bfloat16, float32 or float64. Any strides; rows with a unit last
            stride at one common distance are read in place, other layouts are copied.
        weight: (cols,), of any float dtype, or None for ones (then weight_offset has no effect).
        eps: added to the mean of squares; None is the machine epsilon of the dtype computed in,
            as in torch.nn.RMSNorm.
        bias: (cols,), of any float dtype, or None.
        weight_offset: added to the weight; 1.0 in Gemma.
        casting: what is rounded before the weight multiplies: "float32" nothing (as torch; "gemma"
            says the same), "llama" the normalized x to x's dtype, "t5" to the weight's dtype if
            that has 16 bits.
        out_dtype: the dtype of y, to which it is rounded once; None is x's. Hugging Face's Llama
            gives the promotion of x's and the weight's, T5 the weight's.

    Returns:
        y, shaped like x, any number of times differentiable in x, weight and bias.

    Raises:
        TypeError: an argument is no tensor or of an unsupported dtype.
        ValueError: a shape, device or value does not fit.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019).

    Example:
        >>> y = fastattn.rms_norm(torch.tensor([[3.0, 3.0, 3.0]]), torch.ones(3), eps=0.0)
        >>> y.tolist()
        [[1.0, 1.0, 1.0]]
    """
    check_norm("rms_norm", x, weight, bias, eps)
    check_casting("rms_norm", casting)
    check_dtype("rms_norm", "out_dtype", out_dtype, x)
    if eps is None:
        eps = default_eps(x)
    options = {"weight_offset": weight_offset, "casting": casting, "out_dtype": out_dtype}
    if not use_triton(x):
        return reference.rms_norm(x, weight, eps, bias=bias, **options)
    y, _ = fused_norm(x, weight, bias, eps, centered=False, **options)
    return y


@operation(
    reference=reference.add_rms_norm,
    samples=(
        Sample("smallest", x=(2, 5), residual=(2, 5), weight=(5,), bias=(5,), eps=1e-3),
        Sample("several rows a tile", x=(3, 7, 64), residual=(3, 7, 64), weight=(64,), eps=1e-6),
        Sample(
            "dropout on the branch",
            x=(37, 130),
            residual=(37, 130),
            weight=(130,),
            eps=1e-6,
            dropout_p=0.25,
            seed=make_seed(7),
        ),
        Sample(
            "float32 residual stream",
            x=(9, 72),
            residual=Normal((9, 72), torch.float32),
            weight=(72,),
            eps=1e-6,
            casting="llama",
        ),
        Sample(
            "float32 new residual",
            x=(9, 72),
            residual=(9, 72),
            weight=(72,),
            bias=(72,),
            eps=1e-6,
            residual_dtype=torch.float32,
        ),
        Sample(
            "16 bits of a float32 branch",
            x=Normal((9, 72), torch.float32),
            residual=Normal((9, 72), torch.float32),
            weight=(72,),
            eps=1e-6,
            out_dtype=torch.bfloat16,
        ),
        Sample(
            "wide, with dropout",
            x=(3, 20001),
            residual=(3, 20001),
            weight=(20001,),
            eps=1e-6,
            dropout_p=0.5,
            seed=make_seed(2**40 + 3),
        ),
    ),
)
def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float | None = None,
    *,
    bias: torch.Tensor | None = None,
    weight_offset: float = 0.0,
    casting: Casting = "float32",
    dropout_p: float = 0.0,
    residual_dtype: torch.dtype | None = None,
    seed: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add a residual branch to its stream and normalize the sum, in one kernel.

    new_residual = dropout(x) + residual; y = rms_norm(new_residual).

    Args:
        x: (..., cols), the branch; see `rms_norm` for dtypes and strides.
        residual: the stream, shaped like x, of any float dtype.
        weight, eps, bias, weight_offset, casting: as in `rms_norm`.
        dropout_p: the probability, in [0, 1), that an element of x is zeroed.
        residual_dtype: the dtype of new_residual; None is the promotion of x's and residual's.
        seed: the seed of the dropout, int64 of one element; None draws one from PyTorch.
        out_dtype: the dtype of y; None is x's.

    Returns:
        (y, new_residual), shaped like x. Both are differentiable in x, residual,
        weight and bias, any number of times.

    Raises:
        TypeError, ValueError: as in `rms_norm`.

    Example:
        >>> branch, residual = torch.randn(2, 3, 8)
        >>> y, summed = fastattn.add_rms_norm(branch, residual, torch.ones(8), eps=1e-6)
        >>> torch.equal(summed, branch + residual)
        True
    """
    check_norm("add_rms_norm", x, weight, bias, eps)
    check_residual("add_rms_norm", x, residual, dropout_p, residual_dtype, seed)
    if dropout_p > 0.0 and is_distributed(x):
        x, dropout_p = dropout(x, dropout_p, seed=seed), 0.0
    check_casting("add_rms_norm", casting)
    check_dtype("add_rms_norm", "out_dtype", out_dtype, x)
    if eps is None:
        eps = default_eps(x)
    options = {
        "bias": bias,
        "weight_offset": weight_offset,
        "casting": casting,
        "dropout_p": dropout_p,
        "residual_dtype": residual_dtype,
        "seed": seed,
        "out_dtype": out_dtype,
    }
    if not use_triton(x):
        return reference.add_rms_norm(x, residual, weight, eps, **options)
    return fused_norm(x, weight, residual=residual, eps=eps, centered=False, **options)
