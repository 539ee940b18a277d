"""What activations are anywhere, infinity included, by mathematics.

PyTorch's own are NaN at infinity on some CPUs and not on others, by their instruction sets.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F

FUNCTIONS = {
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "relu_squared": lambda x: F.relu(x).square(),
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}

# The value and the slope where x goes to infinity, to minus infinity, and at NaN, if not these.
USUAL = {math.inf: (math.inf, 1.0), -math.inf: (0.0, 0.0), math.nan: (math.nan, math.nan)}
UNUSUAL = {
    "relu": {math.nan: (math.nan, 1.0)},
    "leaky_relu": {-math.inf: (-math.inf, 0.01), math.nan: (math.nan, 0.01)},
    "relu_squared": {math.inf: (math.inf, math.inf)},
    "sigmoid": {math.inf: (1.0, 0.0)},
    "tanh": {math.inf: (1.0, 0.0), -math.inf: (-1.0, 0.0)},
}


def value_and_slope(name: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """An activation of x and its derivative there, in float64."""
    x = x.detach().double()
    finite = x.where(x.isfinite(), 0.0).requires_grad_()
    value = FUNCTIONS[name](finite)
    (slope,) = torch.autograd.grad(value.sum(), finite)
    value = value.detach()
    for point, (at_point, slope_there) in (USUAL | UNUSUAL.get(name, {})).items():
        here = x.isnan() if math.isnan(point) else x == point
        value, slope = value.masked_fill(here, at_point), slope.masked_fill(here, slope_there)
    return value, slope


def gated(
    name: str,
    gate: torch.Tensor,
    up: torch.Tensor,
    dy: torch.Tensor,
    limit: float | None = None,
    alpha: float = 1.0,
    up_offset: float = 0.0,
) -> list[torch.Tensor]:
    """(y, dgate, dup) of activation(gate) * (up + up_offset), see `fastattn.swiglu`, in float64."""
    gate, up, dy = (x.detach().double() for x in (gate, up, dy))
    used_gate, used_up = gate, up
    counts = [torch.ones_like(gate)] * 2
    if limit is not None:
        gate, up = gate.requires_grad_(), up.requires_grad_()
        with torch.enable_grad():
            clamped = gate.clamp(max=limit), up.clamp(-limit, limit)
            counts = torch.autograd.grad([x.sum() for x in clamped], [gate, up])
        used_gate, used_up = (x.detach() for x in clamped)
    value, slope = value_and_slope(name, alpha * used_gate)
    value = value / alpha
    y = value * (used_up + up_offset)
    dgate = dy * (used_up + up_offset) * slope
    dup = dy * value
    # Where there is no gradient it is 0, whatever the factors are.
    if name == "relu":
        dgate = dgate.masked_fill(gate <= 0.0, 0.0)
    dgate, dup = (x.where(count == 1.0, 0.0) for x, count in zip((dgate, dup), counts, strict=True))
    return [y, dgate, dup]


def assert_values(name: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    """Agreement up to rounding in float32, with NaN and infinity where they are expected."""
    torch.testing.assert_close(
        found.detach().cpu().float(),
        expected.cpu().float(),
        rtol=2e-6,
        atol=1e-30,
        equal_nan=True,
        msg=lambda text: f"{name}: {text}",
    )
