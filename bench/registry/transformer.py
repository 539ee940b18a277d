"""torch.nn's transformer blocks: ours beside torch's own, eager and compiled."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import fastattn.nn
from fastattn.ops.core.catalog import Normal

from ..op import BACKWARD, FORWARD, Benchmark, Op, Shape, Traffic

HEAD_DIM = 64
FEED_FORWARD = 4

# Batch, length and width.
SIZES = [(8, 2048, 1024), (4, 4096, 2048), (32, 512, 1024)]
SMALL_SIZES = [(8, 64, 256), (2, 256, 512)]


@dataclass(frozen=True, eq=False)
class Block(Op):
    """A module as an op of its inputs and parameters; torch's own is its reference."""

    @property
    def reference(self) -> Callable[..., Any]:
        """torch's module."""
        assert self.torch is not None
        return self.torch


def attention(library: Any, width: int, heads: int, **options: Any) -> nn.Module:
    return library.MultiheadAttention(width, heads, batch_first=True, **options)


def encoder_layer(library: Any, width: int, heads: int, **options: Any) -> nn.Module:
    feed_forward = FEED_FORWARD * width
    return library.TransformerEncoderLayer(
        width, heads, feed_forward, 0.0, "gelu", batch_first=True, **options
    )


def decoder_layer(library: Any, width: int, heads: int, **options: Any) -> nn.Module:
    return library.TransformerDecoderLayer(
        width, heads, FEED_FORWARD * width, 0.0, batch_first=True, norm_first=True, **options
    )


def transformer(library: Any, width: int, heads: int, **options: Any) -> nn.Module:
    return library.Transformer(
        width, heads, 1, 1, FEED_FORWARD * width, 0.0, batch_first=True, **options
    )


Make = Callable[..., nn.Module]

INPUTS: dict[Make, tuple[str, ...]] = {
    attention: ("query",),
    encoder_layer: ("src",),
    decoder_layer: ("tgt", "memory"),
    transformer: ("src", "tgt"),
}
ATTENTIONS: dict[Make, int] = {attention: 1, encoder_layer: 1, decoder_layer: 2, transformer: 3}
CAUSAL = {decoder_layer: ("tgt_mask", "tgt_is_causal"), transformer: ("tgt_mask", "tgt_is_causal")}


def heads_of(width: int) -> int:
    return max(1, width // HEAD_DIM)


def arguments(make: Make) -> Callable[..., dict[str, Any]]:
    """Inputs (B, L, C) and the parameters by their names, about as large as when drawn."""

    def at(batch: int, length: int, width: int) -> dict[str, Any]:
        given: dict[str, Any] = dict.fromkeys(INPUTS[make], (batch, length, width))
        module = make(nn, width, heads_of(width), device="meta")
        for name, parameter in module.named_parameters():
            shape = tuple(parameter.shape)
            if len(shape) == 2:
                given[name] = Normal(shape, scale=shape[1] ** -0.5)
            else:
                given[name] = Normal(shape, scale=0.1, mean=float("norm" in name))
        return given

    return at


def run_by(library: Any, make: Make) -> Callable[..., torch.Tensor]:
    """The module of a library, as a function of its inputs and parameters."""
    modules: dict[int, nn.Module] = {}

    def call(**tensors: torch.Tensor) -> torch.Tensor:
        inputs = [tensors[name] for name in INPUTS[make]]
        first = inputs[0]
        width = first.shape[2]
        if width not in modules:
            modules[width] = make(library, width, heads_of(width), device="meta")
        options: dict[str, Any] = {}
        if make is attention:
            inputs, options = [first, first, first], {"need_weights": False}
        elif make in CAUSAL:
            mask, hint = CAUSAL[make]
            length = inputs[-1].shape[1] if make is transformer else first.shape[1]
            causal = nn.Transformer.generate_square_subsequent_mask(
                length, device=first.device, dtype=first.dtype
            )
            options = {mask: causal, hint: True}
        parameters = {name: x for name, x in tensors.items() if name not in INPUTS[make]}
        y = torch.func.functional_call(modules[width], parameters, tuple(inputs), options)
        return y[0] if make is attention else y

    return call


def parameters_of(make: Make, width: int) -> Mapping[str, torch.Tensor]:
    return dict(make(nn, width, heads_of(width), device="meta").named_parameters())


def flops(make: Make) -> Callable[[Shape], dict[str, float]]:
    """Products with the weights of every token, and those of queries, keys and values."""

    def at(shape: Shape) -> dict[str, float]:
        batch, length, width = shape
        weights = sum(p.numel() for p in parameters_of(make, width).values() if p.dim() == 2)
        products = 2.0 * batch * length * weights
        scores = ATTENTIONS[make] * 4.0 * batch * length * length * width
        return {FORWARD: products + scores, BACKWARD: 2.0 * products + 2.5 * scores}

    return at


def traffic(make: Make) -> Callable[[Shape, torch.dtype, Any], dict[str, Traffic]]:
    """Inputs, parameters and the output; beyond those, each tensor between two kernels twice.

    The gradient reads those tensors again and moves as many of its own.
    """

    def at(shape: Shape, dtype: torch.dtype, target: Any) -> dict[str, Traffic]:
        width = shape[-1]
        tokens = math.prod(shape) * dtype.itemsize
        parameters = sum(p.numel() for p in parameters_of(make, width).values()) * dtype.itemsize
        least = tokens * (len(INPUTS[make]) + 1) + parameters
        # Queries, keys, values, what attention gives, and its projection with the sum behind it.
        between = ATTENTIONS[make] * 6 * tokens
        if make is not attention:
            layers = 2 if make is transformer else 1
            between += layers * (FEED_FORWARD + 2) * tokens
        # Gradients of all that was read, and the inputs once more.
        backward = tokens * (2 * len(INPUTS[make]) + 1) + 2 * parameters
        return {
            FORWARD: Traffic(least, least + 2 * between),
            BACKWARD: Traffic(backward, backward + 4 * between),
        }

    return at


def block(name: str, make: Make) -> Block:
    return Block(
        name,
        run_by(fastattn.nn, make),
        arguments(make),
        # Its kernels are compiled where their ops are.
        shapes=[],
        quick_shapes=[],
        small=(2, 16, 64),
        torch=run_by(nn, make),
        benchmark=Benchmark(SIZES, SMALL_SIZES, traffic(make), flops=flops(make), by_kernels=False),
    )


OPS = (
    block("nn.MultiheadAttention", attention),
    block("nn.TransformerEncoderLayer", encoder_layer),
    block("nn.TransformerDecoderLayer, causal, norm first", decoder_layer),
    block("nn.Transformer, causal", transformer),
)
