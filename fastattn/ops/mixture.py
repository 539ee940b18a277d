"""A mixture of experts: gated layers of many experts, each on the rows that were routed to it."""

import math
from collections.abc import Callable

import torch

from .. import reference
from ..reference.mixture import order_by_expert
from .core.apply import call
from .core.arguments import (
    check_choice,
    check_constant,
    check_float_tensor,
    check_integers,
    check_shape,
)
from .core.catalog import Normal, Sample, operation
from .core.precision import autocast, product_precision
from .core.products import check_same_dtype, choose_engine
from .core.sharding import refuse_distributed
from .core.tensor_kinds import is_plain
from .gated_linear import ACTIVATIONS, Activation
from .mixture_function import MixtureFunction

MOST_PAIRS = 2**31 - 1
"""Pairs of a token and an expert, whose numbers are held in 32 bits."""


def make_ids(experts: int, *shape: int, first: int = 0) -> Callable[..., torch.Tensor]:
    """For samples: random experts, none of them below `first`."""

    def make(device: str | torch.device) -> torch.Tensor:
        generator = torch.Generator().manual_seed(experts)
        return torch.randint(first, experts, shape, generator=generator).to(device)

    return make


@operation(
    reference=reference.mixture,
    samples=(
        Sample(
            "smallest",
            x=(2, 3),
            ids=make_ids(2, 2, 2),
            weights=(2, 2),
            w_gate_up=(2, 2, 3),
            w_down=(2, 3, 1),
        ),
        Sample(
            "biases, an expert without tokens",
            x=(2, 5, 24),
            ids=make_ids(3, 2, 5, 2, first=1),
            weights=Normal((2, 5, 2), scale=0.5),
            w_gate_up=Normal((3, 36, 24), scale=0.2),
            w_down=Normal((3, 24, 18), scale=0.2),
            b_gate_up=(3, 36),
            b_down=(3, 24),
        ),
        Sample(
            "several tiles, computed again",
            x=(40, 40),
            ids=make_ids(2, 40, 2),
            weights=Normal((40, 2), scale=0.5),
            w_gate_up=Normal((2, 70, 40), scale=0.2),
            w_down=Normal((2, 40, 35), scale=0.2),
            b_gate_up=(2, 70),
            recompute=True,
        ),
        Sample(
            "gpt-oss",
            x=(9, 20),
            ids=make_ids(5, 9, 4),
            weights=Normal((9, 4), dtype=torch.float32),
            w_gate_up=Normal((5, 20, 72), scale=0.5),
            w_down=Normal((5, 36, 20), scale=0.3),
            b_gate_up=(5, 72),
            b_down=(5, 20),
            interleaved=True,
            transposed=True,
            limit=7.0,
            alpha=1.702,
            up_offset=1.0,
        ),
        Sample(
            "interleaved, some pairs of no expert, gelu",
            x=(19, 17),
            ids=make_ids(4, 19, 3),
            weights=(19, 3),
            w_gate_up=Normal((3, 22, 17), scale=0.3),
            w_down=(3, 17, 11),
            activation="gelu",
            interleaved=True,
        ),
        Sample(
            "halves transposed, all to one, tanh gelu",
            x=(20, 8),
            ids=lambda device: torch.full((20, 1), 1, device=device),
            weights=(20, 1),
            w_gate_up=Normal((3, 8, 20), scale=0.3),
            w_down=(3, 10, 8),
            b_gate_up=(3, 20),
            activation="gelu_tanh",
            transposed=True,
            recompute=True,
        ),
        Sample(
            "every expert, sigmoid",
            x=(3, 5),
            ids=lambda device: torch.arange(3, device=device).expand(3, 3),
            weights=(3, 3),
            w_gate_up=(3, 6, 5),
            w_down=(3, 5, 3),
            b_down=(3, 5),
            activation="sigmoid",
        ),
        Sample(
            "none has an expert, relu",
            x=(4, 3),
            ids=lambda device: torch.full((4, 2), 2, device=device),
            weights=(4, 2),
            w_gate_up=(2, 8, 3),
            w_down=(2, 3, 4),
            activation="relu",
        ),
        Sample(
            "no tokens",
            x=(0, 5),
            ids=make_ids(2, 0, 2),
            weights=(0, 2),
            w_gate_up=(2, 4, 5),
            w_down=(2, 5, 2),
            b_down=(2, 5),
        ),
    ),
)
def mixture(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    w_gate_up: torch.Tensor,
    w_down: torch.Tensor,
    b_gate_up: torch.Tensor | None = None,
    b_down: torch.Tensor | None = None,
    *,
    activation: Activation = "silu",
    interleaved: bool = False,
    transposed: bool = False,
    limit: float | None = None,
    alpha: float = 1.0,
    up_offset: float = 0.0,
    recompute: bool = False,
) -> torch.Tensor:
    """The weighted sum of each token's experts, without dropping any.

    Expert e makes of a token its down projection of activation(gate) * (up + up_offset), where
    gate and up are the halves of its first product, as `gated_linear` does; the token's output is
    the sum over its K experts, times their weights, in the order of ids.

    Tokens are sorted by expert on the device, and nothing waits for the host. For the backward x,
    the weights and the products before the activation are saved, in 16 bits 2 T H + 4 T K I bytes,
    and 16 bytes a token and expert; with `recompute` not those products either, so that the
    activation memory is that of a dense layer's input, for one product more. Gradients have the
    same bits every time, and those of experts without tokens are zeros. Under `batch_invariant` a
    token has the same bits among any others. Rounding: both products of an expert are rounded to
    x's dtype, the sum over experts is of float32 and rounded once.

    Args:
        x: (..., H), of two dimensions or more, float16, bfloat16, float32 or float64.
        ids: (..., K), int32 or int64: the experts of each token, as `route_top_k` gives them. An id
            of E is no expert's, and adds nothing. Any other number that is none is an error on a
            CPU, and adds nothing on a GPU. An expert may stand in a row more than once.
        weights: (..., K), of any float dtype.
        w_gate_up: (E, 2 I, H), of x's dtype: each expert's gates, and then its ups.
        w_down: (E, H, I), of x's dtype.
        b_gate_up, b_down: (E, 2 I) and (E, H), of x's dtype, or None.
        activation: "silu", "gelu", "gelu_tanh", "relu" or "sigmoid", as in `gated_linear`.
        interleaved: gates and ups stand next to each other: gate 0, up 0, gate 1, ...
        transposed: the weights are (E, H, 2 I) and (E, I, H).
        limit, alpha, up_offset: as in `swiglu`, for "silu" alone. gpt-oss has limit=7.0,
            alpha=1.702 and up_offset=1.0, interleaved and transposed.
        recompute: whether the backward computes the first product again or finds it saved. On the
            reference PyTorch saves what it saves.

    Returns:
        (..., H), of x's dtype, or autocast's; any number of times differentiable in all tensors
        but ids. The reference on a CPU computes every expert on all rows where something traces it.

    Raises:
        TypeError: an argument is no tensor, or of a dtype that does not fit.
        ValueError: a shape, device, id or setting does not fit.

    Example:
        >>> import torch, fastattn
        >>> x, router = torch.ones(2, 5, 8), torch.ones(4, 8)
        >>> weights, ids = fastattn.route_top_k(x @ router.t(), 2)
        >>> y = fastattn.mixture(x, ids, weights, torch.ones(4, 6, 8), torch.ones(4, 8, 3))
        >>> y.shape
        torch.Size([2, 5, 8])

    Source: Shazeer et al., "Outrageously Large Neural Networks: The Sparsely-Gated
    Mixture-of-Experts Layer" (2017); what is saved, Guo et al., "SonicMoE: Accelerating MoE with
    IO and Tile-aware Optimizations" (2025).
    """
    _check(x, ids, weights, w_gate_up, w_down, b_gate_up, b_down, transposed)
    _check_settings(activation, limit, alpha, up_offset)
    x, w_gate_up, w_down, b_gate_up, b_down = autocast(x, w_gate_up, w_down, b_gate_up, b_down)
    named = {"w_gate_up": w_gate_up, "w_down": w_down, "b_gate_up": b_gate_up, "b_down": b_down}
    for name, tensor in named.items():
        if tensor is not None:
            check_same_dtype("mixture", name, tensor, "x", x)
    engine = choose_engine(x)
    if engine == "torch":
        return reference.mixture(
            x,
            ids,
            weights,
            **named,
            activation=activation,
            interleaved=interleaved,
            transposed=transposed,
            limit=limit,
            alpha=alpha,
            up_offset=up_offset,
        )
    flat, scale = x.flatten(0, -2), weights.flatten(0, -2)
    order = order_by_expert(ids.flatten(0, -2), w_gate_up.shape[0])
    tf32 = int(product_precision(x.dtype) == "tf32")
    settings = (limit, alpha, up_offset, int(interleaved), activation, tf32)
    keep = not recompute and _wants_gradients(x, weights, *named.values())
    arguments = (*order, bool(transposed), keep, settings, engine)
    out = call(MixtureFunction, flat, scale, *named.values(), *arguments)[0]
    return out.view(x.shape)


