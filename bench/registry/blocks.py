"""The modern transformer blocks: ours beside the same in plain PyTorch, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import fastattn.nn
from fastattn.ops.core.catalog import Normal

from ..op import BACKWARD, FORWARD, Benchmark, Shape, Traffic
from .transformer import Block

HEAD_DIM, ROPE_DIM, GROUP, RANK = 64, 32, 4, 16
EPS = 1e-6

# Length and width of one sequence.
SIZES = [(8192, 2048), (4096, 4096), (16384, 1024)]
LINEAR_SIZES = [(16384, 4096), (65536, 1024)]
SMALL_SIZES = [(512, 256), (128, 512)]

Parameters = dict[str, torch.Tensor]
Tables = tuple[torch.Tensor, torch.Tensor]


def heads_of(width: int) -> int:
    return max(1, width // HEAD_DIM)


def attention(width: int, **options: Any) -> nn.Module:
    """Llama's: causal, rotary, four query heads to a key head."""
    heads = heads_of(width)
    return fastattn.nn.Attention(
        width, heads, max(1, heads // GROUP), HEAD_DIM, causal=True, **options
    )


def block(width: int, **options: Any) -> nn.Module:
    """Llama's: pre-norm, SwiGLU."""
    mlp = fastattn.nn.GatedMLP(width, 3 * width, **options)
    norm = partial(fastattn.nn.RMSNorm, width, eps=EPS, **options)
    return fastattn.nn.TransformerBlock(attention(width, **options), mlp, norm)


def latent_attention(width: int, **options: Any) -> nn.Module:
    """DeepSeek-V3's."""
    return fastattn.nn.LatentAttention(
        width,
        heads_of(width),
        q_lora_rank=width // 2,
        kv_lora_rank=width // 4,
        qk_nope_head_dim=HEAD_DIM,
        qk_rope_head_dim=ROPE_DIM,
        v_head_dim=HEAD_DIM,
        **options,
    )


def lora(width: int, **options: Any) -> nn.Module:
    return fastattn.nn.LoRALinear(width, width, rank=RANK, **options)


def turned(x: torch.Tensor, tables: Tables) -> torch.Tensor:
    cos, sin = (table.to(x.dtype) for table in tables)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def split_heads(x: torch.Tensor, head_dim: int) -> torch.Tensor:
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def plain_attention(x: torch.Tensor, tables: Tables, p: Parameters) -> torch.Tensor:
    q, k, v = (split_heads(F.linear(x, p[f"{name}_proj.weight"]), HEAD_DIM) for name in "qkv")
    q, k = turned(q, tables), turned(k, tables)
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return F.linear(o.transpose(1, 2).flatten(2), p["o_proj.weight"])


def plain_block(x: torch.Tensor, tables: Tables, p: Parameters) -> torch.Tensor:
    width = x.shape[-1:]
    own = {name.removeprefix("self_attn."): tensor for name, tensor in p.items()}
    y = F.rms_norm(x, width, p["input_layernorm.weight"], EPS)
    x = x + plain_attention(y, tables, own)
    y = F.rms_norm(x, width, p["post_attention_layernorm.weight"], EPS)
    gate, up = (F.linear(y, p[f"mlp.{name}_proj.weight"]) for name in ("gate", "up"))
    return x + F.linear(F.silu(gate) * up, p["mlp.down_proj.weight"])


def plain_latent_attention(x: torch.Tensor, tables: Tables, p: Parameters) -> torch.Tensor:
    kv_rank = p["kv_a_layernorm.weight"].shape[0]
    q = F.linear(x, p["q_a_proj.weight"])
    q = F.rms_norm(q, q.shape[-1:], p["q_a_layernorm.weight"], EPS)
    q = split_heads(F.linear(q, p["q_b_proj.weight"]), HEAD_DIM + ROPE_DIM)
    q_nope, q_rope = q.split([HEAD_DIM, ROPE_DIM], dim=-1)
    both = F.linear(x, p["kv_a_proj_with_mqa.weight"])
    latent, k_rope = both.split([kv_rank, ROPE_DIM], dim=-1)
    latent = F.rms_norm(latent, (kv_rank,), p["kv_a_layernorm.weight"], EPS)
    kv = split_heads(F.linear(latent, p["kv_b_proj.weight"]), 2 * HEAD_DIM)
    k_nope, v = kv.chunk(2, dim=-1)

    def pairs(x: torch.Tensor) -> torch.Tensor:
        """Neighbours, which ours turns, as halves: their products with keys are the same."""
        return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)

    k_rope = turned(pairs(k_rope[:, None]), tables).expand_as(q_rope)
    q = torch.cat((q_nope, turned(pairs(q_rope), tables)), dim=-1)
    o = F.scaled_dot_product_attention(q, torch.cat((k_nope, k_rope), dim=-1), v, is_causal=True)
    return F.linear(o.transpose(1, 2).flatten(2), p["o_proj.weight"])


def plain_lora(x: torch.Tensor, tables: Tables | None, p: Parameters) -> torch.Tensor:
    # The weight is frozen, and stays in its dtype where the errors are told in float64.
    weight, bias = p["weight"].to(x.dtype), p["bias"].to(x.dtype)
    return F.linear(x, weight, bias) + F.linear(F.linear(x, p["lora_A"]), p["lora_B"])


