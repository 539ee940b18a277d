"""A sound kernel and kernels with one fault each, in the form that `bench.compiled` takes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from bench.op import Op, Shape


@triton.jit
def sound_kernel(x_ptr, y_ptr, cols, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    start = tl.program_id(0).to(tl.int64) * cols
    x = tl.load(x_ptr + start + offs, offs < cols, other=0.0).to(tl.float32)
    tl.store(y_ptr + start + offs, x / tl.sum(x), offs < cols)


@triton.jit
def empty_kernel(x_ptr, y_ptr, cols, BLOCK: tl.constexpr):
    pass


@triton.jit
def spilling_kernel(x_ptr, y_ptr, cols, BLOCK: tl.constexpr):
    """Holds a row of 64 blocks in registers."""
    sound_kernel(x_ptr, y_ptr, cols, 64 * BLOCK)


@triton.jit(do_not_specialize=["cols"])
def scalar_access_kernel(x_ptr, y_ptr, cols, BLOCK: tl.constexpr):
    """Cannot know that rows start at a multiple of 16 elements."""
    sound_kernel(x_ptr, y_ptr, cols, BLOCK)


@triton.jit
def product_kernel(x_ptr, y_ptr, cols, BLOCK: tl.constexpr):
    """The product of a (BLOCK, cols) matrix with its own transpose, by tiles of four blocks."""
    offs_m = tl.arange(0, BLOCK)
    offs_k = tl.arange(0, 4 * BLOCK)
    product = tl.zeros((BLOCK, BLOCK), tl.float32)
    for first in range(0, cols, 4 * BLOCK):
        x = tl.load(x_ptr + offs_m[:, None] * cols + (first + offs_k)[None, :])
        product = tl.dot(x, tl.trans(x), product)
    tile = offs_m[:, None] * cols + offs_m[None, :]
    tl.store(y_ptr + tile, product.to(y_ptr.dtype.element_ty))


class Launch(torch.autograd.Function):
    """Launches one kernel forward, and the same kernel backward."""

    @staticmethod
    def forward(ctx: Any, kernel: Any, block: int, x: torch.Tensor) -> torch.Tensor:
        ctx.launch = kernel, block
        y = torch.empty_like(x)
        kernel[(x.shape[0],)](x, y, x.shape[1], BLOCK=block)
        return y

    @staticmethod
    def backward(ctx: Any, *dy: torch.Tensor) -> Any:
        return None, None, Launch.apply(*ctx.launch, *dy)


class NothingBackward(Launch):
    """Launches no kernel backward, as an op that fell back on the reference would."""

    @staticmethod
    def backward(ctx: Any, *dy: torch.Tensor) -> Any:
        return None, None, *dy


class Dies(Launch):
    """Takes its process down, as a compiler may."""

    @staticmethod
    def forward(ctx: Any, kernel: Any, block: int, x: torch.Tensor) -> torch.Tensor:
        os._exit(3)


class NeverEnds(Launch):
    @staticmethod
    def forward(ctx: Any, kernel: Any, block: int, x: torch.Tensor) -> torch.Tensor:
        time.sleep(3600)
        return x


def op(
    name: str,
    kernel: Any,
    *,
    shape: Shape = (64, 1024),
    block: int = 1024,
    dtype: torch.dtype = torch.bfloat16,
    function: type[torch.autograd.Function] = Launch,
) -> Op:
    call: Callable[..., Any] = lambda x: function.apply(kernel, block, x)  # noqa: E731
    return Op(
        name,
        call,
        lambda rows, columns: {"x": (rows, columns)},
        shapes=[shape],
        quick_shapes=[shape],
        small=shape,
        dtypes=(dtype,),
    )


OPS = (
    op("sound", sound_kernel),
    op("empty", empty_kernel),
    op("spilling", spilling_kernel, shape=(64, 65536)),
    op("scalar access", scalar_access_kernel),
    op("odd width", sound_kernel, shape=(64, 1000)),
    op("product", product_kernel, block=16),
    op("large product", product_kernel, block=128, dtype=torch.float32),
    op("nothing backward", sound_kernel, function=NothingBackward),
    op("dies", sound_kernel, function=Dies),
    op("never ends", sound_kernel, function=NeverEnds),
)
