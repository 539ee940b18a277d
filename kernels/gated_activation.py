r"""Gated activations: y = activation(gate) * (up + up_offset), element by element.

With s(z) = 1 / (1 + exp(-z)), and c = sqrt(2 / pi) (g + 0.044715 g^3), the activations and slopes:

    silu       g s(alpha g)                  s + alpha g s (1 - s)
    gelu       g/2 (1 + erf(g / sqrt(2)))    (1 + erf(g / sqrt(2)))/2 + g exp(-g^2 / 2) / sqrt(2 pi)
    gelu_tanh  g/2 (1 + tanh(c)) = g s(2c)   s + g s (1 - s) 2c'
    relu       max(g, 0)                     1 where g > 0, else 0
    sigmoid    s(g)                          s (1 - s)

    dgate = dy * (up + up_offset) * slope(gate);  dup = dy * activation(gate)

With a limit, gate is first clamped to at most limit and up to [-limit, limit]; what is outside has
no gradient, and what is at the border has the one that the installed torch.clamp gives it.

gate, up and y are (..., cols). Without up, gate is packed, (..., 2 cols): all gates and then
all ups, or INTERLEAVED, one after the other. Nothing is saved but the inputs. All is computed in
float32, or in float64 for float64 tensors, and rounded once.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .common import divisible
from .config import cdiv, find_target
from .elementwise import elementwise_config, place_program
from .launch import MOST_BOUND, common_divisor, empty_rows, flatten_rows, launchable
from .row_tiles import Blocks, Tile, load_tile, store_tile
from .structures import Rows, make_rows, restore_rows


class Formula(NamedTuple):
    """Which gated activation is meant, see above."""

    activation: str
    limit: float | None
    alpha: float
    up_offset: float
    border_counts: bool


@functools.cache
def border_has_gradient() -> bool:
    """Whether torch.clamp has a gradient exactly at a bound: it had one until torch 2.15."""
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.ones((), device="cpu", requires_grad=True)
        (dx,) = torch.autograd.grad(x.clamp(max=1.0), x)
    return bool(dx)


# Made once: to make a named tuple takes longer than to find it.
@functools.lru_cache(MOST_BOUND)
def make_formula(activation: str, limit: float | None, alpha: float, up_offset: float) -> Formula:
    """The formula of these, with the gradient at the border that torch has."""
    border_counts = limit is None or border_has_gradient()
    return Formula(activation, limit, alpha, up_offset, border_counts)


@triton.jit
def sigmoid(z):
    """s(z) to full precision and without overflow; 1 - s(z) is s(-z), at no further exponential."""
    e = tl.exp(-tl.abs(z))
    inverse = 1.0 / (1.0 + e)
    return tl.where(z >= 0.0, inverse, e * inverse)


@triton.jit
def multiply_vanishing(small, large):
    """small * large where `small` is 0 before `large` is infinite: there 0, and not NaN."""
    return tl.where(small == 0.0, 0.0, small * large)


@triton.jit
def activation_and_slope(gate, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr):
    """The activation of `gate` and its derivative there; at infinity their limits."""
    if ACTIVATION == "silu":
        s = sigmoid(gate * ALPHA)
        value = multiply_vanishing(s, gate)
        slope = s + ALPHA * multiply_vanishing(sigmoid(-gate * ALPHA), value)
    elif ACTIVATION == "gelu":
        half = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
        value = multiply_vanishing(half, gate)
        slope = half + multiply_vanishing(tl.exp(-0.5 * gate * gate), gate) * 0.3989422804014327
    elif ACTIVATION == "gelu_tanh":
        square = gate * gate
        twice_c = 1.5957691216057308 * gate * (1.0 + 0.044715 * square)
        s = sigmoid(twice_c)
        value = multiply_vanishing(s, gate)
        growth = multiply_vanishing(value, 1.5957691216057308 * (1.0 + 0.134145 * square))
        slope = s + multiply_vanishing(sigmoid(-twice_c), growth)
    elif ACTIVATION == "relu":
        # A comparison that lets NaN through, as torch's relu does.
        value = tl.where(gate <= 0.0, 0.0, gate)
        slope = tl.where(gate <= 0.0, 0.0, 1.0)
    else:
        tl.static_assert(ACTIVATION == "sigmoid")
        value = sigmoid(gate)
        slope = value * sigmoid(-gate)
    return value, slope


@triton.jit
def clamp(gate, up, LIMIT: tl.constexpr):
    """gate clamped to at most LIMIT, up to [-LIMIT, LIMIT]; NaN stays NaN."""
    if LIMIT is not None:
        gate = tl.where(gate > LIMIT, LIMIT, gate)
        up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
    return gate, up


@triton.jit
def offset_up(up, FORMULA: tl.constexpr):
    """up + up_offset: that zero leaves a number as it is, the compiler may not assume."""
    return up if FORMULA.up_offset == 0.0 else up + FORMULA.up_offset


@triton.jit
def apply_gate(gate, up, FORMULA: tl.constexpr):
    """y of the formula."""
    ACTIVATION: tl.constexpr = FORMULA.activation
    gate, up = clamp(gate, up, FORMULA.limit)
    value, _ = activation_and_slope(gate, ACTIVATION, FORMULA.alpha)
    return value * offset_up(up, FORMULA)


@triton.jit
def differentiate_gate(dy, gate, up, FORMULA: tl.constexpr):
    """(dgate, dup) of the formula."""
    ACTIVATION: tl.constexpr = FORMULA.activation
    LIMIT: tl.constexpr = FORMULA.limit
    used_gate, used_up = clamp(gate, up, LIMIT)
    value, slope = activation_and_slope(used_gate, ACTIVATION, FORMULA.alpha)
    dgate = dy * offset_up(used_up, FORMULA) * slope
    dup = dy * value
    # Where there is no gradient it is zero, also if a factor above is infinite.
    if FORMULA.activation == "relu":
        dgate = tl.where(gate <= 0.0, 0.0, dgate)
    if LIMIT is not None:
        # Comparisons that NaN fails, which gives it torch.clamp's gradient.
        if FORMULA.border_counts:
            dgate = tl.where(gate <= LIMIT, dgate, 0.0)
            dup = tl.where((up >= -LIMIT) & (up <= LIMIT), dup, 0.0)
        else:
            dgate = tl.where(gate < LIMIT, dgate, 0.0)
            dup = tl.where((up > -LIMIT) & (up < LIMIT), dup, 0.0)
    return dgate, dup


@triton.jit
def place_pairs(tile, cols):
    """The tile of a packed tensor that holds the gates and ups of a tile, interleaved."""
    BLOCK_N: tl.constexpr = tile.offs_n.shape[0]
    first_col = 2 * tile.first_col
    offs_pair = first_col + tl.arange(0, 2 * BLOCK_N)
    return Tile(tile.row, first_col, offs_pair, tile.mask_m, offs_pair < 2 * cols)


@triton.jit
def load_gate_and_up(
    gate_view, up_view, tile, cols, INTERLEAVED: tl.constexpr, BLOCKS: tl.constexpr
):
    """A tile of gate and one of up, (BLOCK_M, BLOCK_N) each, in the dtype of accumulation."""
    gates = restore_rows(gate_view, BLOCKS.divisor)
    if INTERLEAVED:
        pairs = load_tile(gates, place_pairs(tile, cols))
        gate, up = tl.split(tl.reshape(pairs, (BLOCKS.block_m, BLOCKS.block_n, 2)))
    elif up_view is None:
        gate = load_tile(gates, tile)
        up = load_tile(Rows(gates.pointer + cols, gates.stride), tile)
    else:
        gate = load_tile(gates, tile)
        up = load_tile(restore_rows(up_view, BLOCKS.divisor), tile)
    return gate, up


@launchable
@triton.jit(do_not_specialize=["rows"])
def gated_activation_forward_kernel(
    gate_view: Rows,
    up_view: Rows,
    y_ptr,
    rows,
    cols,
    FORMULA: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """One program a tile (BLOCK_M, BLOCK_N) of y."""
    cols = divisible(cols, BLOCKS.divisor)
    tile = place_program(rows, cols, BLOCKS)
    gate, up = load_gate_and_up(gate_view, up_view, tile, cols, INTERLEAVED, BLOCKS)
    store_tile(Rows(y_ptr, cols), tile, apply_gate(gate, up, FORMULA))


@launchable
@triton.jit(do_not_specialize=["rows"])
def gated_activation_backward_kernel(
    dy_view: Rows,
    gate_view: Rows,
    up_view: Rows,
    dgate_ptr,
    dup_ptr,
    rows,
    cols,
    FORMULA: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """One program a tile (BLOCK_M, BLOCK_N) of dy. Without dup_ptr, dgate is packed as gate is."""
    cols = divisible(cols, BLOCKS.divisor)
    tile = place_program(rows, cols, BLOCKS)
    gate, up = load_gate_and_up(gate_view, up_view, tile, cols, INTERLEAVED, BLOCKS)
    dy = load_tile(restore_rows(dy_view, BLOCKS.divisor), tile)
    dgate, dup = differentiate_gate(dy, gate, up, FORMULA)
    if INTERLEAVED:
        # Rounded first, for what is joined is moved between threads.
        dtype: tl.constexpr = dgate_ptr.dtype.element_ty
        pairs = tl.join(dgate.to(dtype), dup.to(dtype))
        pairs = tl.reshape(pairs, (BLOCKS.block_m, 2 * BLOCKS.block_n))
        store_tile(Rows(dgate_ptr, 2 * cols), place_pairs(tile, cols), pairs)
    elif dup_ptr is None:
        store_tile(Rows(dgate_ptr, 2 * cols), tile, dgate)
        store_tile(Rows(dgate_ptr + cols, 2 * cols), tile, dup)
    else:
        store_tile(Rows(dgate_ptr, cols), tile, dgate)
        store_tile(Rows(dup_ptr, cols), tile, dup)


def gated_activation_forward(
    gate: torch.Tensor,
    up: torch.Tensor | None,
    limit: float | None,
    alpha: float,
    up_offset: float,
    interleaved: int,
    activation: str,
) -> torch.Tensor:
    """Launch the forward: y, shaped like up, or half as wide as gate where up is None."""
    if up is None:
        y = torch.empty(*gate.shape[:-1], gate.shape[-1] // 2, dtype=gate.dtype, device=gate.device)
    else:
        y = empty_rows(up, up.dtype)
    if y.numel() == 0:
        return y
    cols = y.shape[-1]
    rows = y.numel() // cols
    gate_view, up_view, divisor = _view_gates(gate, up, cols)
    config = elementwise_config(cols, find_target(gate))
    gated_activation_forward_kernel.launch(
        (cdiv(rows, config.block_m) * cdiv(cols, config.block_n),),
        gate_view=gate_view,
        up_view=up_view,
        y_ptr=y,
        rows=rows,
        cols=cols,
        FORMULA=make_formula(activation, limit, alpha, up_offset),
        INTERLEAVED=bool(interleaved),
        BLOCKS=Blocks(config.block_m, config.block_n, divisor),
        num_warps=config.num_warps,
    )
    return y


def gated_activation_backward(
    dy: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor | None,
    limit: float | None,
    alpha: float,
    up_offset: float,
    interleaved: int,
    activation: str,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Launch the backward: (dgate, dup), or the gradient of the packed gate and None."""
    dgate = empty_rows(gate, gate.dtype)
    dup = None if up is None else empty_rows(up, up.dtype)
    if dy.numel() == 0:
        return dgate, dup
    cols = dy.shape[-1]
    rows = dy.numel() // cols
    dy, stride_dym = flatten_rows(dy, cols)
    gate_view, up_view, divisor = _view_gates(gate, up, cols)
    config = elementwise_config(cols, find_target(gate))
    gated_activation_backward_kernel.launch(
        (cdiv(rows, config.block_m) * cdiv(cols, config.block_n),),
        dy_view=make_rows(dy, stride_dym),
        gate_view=gate_view,
        up_view=up_view,
        dgate_ptr=dgate,
        dup_ptr=dup,
        rows=rows,
        cols=cols,
        FORMULA=make_formula(activation, limit, alpha, up_offset),
        INTERLEAVED=bool(interleaved),
        BLOCKS=Blocks(config.block_m, config.block_n, common_divisor(divisor, stride_dym)),
        num_warps=config.num_warps,
    )
    return dgate, dup


def _view_gates(
    gate: torch.Tensor, up: torch.Tensor | None, cols: int
) -> tuple[Rows, Rows | None, int]:
    """Views of gate and of up, if there is one, and what divides cols and their strides."""
    gate, stride_gm = flatten_rows(gate, gate.shape[-1])
    gate_view = make_rows(gate, stride_gm)
    if up is None:
        return gate_view, None, common_divisor(cols, stride_gm)
    up, stride_um = flatten_rows(up, cols)
    return gate_view, make_rows(up, stride_um), common_divisor(cols, stride_gm, stride_um)
