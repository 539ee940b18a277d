"""Operands of a product as a kernel can walk them: a unit stride, and at most two batch axes."""

import torch


def neighbours(x: torch.Tensor, rows: str, cols: str) -> tuple[torch.Tensor, int, int, str]:
    """An operand, the strides of its rows and columns, and which of the two has neighbours."""
    stride_rows, stride_cols = x.stride()[-2:]
    if stride_cols == 1:
        return x, stride_rows, 1, cols
    if stride_rows == 1:
        return x, 1, stride_cols, rows
    # A single element has any stride.
    if x.shape[-1] == 1:
        return x, stride_rows, 1, cols
    if x.shape[-2] == 1:
        return x, 1, stride_cols, rows
    x = x.contiguous()
    return x, x.stride(-2), 1, cols


Axes = tuple[int, int]


def batch_axes(
    a: torch.Tensor, b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, Axes, Axes, Axes]:
    """The leading dimensions as two: (a, b, their sizes, strides of a, strides of b).

    Dimensions that both operands step through evenly become one. If more than two remain, the
    operands are copied, and one remains.
    """
    axes: list[tuple[int, int, int]] = []
    for size, step_a, step_b in zip(
        reversed(a.shape[:-2]), reversed(a.stride()[:-2]), reversed(b.stride()[:-2]), strict=True
    ):
        if size == 1:
            continue
        if axes:
            inside, inside_a, inside_b = axes[-1]
            if step_a == inside * inside_a and step_b == inside * inside_b:
                axes[-1] = (inside * size, inside_a, inside_b)
                continue
        axes.append((size, step_a, step_b))
    if len(axes) > 2:
        return batch_axes(_evenly(a), _evenly(b))
    axes += [(1, 0, 0)] * (2 - len(axes))
    (inner, inner_a, inner_b), (outer, outer_a, outer_b) = axes
    return a, b, (outer, inner), (outer_a, inner_a), (outer_b, inner_b)


def _evenly(x: torch.Tensor) -> torch.Tensor:
    """A copy with one distance between all its matrices, each laid out as before."""
    if x.stride(-1) == 1:
        return x.contiguous()
    return x.mT.contiguous().mT
