"""Grouped linear layers: rows sorted by expert, each multiplied by its expert's weight."""

from collections.abc import Callable
from typing import Any

import torch

from .. import reference
from .core.apply import call
from .core.arguments import (
    check_constant,
    check_float_tensor,
    check_integers,
    check_shape,
)
from .core.catalog import Normal, Sample, operation
from .core.gradients import gradients
from .core.grouped_launchers import (
    grouped_bias_gradient,
    grouped_linear_forward,
    grouped_weight_gradient,
)
from .core.precision import autocast, product_precision
from .core.products import check_same_dtype, choose_engine
from .core.sharding import refuse_distributed
from .core.tensor_kinds import is_plain


class GroupedLinearFunction(torch.autograd.Function):
    """grouped_linear_forward; `settings` are its arguments that are no tensors."""

    @staticmethod
    def forward(
        x: torch.Tensor,
        weight: torch.Tensor,
        offsets: torch.Tensor,
        bias: torch.Tensor | None,
        transposed: bool,
        settings: tuple,
    ) -> torch.Tensor:
        stored = weight.mT if transposed else weight
        return grouped_linear_forward(x, stored, offsets, bias, None, 1, *settings)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
        x, weight, offsets, bias, ctx.transposed, ctx.settings = inputs
        ctx.save_for_backward(x, weight, offsets, bias)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, offsets, bias = ctx.saved_tensors
        for_x, for_weight, _, for_bias = ctx.needs_input_grad[:4]
        options = (ctx.transposed, ctx.settings, for_x, for_weight, for_bias)
        tensors = (dy, x, weight, bias, offsets)
        dx, dweight, dbias = gradients(_backward, _backward_formula, tensors, options)
        return dx, dweight, None, dbias, None, None


Gradients = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


def _backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    offsets: torch.Tensor,
    transposed: bool,
    settings: tuple,
    for_x: bool,
    for_weight: bool,
    for_bias: bool,
) -> Gradients:
    """(dx, dweight, dbias), each None unless it is wanted."""
    tf32, _ = settings
    dx = dweight = dbias = None
    if for_x:
        back = weight if transposed else weight.mT
        dx = grouped_linear_forward(dy, back, offsets, None, None, 1, *settings)
    if for_weight:
        # In the weight's own layout: a transpose of it would be copied when it is added up.
        rows, cols = (x, dy) if transposed else (dy, x)
        dweight = grouped_weight_gradient(rows, cols, offsets, None, None, tf32)
    if for_bias:
        dbias = grouped_bias_gradient(dy, offsets, None, None, None)
    return dx, dweight, dbias


def _backward_formula(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    offsets: torch.Tensor,
    transposed: bool,
    settings: tuple,
    *wanted: bool,
) -> Gradients:
    """What _backward computes, in PyTorch."""
    given = {"x": x, "weight": weight, "bias": bias}
    variables = {name: given[name] for name, want in zip(given, wanted, strict=True) if want}

    def forward(variables: dict[str, Any]) -> torch.Tensor:
        arguments = {**given, **variables}
        return reference.grouped_linear(**arguments, offsets=offsets, transposed=transposed)

    _, pullback, *_ = torch.func.vjp(forward, variables)
    (found,) = pullback(dy)
    return found.get("x"), found.get("weight"), found.get("bias")


def make_offsets(*places: int) -> Callable[[str | torch.device], torch.Tensor]:
    """For samples: where experts begin."""
    return lambda device: torch.tensor(places, dtype=torch.int32, device=device)


