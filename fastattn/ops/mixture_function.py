"""The mixture of experts' launchers as registered ops, and the Function around them."""

from typing import TYPE_CHECKING, Any

import torch

from .. import reference
from ..reference.mixture import ExpertOrder
from .core.gradients import gradients
from .core.grouped_launchers import (
    grouped_bias_gradient,
    grouped_linear_forward,
    grouped_weight_gradient,
)
from .core.lazy_imports import lazy_module
from .core.products import Engine, product
from .core.registration import kernel_op

if TYPE_CHECKING:
    from ..kernels.experts import activated as kernels
    from ..kernels.experts import combine as combine_kernels
else:
    kernels = lazy_module("fastattn.kernels.experts.activated")
    combine_kernels = lazy_module("fastattn.kernels.experts.combine")


@kernel_op(
    kernels.experts_forward,
    flops=lambda x, w1, b1, tokens, *_: 2 * tokens.shape[0] * w1.shape[1] * w1.shape[2],
)
def experts_forward(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    tokens: torch.Tensor,
    offsets: torch.Tensor,
    limit: float | None,
    alpha: float,
    up_offset: float,
    interleaved: int,
    keep: int,
    tf32: int,
    activation: str,
    batch_invariant: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(a, h), see experts_forward in kernels/experts/activated.py."""
    rows, width = tokens.shape[0], w1.shape[1]
    return x.new_empty((rows, width // 2)), x.new_empty((rows, width)) if keep else None


@kernel_op(
    kernels.experts_backward,
    flops=lambda dout, h, w2, scale, slots, *_: 2 * slots.shape[0] * w2.shape[1] * w2.shape[2],
)
def experts_backward(
    dout: torch.Tensor,
    h: torch.Tensor,
    w2: torch.Tensor,
    scale: torch.Tensor,
    slots: torch.Tensor,
    tokens: torch.Tensor,
    offsets: torch.Tensor,
    limit: float | None,
    alpha: float,
    up_offset: float,
    interleaved: int,
    tf32: int,
    activation: str,
    batch_invariant: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dh, sa, ds), see experts_backward in kernels/experts/activated.py."""
    rows = slots.shape[0]
    computed = torch.promote_types(dout.dtype, torch.float32)
    sa = h.new_empty((rows, w2.shape[2]))
    return h.new_empty(h.shape), sa, h.new_empty((rows,), dtype=computed)


@kernel_op(combine_kernels.combine_experts)
def combine_experts(
    y: torch.Tensor,
    scale: torch.Tensor | None,
    places: torch.Tensor,
    offsets: torch.Tensor,
) -> torch.Tensor:
    """out, see combine_experts in kernels/experts/combine.py."""
    return y.new_empty((places.shape[0], y.shape[1]))


class MixtureFunction(torch.autograd.Function):
    """(out, h or None): x (T, H) and weights (T, K), of experts in the order of `ExpertOrder`.

    `keep` asks for h, the products before the activation, (M, 2 I). `settings` are limit, alpha,
    up_offset, interleaved, activation and tf32.
    """

    returned = 1

    @staticmethod
    def forward(
        x: torch.Tensor,
        weights: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        b1: torch.Tensor | None,
        b2: torch.Tensor | None,
        offsets: torch.Tensor,
        slots: torch.Tensor,
        tokens: torch.Tensor,
        places: torch.Tensor,
        transposed: bool,
        keep: bool,
        settings: tuple,
        engine: Engine,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        *formula, interleaved, activation, tf32 = settings
        invariant = engine == "invariant"
        up, down = (w1.mT, w2.mT) if transposed else (w1, w2)
        options = (*formula, interleaved, int(keep), tf32, activation, invariant)
        a, h = experts_forward(x, up, b1, tokens, offsets, *options)
        y = grouped_linear_forward(a, down, offsets, b2, None, 0, tf32, invariant)
        return combine_experts(y, weights, places, offsets), h

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        *tensors, transposed, _, settings, engine = inputs
        _, h = output
        ctx.options = (transposed, settings, engine)
        ctx.set_materialize_grads(False)
        if h is not None:
            ctx.mark_non_differentiable(h)
        ctx.save_for_backward(*tensors, h)

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor | None, *_: None) -> tuple[torch.Tensor | None, ...]:
        if dout is None:
            return (None,) * 14
        options = (ctx.needs_input_grad[:6], *ctx.options)
        tensors = (dout, *ctx.saved_tensors)
        found = gradients(_backward, _backward_formula, tensors, options)
        return *found, *(None,) * 8


Gradients = tuple[torch.Tensor | None, ...]


def _backward(
    dout: torch.Tensor,
    x: torch.Tensor,
    weights: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    b1: torch.Tensor | None,
    b2: torch.Tensor | None,
    offsets: torch.Tensor,
    slots: torch.Tensor,
    tokens: torch.Tensor,
    places: torch.Tensor,
    h: torch.Tensor | None,
    needed: tuple[bool, ...],
    transposed: bool,
    settings: tuple,
    engine: Engine,
) -> Gradients:
    """The gradients of x, weights, both products' weights and both biases, where needed."""
    for_x, for_weights, for_w1, for_w2, for_b1, for_b2 = needed
    *formula, interleaved, activation, tf32 = settings
    invariant = engine == "invariant"
    up, down = (w1.mT, w2.mT) if transposed else (w1, w2)
    if h is None:
        h = grouped_linear_forward(x, up, offsets, b1, tokens, 0, tf32, invariant)
    order = (weights, slots, tokens, offsets)
    options = (*formula, interleaved, tf32, activation, invariant)
    dh, sa, ds = experts_backward(dout, h, down, *order, *options)
    del h
    dx = dweights = dw1 = dw2 = db1 = db2 = None
    if for_weights:
        ds = ds.view(places.shape)
        if b2 is not None:
            ds = ds + _bias_terms(dout, b2, ExpertOrder(offsets, slots, tokens, places), engine)
        dweights = ds.to(weights.dtype)
    if for_w2:
        # Both in the weight's own layout: a transpose of it would be copied when it is added up.
        if transposed:
            dw2 = grouped_weight_gradient(sa, dout, offsets, None, tokens, tf32)
        else:
            dw2 = grouped_weight_gradient(dout, sa, offsets, tokens, None, tf32)
    if for_b2:
        db2 = grouped_bias_gradient(dout, offsets, tokens, weights, slots)
    del sa
    if for_w1:
        if transposed:
            dw1 = grouped_weight_gradient(x, dh, offsets, tokens, None, tf32)
        else:
            dw1 = grouped_weight_gradient(dh, x, offsets, None, tokens, tf32)
    if for_b1:
        db1 = grouped_bias_gradient(dh, offsets, None, None, None)
    if for_x:
        rows = grouped_linear_forward(dh, up.mT, offsets, None, None, 0, tf32, invariant)
        dx = combine_experts(rows, None, places, offsets)
    return dx, dweights, dw1, dw2, db1, db2


def _find_ids(order: ExpertOrder) -> torch.Tensor:
    """The expert of each pair (T, K), E of those that have none: which need not be saved."""
    return torch.searchsorted(order.offsets[1:], order.places, right=True)


def _bias_terms(
    dout: torch.Tensor, b2: torch.Tensor, order: ExpertOrder, engine: Engine
) -> torch.Tensor:
    """What b2 adds to the gradients of the routing weights, (T, K): do_t . b2_e."""
    computed = torch.promote_types(dout.dtype, torch.float32)
    products = product(dout, b2.t(), out_dtype=computed, engine=engine)
    ids, experts = _find_ids(order), b2.shape[0]
    own = products.gather(1, ids.clamp(max=experts - 1))
    return torch.where(ids < experts, own, 0.0)


def _backward_formula(
    dout: torch.Tensor,
    x: torch.Tensor,
    weights: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    b1: torch.Tensor | None,
    b2: torch.Tensor | None,
    offsets: torch.Tensor,
    slots: torch.Tensor,
    tokens: torch.Tensor,
    places: torch.Tensor,
    h: torch.Tensor | None,
    needed: tuple[bool, ...],
    transposed: bool,
    settings: tuple,
    engine: Engine,
) -> Gradients:
    """What _backward computes, in PyTorch; h is a function of the inputs here."""
    given = {
        "x": x,
        "weights": weights,
        "w_gate_up": w1,
        "w_down": w2,
        "b_gate_up": b1,
        "b_down": b2,
    }
    variables = {name: given[name] for name, want in zip(given, needed, strict=True) if want}
    limit, alpha, up_offset, interleaved, activation, _ = settings
    ids = _find_ids(ExpertOrder(offsets, slots, tokens, places))

    def forward(variables: dict[str, Any]) -> torch.Tensor:
        return reference.mixture(
            ids=ids,
            **{**given, **variables},
            activation=activation,
            interleaved=bool(interleaved),
            transposed=transposed,
            limit=limit,
            alpha=alpha,
            up_offset=up_offset,
        )

    _, pullback, *_ = torch.func.vjp(forward, variables)
    (found,) = pullback(dout)
    return tuple(found.get(name) for name in given)