def _wants_gradients(*tensors: torch.Tensor | None) -> bool:
    wanted = any(tensor is not None and tensor.requires_grad for tensor in tensors)
    return wanted and torch.is_grad_enabled()


def _check(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    w_gate_up: torch.Tensor,
    w_down: torch.Tensor,
    b_gate_up: torch.Tensor | None,
    b_down: torch.Tensor | None,
    transposed: bool,
) -> None:
    op = "mixture"
    refuse_distributed(op, x=x, ids=ids, weights=weights, w_gate_up=w_gate_up, w_down=w_down)
    check_float_tensor(op, "x", x)
    if x.dim() < 2:
        raise ValueError(f"{op}: x must have at least two dimensions, got {tuple(x.shape)}")
    check_constant(op, "ids", ids, x)
    check_integers(op, "ids", ids)
    if ids.dim() != x.dim() or ids.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"{op}: ids must have the shape {(*x.shape[:-1], 'K')} for an x of shape "
            f"{tuple(x.shape)}, got {tuple(ids.shape)}"
        )
    if ids.numel() > MOST_PAIRS:
        raise ValueError(f"{op}: ids must be at most {MOST_PAIRS}, got {ids.numel()}")
    check_float_tensor(op, "weights", weights, like=x)
    check_shape(op, "weights", weights, ids.shape)
    check_float_tensor(op, "w_gate_up", w_gate_up, like=x)
    hidden = x.shape[-1]
    out, into = (-1, -2) if transposed else (-2, -1)
    fits = w_gate_up.dim() == 3 and w_gate_up.shape[0] > 0 and w_gate_up.shape[into] == hidden
    if not fits or w_gate_up.shape[out] % 2:
        wanted = f"(E, {hidden}, 2 I)" if transposed else f"(E, 2 I, {hidden})"
        raise ValueError(
            f"{op}: w_gate_up must have the shape {wanted} with at least one expert for an x of "
            f"shape {tuple(x.shape)}, got {tuple(w_gate_up.shape)}"
        )
    experts, width = w_gate_up.shape[0], w_gate_up.shape[out]
    check_float_tensor(op, "w_down", w_down, like=x)
    inside = width // 2
    check_shape(
        op, "w_down", w_down, (experts, inside, hidden) if transposed else (experts, hidden, inside)
    )
    for name, bias, size in (("b_gate_up", b_gate_up, width), ("b_down", b_down, hidden)):
        if bias is not None:
            check_float_tensor(op, name, bias, like=x)
            check_shape(op, name, bias, (experts, size))
    # A fake tensor has no numbers, whatever its device.
    if ids.device.type == "cpu" and is_plain((ids,)) and ids.numel():
        smallest, largest = ids.aminmax()
        if smallest < 0 or largest > experts:
            raise ValueError(
                f"{op}: ids must be in [0, {experts}), or {experts} for no expert, got numbers "
                f"from {smallest.item()} to {largest.item()}"
            )


def _check_settings(activation: str, limit: float | None, alpha: float, up_offset: float) -> None:
    op = "mixture"
    check_choice(op, "activation", activation, ACTIVATIONS)
    if activation != "silu" and (limit, alpha, up_offset) != (None, 1.0, 0.0):
        raise ValueError(
            f"{op}: limit, alpha and up_offset belong to the activation 'silu', got {activation!r}"
        )
    if limit is not None and not limit > 0.0:
        raise ValueError(f"{op}: limit must be positive, got {limit}")
    for name, value in (("alpha", alpha), ("up_offset", up_offset)):
        if not math.isfinite(value):
            raise ValueError(f"{op}: {name} must be finite, got {value}")
