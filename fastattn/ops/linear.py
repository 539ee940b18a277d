"""A linear layer with its activation and residual in the product's epilogue."""

from typing import Any, Literal

import torch

from .. import reference
from .core.apply import call
from .core.arguments import check_choice, check_float_tensor, check_shape
from .core.catalog import Normal, Sample, operation
from .core.gradients import gradients
from .core.linear_launchers import linear_backward, linear_forward, multiply_weight, sum_over_rows
from .core.precision import autocast, product_precision
from .core.products import Engine, check_same_dtype, choose_engine, uses_cublas

Activation = Literal[
    "relu", "leaky_relu", "relu_squared", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh"
]

ACTIVATIONS = (
    "relu",
    "leaky_relu",
    "relu_squared",
    "gelu",
    "gelu_tanh",
    "silu",
    "sigmoid",
    "tanh",
)

SLOPE_FROM_OUTPUT = ("relu", "leaky_relu", "sigmoid", "tanh")
"""Activations whose derivative their value tells. The output is then all that is saved, unless a
residual is in it; for the others, and beside a residual, the forward keeps what it activates. Not
relu_squared: its value leaves float16 where its slope does not."""

SEVERAL_PASSES = ("relu_squared",)
"""Activations that PyTorch computes by more than one kernel."""


class LinearFunction(torch.autograd.Function):
    """(y, what is activated or None): linear_forward; `keep` asks for the second."""

    returned = 1

    @staticmethod
    def forward(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        activation: str | None,
        keep: bool,
        engine: Engine,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        out_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
        precision, invariant = product_precision(x.dtype), engine == "invariant"
        settings = (out_dtype, int(keep), precision, activation, invariant)
        return linear_forward(x, weight, bias, residual, *settings)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        x, weight, bias, residual, activation, _, ctx.engine = inputs
        y, pre = output
        ctx.activation = activation
        ctx.from_output = activation in SLOPE_FROM_OUTPUT and residual is None
        ctx.set_materialize_grads(False)
        if pre is not None:
            ctx.mark_non_differentiable(pre)
        ctx.residual_dtype = None if residual is None else residual.dtype
        ctx.save_for_backward(x, weight, bias, y if ctx.from_output else pre)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor | None, *_: None) -> tuple:
        if dy is None:
            return (None,) * 7
        x, weight, bias, saved = ctx.saved_tensors
        *wanted, for_residual = ctx.needs_input_grad[:4]
        dresidual = dy.to(ctx.residual_dtype) if for_residual else None
        if not any(wanted):
            return None, None, None, dresidual, None, None, None
        if saved is not None:
            # It may be the output, whose history must not be walked: it is a function of the rest.
            saved = saved.detach()
        tensors = (dy, x, weight, bias, saved)
        options = (ctx.activation, ctx.from_output, ctx.engine, *wanted)
        found = gradients(_linear_gradients, _linear_gradients_formula, tensors, options)
        return *found, dresidual, None, None, None


Gradients = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


def _linear_gradients(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    saved: torch.Tensor | None,
    activation: str | None,
    from_output: bool,
    engine: Engine,
    for_x: bool,
    for_weight: bool,
    for_bias: bool,
) -> Gradients:
    """(dx, dweight, dbias), each None unless it is wanted."""
    if activation is not None and saved is None:
        # The forward was not told that gradients would be wanted.
        precision, invariant = product_precision(x.dtype), engine == "invariant"
        settings = (x.dtype, 0, precision, None, invariant)
        saved, _ = linear_forward(x, weight, bias, None, *settings)
    dpre, dbias = linear_backward(dy, saved, x.dtype, int(for_bias), int(from_output), activation)
    dpre = dy if dpre is None else dpre
    return (
        multiply_weight(dpre, weight, engine) if for_x else None,
        sum_over_rows(dpre, x, engine) if for_weight else None,
        None if dbias is None else dbias.to(x.dtype),
    )


def _linear_gradients_formula(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    saved: torch.Tensor | None,
    activation: str | None,
    from_output: bool,
    engine: Engine,
    *wanted: bool,
) -> Gradients:
    """What _linear_gradients computes, in PyTorch."""
    given = {"x": x, "weight": weight, "bias": bias}
    variables = {name: given[name] for name, want in zip(given, wanted, strict=True) if want}

    def forward(variables: dict[str, Any]) -> torch.Tensor:
        return reference.linear(**{**given, **variables}, activation=activation)

    _, pullback, *_ = torch.func.vjp(forward, variables)
    (found,) = pullback(dy.to(x.dtype))
    return found.get("x"), found.get("weight"), found.get("bias")


