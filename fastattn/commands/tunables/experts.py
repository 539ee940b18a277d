"""The products of experts, for `python -m fastattn tune`."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ... import reference
from ...checking import Change, enough_neighbours, measure_reference
from ...kernels.config import Target
from ...reference.mixture import ExpertOrder, order_by_expert
from .case import Case, Tunable

PRECISION = "ieee"
"""How float32 is multiplied in a dry run; 16 bits have one way."""

RESULTS = {
    "grouped_linear": "output",
    "experts_forward": "output",
    "experts_backward": "dh",
    "grouped_weight": "dweight",
}
"""What the kernels compute, in the accuracy rule's names."""

Compute = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def experts_case(
    kernel: str,
    tokens: int,
    experts: int,
    k: int,
    columns: int,
    inside: int,
    dtype: torch.dtype,
    device: str,
) -> Case:
    """A product of gated experts whose k of a token are random.

    `columns` are those of tokens, `inside` those between the two products of an expert. The plain
    product is the second one, and the weight's gradient that of the second weight.
    """
    from ...kernels.experts.activated import experts_backward, experts_forward
    from ...kernels.experts.grouped_gradients import grouped_weight_gradient
    from ...kernels.experts.grouped_linear import grouped_linear_forward
    from ...kernels.tuning import bucket

    torch.manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype)

    ids = torch.rand(tokens, experts, device=device).argsort(-1)[:, :k]
    order = order_by_expert(ids, experts)
    rows = tokens * k
    first = random(experts, 2 * inside, columns) * columns**-0.5
    second = random(experts, columns, inside) * inside**-0.5
    x, h, a, dout = (
        random(tokens, columns),
        random(rows, 2 * inside),
        random(rows, inside),
        random(tokens, columns),
    )
    scale = random(rows)
    places = (order.slots, order.tokens, order.offsets)
    formula = (None, 1.0, 0.0, False)

    def launch(config: Any) -> torch.Tensor:
        if kernel == "grouped_linear":
            return grouped_linear_forward(
                a, second, order.offsets, None, None, 1, 0, False, config=config
            )
        if kernel == "experts_forward":
            given = (x, first, None, order.tokens, order.offsets)
            return experts_forward(*given, *formula, 1, 0, "silu", False, config=config)[0]
        if kernel == "experts_backward":
            given = (dout, h, second, scale, *places)
            return experts_backward(*given, *formula, 0, "silu", False, config=config)[0]
        return grouped_weight_gradient(dout, a, order.offsets, order.tokens, None, 0, config=config)

    operands: dict[str, tuple[torch.Tensor, torch.Tensor]] = {
        "grouped_linear": (a, second),
        "experts_forward": (x, first),
        "experts_backward": (h, second),
        "grouped_weight": (a, dout),
    }
    given = operands[kernel]
    compute = functools.partial(compute_result, kernel, order, second, scale, dout)

    def run(change: Change) -> dict[str, torch.Tensor]:
        shared = (change(second), change(scale), change(dout))
        own = (change(given[0]), change(given[1]))
        return {RESULTS[kernel]: compute_result(kernel, order, *shared, *own)}

    features = {
        "rows": bucket(-(-rows // experts)),
        "n": bucket(columns if kernel in ("grouped_linear", "grouped_weight") else inside),
        "k": bucket(columns if kernel in ("experts_forward", "experts_backward") else inside),
        "dtype": str(dtype)[6:],
        "precision": PRECISION,
    }
    measured = measure_reference(run, enough_neighbours(max(x.numel() for x in given)))
    return Case(features, launch, functools.partial(compute, *given), RESULTS[kernel], measured)


def compute_result(
    kernel: str,
    order: ExpertOrder,
    second: torch.Tensor,
    scale: torch.Tensor,
    dout: torch.Tensor,
    one: torch.Tensor,
    other: torch.Tensor,
) -> torch.Tensor:
    """What a kernel computes of its two operands, in PyTorch."""
    tokens = order.tokens.long()
    if kernel == "grouped_linear":
        return reference.grouped_linear(one, other, order.offsets)
    if kernel == "experts_forward":
        return reference.swiglu(reference.grouped_linear(one[tokens], other, order.offsets))
    if kernel == "experts_backward":
        h = one.detach().requires_grad_()
        y = reference.grouped_linear(reference.swiglu(h), other, order.offsets)
        scaled = y * scale[order.slots.long(), None]
        return torch.autograd.grad(scaled, h, dout[tokens])[0]
    weight = second.detach().requires_grad_()
    y = reference.grouped_linear(one, weight, order.offsets)
    return torch.autograd.grad(y, weight, other[tokens])[0]


def experts_candidates(kernel: str, target: Target, **features: Any) -> Sequence[Any]:
    from ...kernels.experts import config

    return config.experts_candidates(kernel, target, **features)


def experts_rule(kernel: str, target: Target, **features: Any) -> Any:
    from ...kernels.experts import config

    return config.RULES[kernel](target, **features)


SHAPES = (
    (2048, 4, 2, 4096, 14336),
    (1024, 32, 8, 2048, 768),
    (2048, 16, 4, 2880, 2880),
    (32, 4, 2, 4096, 14336),
    (16, 32, 8, 2048, 768),
    (4096, 16, 8, 2048, 768),
)
"""Tokens, experts, k, columns and what is inside: layers of Mixtral, Qwen3 and gpt-oss, with fewer
experts and as many rows for each, which is what a configuration hangs on."""

EXPERTS = tuple(
    Tunable(
        kernel,
        shapes=[(*shape, dtype) for dtype in (torch.bfloat16, torch.float16) for shape in SHAPES],
        tiny_shapes=[(20, 3, 2, 40, 24, torch.float32)],
        case=functools.partial(experts_case, kernel),
        candidates=functools.partial(experts_candidates, kernel),
        rule=functools.partial(experts_rule, kernel),
    )
    for kernel in RESULTS
)