@operation(
    reference=reference.grouped_linear,
    samples=(
        Sample("smallest", x=(3, 2), weight=(2, 3, 2), offsets=make_offsets(0, 2, 3)),
        Sample(
            "an expert without rows, biases",
            x=(40, 24),
            weight=(3, 35, 24),
            offsets=make_offsets(0, 19, 19, 40),
            bias=(3, 35),
        ),
        Sample(
            "transposed, rows of no expert, long sums",
            x=(23, 70),
            weight=Normal((4, 70, 9), scale=0.3),
            offsets=make_offsets(0, 0, 17, 18, 18),
            bias=(4, 9),
            transposed=True,
        ),
        Sample("all to one", x=(33, 8), weight=(3, 8, 8), offsets=make_offsets(0, 0, 33, 33)),
        Sample("no row has one", x=(5, 3), weight=(2, 4, 3), offsets=make_offsets(0, 0, 0)),
        Sample("one feature", x=(5, 1), weight=(1, 1, 1), offsets=make_offsets(0, 5), bias=(1, 1)),
        Sample("nothing to sum", x=(3, 0), weight=(1, 4, 0), offsets=make_offsets(0, 2)),
        Sample("no rows", x=(0, 5), weight=(2, 4, 5), offsets=make_offsets(0, 0, 0), bias=(2, 4)),
    ),
)
def grouped_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    offsets: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    transposed: bool = False,
) -> torch.Tensor:
    """A linear layer for each group of rows: x[r] @ weight[e]^T + bias[e] for the rows r of e.

    Which rows an expert has is known on the device alone, and nothing waits for the host. Products
    are summed in float32 (float64 for float64) and rounded once; float32 operands multiply in full
    precision, or in TF32 where torch allows it. Gradients have the same bits every time, and those
    of an expert without rows are zeros.

    Args:
        x: (M, K), sorted by expert, float16, bfloat16, float32 or float64. Rows with a unit last
            stride are read in place, other layouts are copied.
        weight: (E, N, K) with at least one expert, of x's dtype, any strides.
        offsets: (E + 1,), int32 or int64: expert e has the rows from offsets[e] up to
            offsets[e + 1]. It rises from 0 to at most M; rows from offsets[E] on give 0. On a GPU
            that is not looked at: other numbers give wrong results there, and no access outside
            of the tensors.
        bias: (E, N), of x's dtype, or None.
        transposed: weight is (E, K, N), as gpt-oss stores it.

    Returns:
        (M, N), of x's dtype, or autocast's; any number of times differentiable in x, weight, bias.
        The reference on a CPU computes every expert on all rows where something traces it.

    Raises:
        TypeError: an argument is no tensor, or of a dtype that does not fit.
        ValueError: a shape, device or offset does not fit.

    Example:
        >>> import torch, fastattn
        >>> x, weight = torch.ones(4, 8), torch.ones(3, 2, 8)
        >>> fastattn.grouped_linear(x, weight, torch.tensor([0, 1, 1, 4])).shape
        torch.Size([4, 2])

    Source: Gale et al., "MegaBlocks: Efficient Sparse Training with Mixture-of-Experts" (2022).
    """
    _check(x, weight, offsets, bias, transposed)
    x, weight, bias = autocast(x, weight, bias)
    check_same_dtype("grouped_linear", "weight", weight, "x", x)
    if bias is not None:
        check_same_dtype("grouped_linear", "bias", bias, "x", x)
    engine = choose_engine(x)
    if engine == "torch":
        return reference.grouped_linear(x, weight, offsets, bias, transposed=transposed)
    settings = (int(product_precision(x.dtype) == "tf32"), engine == "invariant")
    return call(GroupedLinearFunction, x, weight, offsets, bias, bool(transposed), settings)


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    offsets: torch.Tensor,
    bias: torch.Tensor | None,
    transposed: bool,
) -> None:
    op = "grouped_linear"
    refuse_distributed(op, x=x, weight=weight, offsets=offsets, bias=bias)
    check_float_tensor(op, "x", x)
    if x.dim() != 2:
        raise ValueError(f"{op}: x must have the shape (M, K), got {tuple(x.shape)}")
    check_float_tensor(op, "weight", weight, like=x)
    k = x.shape[1]
    wanted = f"(E, {k}, N)" if transposed else f"(E, N, {k})"
    if weight.dim() != 3 or weight.shape[1 if transposed else 2] != k or weight.shape[0] == 0:
        raise ValueError(
            f"{op}: weight must have the shape {wanted} with at least one expert for an x of shape "
            f"{tuple(x.shape)}, got {tuple(weight.shape)}"
        )
    experts, n = weight.shape[0], weight.shape[2 if transposed else 1]
    if bias is not None:
        check_float_tensor(op, "bias", bias, like=x)
        check_shape(op, "bias", bias, (experts, n))
    check_constant(op, "offsets", offsets, x)
    check_integers(op, "offsets", offsets)
    check_shape(op, "offsets", offsets, (experts + 1,))
    # A fake tensor has no numbers, whatever its device.
    if offsets.device.type != "cpu" or not is_plain((offsets,)):
        return
    # In Python's integers: differences of 64 bits come round.
    places = offsets.tolist()
    if places[0] != 0 or sorted(places) != places or places[-1] > x.shape[0]:
        raise ValueError(f"{op}: offsets must rise from 0 to at most {x.shape[0]}, got {places}")