@dataclass(frozen=True)
class Pair:
    """A module of ours, made of a width, and the same in plain PyTorch."""

    make: Callable[..., nn.Module]
    plain: Callable[[torch.Tensor, Any, Parameters], torch.Tensor]
    turned_columns: int
    """The columns of a head that rotary positions turn; 0 if there is no attention."""


PAIRS = {
    "nn.Attention, causal, rotary, GQA": Pair(attention, plain_attention, HEAD_DIM),
    "nn.TransformerBlock, as Llama's": Pair(block, plain_block, HEAD_DIM),
    "nn.LatentAttention, as DeepSeek's": Pair(latent_attention, plain_latent_attention, ROPE_DIM),
    "nn.LoRALinear": Pair(lora, plain_lora, 0),
}


@lru_cache
def module_of(pair: Pair, width: int) -> nn.Module:
    """The module without memory: its parameters are arguments of each call."""
    return pair.make(width, device="meta")


def drawn(shape: tuple[int, ...]) -> Callable[[Any], torch.Tensor]:
    """A parameter that is not trained."""
    scale = shape[-1] ** -0.5
    return lambda device: torch.randn(shape, device=device, dtype=torch.bfloat16) * scale


def arguments(pair: Pair) -> Callable[..., dict[str, Any]]:
    """x (1, length, width), the tables, and the parameters about as large as when drawn."""

    def at(length: int, width: int) -> dict[str, Any]:
        given: dict[str, Any] = {"x": (1, length, width)}
        if pair.turned_columns:
            rotary = partial(fastattn.nn.RotaryEmbedding, pair.turned_columns, length)
            given["cos"] = lambda device: rotary(device=device).cos
            given["sin"] = lambda device: rotary(device=device).sin
        for name, parameter in module_of(pair, width).named_parameters():
            shape = tuple(parameter.shape)
            if not parameter.requires_grad:
                given[name] = drawn(shape)
            elif len(shape) == 2:
                given[name] = Normal(shape, scale=shape[1] ** -0.5)
            else:
                given[name] = Normal(shape, scale=0.1, mean=1.0)
        return given

    return at


def ours(pair: Pair) -> Callable[..., torch.Tensor]:
    def call(x: torch.Tensor, **tensors: torch.Tensor) -> torch.Tensor:
        options = {}
        if pair.turned_columns:
            options["rotary"] = (tensors.pop("cos"), tensors.pop("sin"))
        module = module_of(pair, x.shape[-1])
        return torch.func.functional_call(module, tensors, (x,), options)

    return call


def plain(pair: Pair) -> Callable[..., torch.Tensor]:
    def call(x: torch.Tensor, **tensors: torch.Tensor) -> torch.Tensor:
        tables = (tensors.pop("cos"), tensors.pop("sin")) if pair.turned_columns else None
        return pair.plain(x, tables, tensors)

    return call


def flops(pair: Pair) -> Callable[[Shape], dict[str, float]]:
    """Products with the weights, those of their gradients if they get any, and attention's."""

    def at(shape: Shape) -> dict[str, float]:
        length, width = shape
        matrices = [p for p in module_of(pair, width).parameters() if p.dim() == 2]
        products = 2.0 * length * sum(p.numel() for p in matrices)
        trained = 2.0 * length * sum(p.numel() for p in matrices if p.requires_grad)
        scores = 0.0
        if pair.turned_columns:
            columns = 3 * HEAD_DIM if pair.make is latent_attention else 2 * HEAD_DIM
            scores = heads_of(width) * float(length) ** 2 * columns
        return {FORWARD: products + scores, BACKWARD: products + trained + 2.5 * scores}

    return at


def traffic(pair: Pair) -> Callable[[Shape, torch.dtype, Any], dict[str, Traffic]]:
    """x, parameters, tables and the output; beyond those, what each product writes is read again.

    The backward reads those tensors again and moves as many of its own.
    """

    def at(shape: Shape, dtype: torch.dtype, target: Any) -> dict[str, Traffic]:
        length, width = shape
        parameters = list(module_of(pair, width).parameters())
        x = length * width * dtype.itemsize
        weights = sum(p.numel() for p in parameters) * dtype.itemsize
        trained = sum(p.numel() for p in parameters if p.requires_grad) * dtype.itemsize
        tables = 2 * length * (pair.turned_columns // 2) * 4
        columns = sum(p.shape[0] for p in parameters if p.dim() == 2)
        between = 2 * length * columns * dtype.itemsize
        least = 2 * x + weights + tables
        backward = 3 * x + weights + trained + tables
        return {
            FORWARD: Traffic(least, least + between),
            BACKWARD: Traffic(backward, backward + 2 * between),
        }

    return at


OPS = tuple(
    Block(
        name,
        ours(pair),
        arguments(pair),
        # Its kernels are compiled where their ops are.
        shapes=[],
        quick_shapes=[],
        small=(16, 64),
        dtypes=(torch.bfloat16,),
        torch=plain(pair),
        benchmark=Benchmark(
            SIZES if pair.turned_columns else LINEAR_SIZES,
            SMALL_SIZES,
            traffic(pair),
            flops=flops(pair),
            by_kernels=False,
        ),
    )
    for name, pair in PAIRS.items()
)
