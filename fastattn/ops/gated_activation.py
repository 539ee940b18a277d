"""Gated activations: SwiGLU, GeGLU, ReGLU and GLU, of two tensors or of a packed one."""

import math
from typing import TYPE_CHECKING, Any, Literal

import torch

from .. import reference
from .core.apply import call
from .core.arguments import check_choice, check_float_tensor, check_shape
from .core.backends import use_triton
from .core.catalog import Normal, Sample, operation
from .core.gradients import gradients
from .core.lazy_imports import lazy_module
from .core.registration import kernel_op
from .core.sharding import elementwise

if TYPE_CHECKING:
    from ..kernels import gated_activation as kernels
else:
    kernels = lazy_module("fastattn.kernels.gated_activation")


@kernel_op(kernels.gated_activation_forward, sharding=elementwise(inputs=(0, 1), outputs=(0,)))
def gated_activation_forward(
    gate: torch.Tensor,
    up: torch.Tensor | None,
    limit: float | None,
    alpha: float,
    up_offset: float,
    # An int and no bool: DTensor hears integers and what follows one, see `sharding.check_order`.
    interleaved: int,
    activation: str,
) -> torch.Tensor:
    """y, see gated_activation_forward in kernels/gated_activation.py."""
    return gate.new_empty((*gate.shape[:-1], gate.shape[-1] // 2) if up is None else up.shape)


@kernel_op(
    kernels.gated_activation_backward, sharding=elementwise(inputs=(0, 1, 2), outputs=(0, 1))
)
def gated_activation_backward(
    dy: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor | None,
    limit: float | None,
    alpha: float,
    up_offset: float,
    # An int and no bool: DTensor hears integers and what follows one, see `sharding.check_order`.
    interleaved: int,
    activation: str,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(dgate, dup), see gated_activation_backward in kernels/gated_activation.py."""
    return gate.new_empty(gate.shape), None if up is None else up.new_empty(up.shape)


class GatedActivationFunction(torch.autograd.Function):
    """gated_activation_forward; `settings` are its arguments that are no tensors, in its order."""

    @staticmethod
    def forward(gate: torch.Tensor, up: torch.Tensor | None, settings: tuple) -> torch.Tensor:
        return gated_activation_forward(gate, up, *settings)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
        gate, up, ctx.settings = inputs
        ctx.save_for_backward(gate, up)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        tensors = (dy, gate, up)
        dgate, dup = gradients(gated_activation_backward, _backward_formula, tensors, ctx.settings)
        return dgate, dup, None


def _backward_formula(
    dy: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor | None,
    limit: float | None,
    alpha: float,
    up_offset: float,
    interleaved: int,
    activation: str,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What gated_activation_backward computes, in PyTorch."""

    def forward(gate: torch.Tensor, up: torch.Tensor | None = None) -> torch.Tensor:
        packing = {"interleaved": bool(interleaved)}
        if activation == "silu":
            return reference.swiglu(
                gate, up, **packing, limit=limit, alpha=alpha, up_offset=up_offset
            )
        if activation == "relu":
            return reference.reglu(gate, up, **packing)
        if activation == "sigmoid":
            return reference.glu(gate, up, **packing)
        approximate = "tanh" if activation == "gelu_tanh" else "none"
        return reference.geglu(gate, up, **packing, approximate=approximate)

    inputs = (gate,) if up is None else (gate, up)
    _, pullback, *_ = torch.func.vjp(forward, *inputs)
    dgate, *rest = pullback(dy)
    return dgate, rest[0] if rest else None


def _launch(
    activation: str,
    gate: torch.Tensor,
    up: torch.Tensor | None,
    interleaved: bool,
    limit: float | None = None,
    alpha: float = 1.0,
    up_offset: float = 0.0,
) -> torch.Tensor:
    """Run the kernels."""
    settings = (limit, alpha, up_offset, int(interleaved), activation)
    return call(GatedActivationFunction, gate, up, settings)


def check_gate_and_up(
    op: str, gate: torch.Tensor, up: torch.Tensor | None, interleaved: bool
) -> None:
    """The arguments that every gated activation has."""
    check_float_tensor(op, "gate", gate)
    if gate.dim() == 0:
        raise ValueError(f"{op}: gate must have at least one dimension, got a scalar")
    if up is None:
        if gate.shape[-1] % 2:
            raise ValueError(
                f"{op}: without up, gate holds both and its last dimension must be even, "
                f"got shape {tuple(gate.shape)}"
            )
        return
    check_float_tensor(op, "up", up, like=gate)
    if up.dtype is not gate.dtype:
        raise TypeError(f"{op}: up must have gate's dtype {gate.dtype}, got {up.dtype}")
    check_shape(op, "up", up, gate.shape)
    if interleaved:
        raise ValueError(f"{op}: interleaved says how gate packs both, but up is given")


@operation(
    reference=reference.swiglu,
    samples=(
        Sample("smallest", gate=(2, 5), up=(2, 5)),
        Sample("several rows a tile", gate=(3, 7, 64), up=(3, 7, 64)),
        Sample("odd width", gate=(37, 131), up=(37, 131)),
        Sample("several tiles a row", gate=(3, 5000), up=(3, 5000)),
        Sample("packed in halves", gate=(3, 7, 96)),
        Sample("packed in halves of odd width", gate=(5, 262)),
        Sample("packed in halves, several tiles a row", gate=(2, 4400)),
        Sample("interleaved", gate=(3, 7, 96), interleaved=True),
        Sample("interleaved, odd width", gate=(5, 262), interleaved=True),
        Sample("interleaved, several tiles a row", gate=(2, 4400), interleaved=True),
        Sample(
            "gpt-oss",
            gate=Normal((9, 80), scale=5.0),
            interleaved=True,
            limit=7.0,
            alpha=1.702,
            up_offset=1.0,
        ),
        Sample("clamped pair", gate=(4, 33), up=(4, 33), limit=0.5),
        Sample("large values", gate=Normal((4, 50), scale=100.0), up=(4, 50)),
        Sample("one dimension", gate=(33,), up=(33,)),
        Sample("one gate a row", gate=(70, 2)),
        Sample("no rows", gate=(0, 16), up=(0, 16)),
    ),
)
def swiglu(
    gate: torch.Tensor,
    up: torch.Tensor | None = None,
    *,
    interleaved: bool = False,
    limit: float | None = None,
    alpha: float = 1.0,
    up_offset: float = 0.0,
) -> torch.Tensor:
    """SwiGLU: gate * sigmoid(alpha * gate) * (up + up_offset), plainly silu(gate) * up.

    Computed in float32 (float64 for float64) and rounded once; nothing is saved for the backward
    but the inputs. gpt-oss uses limit=7.0, alpha=1.702, up_offset=1.0 and interleaved=True.

    Where gate is infinite the kernels give the activation's limits. So far PyTorch's own silu and
    gelu, and with them the reference, give NaN for some of these, which ones depending on the CPU.

    Args:
        gate: (..., cols), float16, bfloat16, float32 or float64; without `up`, (..., 2 cols) with
            both: all gates and then all ups, as one product with the stacked weights gives them.
            Any strides; rows with a unit last stride at one common distance are read in place,
            other layouts are copied.
        up: (..., cols), of gate's dtype, or None.
        interleaved: a packed gate holds each gate and its up next to each other.
        limit: gate is clamped to at most this and up to [-limit, limit], with torch.clamp's
            gradients; None does not clamp.
        alpha: the steepness of the sigmoid.
        up_offset: added to up after clamping.

    Returns:
        (..., cols), of gate's dtype, any number of times differentiable in gate and up.

    Raises:
        TypeError: an argument is no tensor or of an unsupported dtype.
        ValueError: a shape, device or value does not fit.

    Source: Shazeer, "GLU Variants Improve Transformer" (2020); the clamped form is that of
    gpt-oss (`GptOssExperts` in Hugging Face's transformers).

    Example:
        >>> gate, up = torch.randn(2, 3, 8)
        >>> y = fastattn.swiglu(gate, up)
        >>> torch.testing.assert_close(y, torch.nn.functional.silu(gate) * up)
    """
    check_gate_and_up("swiglu", gate, up, interleaved)
    if limit is not None and not limit > 0.0:
        raise ValueError(f"swiglu: limit must be positive, got {limit}")
    for name, value in (("alpha", alpha), ("up_offset", up_offset)):
        if not math.isfinite(value):
            raise ValueError(f"swiglu: {name} must be finite, got {value}")
    if not use_triton(gate):
        return reference.swiglu(
            gate, up, interleaved=interleaved, limit=limit, alpha=alpha, up_offset=up_offset
        )
    return _launch("silu", gate, up, interleaved, limit, alpha, up_offset)


@operation(
    reference=reference.geglu,
    samples=(
        Sample("smallest", gate=(2, 5), up=(2, 5)),
        Sample("several rows a tile", gate=(3, 7, 64), up=(3, 7, 64)),
        Sample("tanh", gate=(37, 131), up=(37, 131), approximate="tanh"),
        Sample("packed in halves", gate=(5, 96)),
        Sample("interleaved, tanh", gate=(5, 262), interleaved=True, approximate="tanh"),
        Sample("large values", gate=Normal((4, 50), scale=100.0), up=(4, 50)),
        Sample(
            "large values, tanh",
            gate=Normal((4, 50), scale=100.0),
            up=(4, 50),
            approximate="tanh",
        ),
        Sample("no columns", gate=(3, 0), up=(3, 0)),
    ),
)
def geglu(
    gate: torch.Tensor,
    up: torch.Tensor | None = None,
    *,
    interleaved: bool = False,
    approximate: Literal["none", "tanh"] = "none",
) -> torch.Tensor:
    """GeGLU: gelu(gate) * up. Of an infinite gate see `swiglu`.

    Args:
        gate, up, interleaved: as in `swiglu`.
        approximate: "none" for the exact GELU, "tanh" for its approximation, as in
            torch.nn.functional.gelu.

    Returns:
        (..., cols), of gate's dtype, any number of times differentiable in gate and up.

    Raises:
        TypeError, ValueError: as in `swiglu`.

    Source: Shazeer, "GLU Variants Improve Transformer" (2020).

    Example:
        >>> gate, up = torch.randn(2, 3, 8)
        >>> y = fastattn.geglu(gate, up)
        >>> torch.testing.assert_close(y, torch.nn.functional.gelu(gate) * up)
    """
    check_gate_and_up("geglu", gate, up, interleaved)
    check_choice("geglu", "approximate", approximate, ("none", "tanh"))
    if not use_triton(gate):
        return reference.geglu(gate, up, interleaved=interleaved, approximate=approximate)
    return _launch("gelu_tanh" if approximate == "tanh" else "gelu", gate, up, interleaved)


@operation(
    reference=reference.reglu,
    samples=(
        Sample("smallest", gate=(2, 5), up=(2, 5)),
        Sample("several rows a tile", gate=(3, 7, 64), up=(3, 7, 64)),
        Sample("packed in halves", gate=(5, 96)),
        Sample("interleaved", gate=(5, 262), interleaved=True),
    ),
)
def reglu(
    gate: torch.Tensor, up: torch.Tensor | None = None, *, interleaved: bool = False
) -> torch.Tensor:
    """ReGLU: relu(gate) * up. Arguments, result and source as in `swiglu`.

    Example:
        >>> fastattn.reglu(torch.tensor([-1.0, 2.0]), torch.tensor([3.0, 3.0])).tolist()
        [0.0, 6.0]
    """
    check_gate_and_up("reglu", gate, up, interleaved)
    if not use_triton(gate):
        return reference.reglu(gate, up, interleaved=interleaved)
    return _launch("relu", gate, up, interleaved)


@operation(
    reference=reference.glu,
    samples=(
        Sample("smallest", gate=(2, 5), up=(2, 5)),
        Sample("several rows a tile", gate=(3, 7, 64), up=(3, 7, 64)),
        Sample("packed in halves", gate=(5, 96)),
        Sample("interleaved", gate=(5, 262), interleaved=True),
        Sample("large values", gate=Normal((4, 50), scale=100.0), up=(4, 50)),
    ),
)
def glu(
    gate: torch.Tensor, up: torch.Tensor | None = None, *, interleaved: bool = False
) -> torch.Tensor:
    """GLU: sigmoid(gate) * up. Arguments and result as in `swiglu`.

    torch.nn.functional.glu takes the gate from the second half of its packed input; here, as in the
    other gated activations, it is the first.

    Source: Dauphin, Fan, Auli and Grangier, "Language Modeling with Gated Convolutional Networks"
    (2016).

    Example:
        >>> fastattn.glu(torch.zeros(2), torch.tensor([2.0, 4.0])).tolist()
        [1.0, 2.0]
    """
    check_gate_and_up("glu", gate, up, interleaved)
    if not use_triton(gate):
        return reference.glu(gate, up, interleaved=interleaved)
    return _launch("sigmoid", gate, up, interleaved)