@operation(
    reference=reference.linear,
    samples=(
        Sample(
            "smallest",
            x=(3, 4),
            weight=(2, 4),
            bias=(2,),
            activation="gelu",
            residual=(3, 2),
        ),
        Sample(
            "bias, silu and residual",
            x=(3, 7, 24),
            weight=(40, 24),
            bias=(40,),
            activation="silu",
            residual=(3, 7, 40),
        ),
        Sample("plain", x=(2, 9, 24), weight=(40, 24)),
        Sample("odd sizes, several tiles", x=(67, 70), weight=(35, 70), bias=(35,)),
        Sample("relu", x=(37, 20), weight=(33, 20), bias=(33,), activation="relu"),
        Sample("leaky relu", x=(9, 20), weight=(33, 20), activation="leaky_relu"),
        Sample("relu squared", x=(9, 20), weight=(33, 20), activation="relu_squared"),
        Sample("gelu tanh", x=(9, 20), weight=(33, 20), bias=(33,), activation="gelu_tanh"),
        Sample("sigmoid", x=(9, 20), weight=(33, 20), bias=(33,), activation="sigmoid"),
        Sample("tanh", x=(9, 20), weight=(33, 20), bias=(33,), activation="tanh"),
        Sample("tanh and residual", x=(9, 20), weight=(3, 20), activation="tanh", residual=(9, 3)),
        Sample(
            "residual in float32",
            x=(9, 20),
            weight=(33, 20),
            bias=(33,),
            residual=Normal((9, 33), dtype=torch.float32),
        ),
        Sample("long sums, split", x=(5, 1500), weight=(6, 1500), bias=(6,), activation="relu"),
        Sample("many rows", x=(300, 8), weight=(8, 8), bias=(8,), activation="relu"),
        Sample("one dimension", x=(24,), weight=(40, 24), bias=(40,)),
        Sample("one feature", x=(5, 1), weight=(1, 1), bias=(1,)),
        Sample("no features in", x=(5, 0), weight=(4, 0), bias=(4,)),
        Sample("no rows", x=(0, 5), weight=(4, 5), bias=(4,), activation="relu"),
    ),
)
def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: Activation | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """activation(x @ weight^T + bias) + residual, in one kernel.

    Products are summed in float32 (float64 for float64), everything else follows in that dtype, and
    the result is rounded once. Of infinity the activations are their limits, but on the reference
    what PyTorch's are on that CPU, NaN for some. Float32 operands multiply in full precision, or in
    TF32 where torch allows it. Autocast casts x, weight and bias; the residual keeps its dtype.

    Without an activation and a residual this is PyTorch's own product on a GPU (cuBLAS), unless
    `backend("triton")` asks for the kernel; with them, the products of the backward are. From 2048
    columns of x on it is PyTorch's with an activation as well, which then sees a rounded sum: that
    is predicted to be faster.

    For the backward, relu, leaky_relu, sigmoid and tanh need nothing but the output, unless a
    residual is added to it. With the other activations, or beside a residual, the pre-activation is
    kept in x's dtype when gradients are wanted, and computed again if that was not foreseen.

    Args:
        x: (..., K), float16, bfloat16, float32 or float64. Any strides; matrices with a unit stride
            along either dimension, and rows at one common distance, are read in place.
        weight: (N, K), of x's dtype, any strides.
        bias: (N,), of x's dtype, or None.
        activation: None, "relu", "leaky_relu" (slope 0.01), "relu_squared", "gelu", "gelu_tanh",
            "silu", "sigmoid" or "tanh".
        residual: (..., N), of any float dtype, or None.

    Returns:
        (..., N), of x's dtype, or what torch promotes it to beside a residual of another dtype; any
        number of times differentiable in all tensors.

    Raises:
        TypeError: an argument is no tensor, or of a dtype that does not fit.
        ValueError: a shape, device or activation does not fit.

    Example:
        >>> x, weight, bias = torch.randn(3, 8), torch.randn(4, 8), torch.randn(4)
        >>> y = fastattn.linear(x, weight, bias, activation="relu")
        >>> torch.testing.assert_close(y, (x @ weight.T + bias).relu())
    """
    _check(x, weight, bias, activation, residual)
    x, weight, bias = autocast(x, weight, bias)
    check_same_dtype("linear", "weight", weight, "x", x)
    if bias is not None:
        check_same_dtype("linear", "bias", bias, "x", x)
    engine = choose_engine(x)
    n, k = weight.shape
    activated = activation is not None
    epilogue = residual is not None or activation in SEVERAL_PASSES
    sizes = (x.shape[0], n, k, x.dtype)
    if engine == "torch" or (
        engine == "auto" and uses_cublas(*sizes, activation=activated, epilogue=epilogue)
    ):
        return reference.linear(x, weight, bias, activation=activation, residual=residual)
    from_output = activation in SLOPE_FROM_OUTPUT and residual is None
    keep = activated and not from_output and _wants_gradients(x, weight, bias)
    if x.dim() == 1:
        x, residual = x[None], None if residual is None else residual[None]
        return call(LinearFunction, x, weight, bias, residual, activation, keep, engine)[0][0]
    return call(LinearFunction, x, weight, bias, residual, activation, keep, engine)[0]


def _wants_gradients(*tensors: torch.Tensor | None) -> bool:
    wanted = any(tensor is not None and tensor.requires_grad for tensor in tensors)
    return wanted and torch.is_grad_enabled()


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    residual: torch.Tensor | None,
) -> None:
    op = "linear"
    check_float_tensor(op, "x", x)
    if x.dim() == 0:
        raise ValueError(f"{op}: x must have at least one dimension, got a scalar")
    check_float_tensor(op, "weight", weight, like=x)
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"{op}: weight must have the shape (N, {x.shape[-1]}) for an x of shape "
            f"{tuple(x.shape)}, got {tuple(weight.shape)}"
        )
    if bias is not None:
        check_float_tensor(op, "bias", bias, like=x)
        check_shape(op, "bias", bias, weight.shape[:1])
    if residual is not None:
        check_float_tensor(op, "residual", residual, like=x)
        check_shape(op, "residual", residual, (*x.shape[:-1], weight.shape[0]))
    if activation is not None:
        check_choice(op, "activation", activation, ACTIVATIONS)
