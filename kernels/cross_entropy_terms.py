"""What the kernels of cross entropy are handed, and what both do with a row's target and logits.

The names are those of cross_entropy.py.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .common import tanh


class Layout(NamedTuple):
    """How the logits lie in memory."""

    stride_x: Any
    cols: Any


class Coefficients(NamedTuple):
    """What the terms of a loss are multiplied by."""

    label_smoothing: Any
    class_smoothing: Any
    """The label smoothing that falls to each class."""
    z_loss: Any
    logit_scale: Any
    sharpness: Any = 1.0
    """What capped logits are multiplied by: 1 over a temperature."""


class Loss(NamedTuple):
    """Which terms a loss has, as a constexpr."""

    smoothed: bool
    scaled: bool
    """Whether logits are multiplied by anything but 1."""
    softcap: float | None
    sharpened: bool = False
    """Whether capped logits are multiplied by anything but 1."""
    negated: bool = False
    """Whether it is the log-probability, a loss with the other sign."""


class Targets(NamedTuple):
    """Of each row: its target, whether that is a class, whether it is ignored, and its weight."""

    index: Any
    exists: Any
    ignored: Any
    weight: Any


@triton.jit
def scale_and_cap(x, coefficients, LOSS: tl.constexpr):
    """sharpness * softcap * tanh(logit_scale * x / softcap), and the slope of the cap there.

    The slope is in numbers that the scale has been applied to. Steps that a loss does not have are
    left out: without any it is x itself, and 1.
    """
    SOFTCAP: tl.constexpr = LOSS.softcap
    slope = 1.0
    if LOSS.scaled:
        x *= coefficients.logit_scale
    if SOFTCAP is not None:
        x, slope = tanh(x / SOFTCAP)
        x *= SOFTCAP
        if LOSS.sharpened:
            x *= coefficients.sharpness
            slope *= coefficients.sharpness
    return x, slope


@triton.jit
def load_targets(target_ptr, weight_ptr, row, cols, ignore_index, ACC: tl.constexpr):
    """The targets of rows (BLOCK_M,)."""
    index = tl.load(target_ptr + row)
    ignored = index == ignore_index
    exists = (index >= 0) & (index < cols)
    weight = tl.full(index.shape, 1.0, ACC)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + index, exists, other=0.0).to(ACC)
    weight = tl.where(exists, weight, float("nan"))
    return Targets(index, exists, ignored, tl.where(ignored, 0.0, weight))
