"""Stacks of TransformerBlocks on two ranks: sharded by FSDP2, and split by parallel plans.

Training takes minutes in the interpreter, so kernels take part in one step of one sequence alone.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from comparison import close
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import fastattn

COLUMNS, HEADS, LENGTH, STEPS = 16, 4, 6, 3


def rotary_and_norms() -> dict[str, Any]:
    """Attention as in Qwen3."""
    rotary = fastattn.nn.RotaryEmbedding(COLUMNS // HEADS, LENGTH)
    return {"rotary": rotary, "qk_norm": rms}


def numbers_of_heads() -> dict[str, Any]:
    """Attention with parameters that have a number for each head."""
    return {"sinks": True, "relative": fastattn.nn.AlibiPositions(HEADS, learnable=True)}


rms = partial(fastattn.nn.RMSNorm, eps=1e-6)


def two_blocks(
    order: Any = "pre", options: Callable[[], dict[str, Any]] = rotary_and_norms
) -> fastattn.nn.TransformerStack:
    """The same on every rank."""
    torch.manual_seed(3)

    def block() -> fastattn.nn.TransformerBlock:
        attention = fastattn.nn.Attention(COLUMNS, HEADS, 2, causal=True, **options())
        mlp = fastattn.nn.GatedMLP(COLUMNS, 24)
        return fastattn.nn.TransformerBlock(attention, mlp, partial(rms, COLUMNS), order=order)

    return fastattn.nn.TransformerStack([block(), block()], rms(COLUMNS))


def batch(sequences: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    x, target = torch.randn(2, sequences, LENGTH, COLUMNS)
    return x, target


def train(
    model: nn.Module, x: torch.Tensor, target: torch.Tensor, share: float = 1.0, steps: int = STEPS
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """The losses of a few steps, and the parameters after them, whole.

    `share` is that of the tokens whose gradients are summed to those of the whole loss.
    """
    # Not Adam, which sees no wrong factor.
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean() * share
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses, {
        name: parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach()
        for name, parameter in model.named_parameters()
    }


def compare(
    found: tuple[list[torch.Tensor], dict[str, torch.Tensor]],
    expected: tuple[list[torch.Tensor], dict[str, torch.Tensor]],
) -> None:
    for step, (a, b) in enumerate(zip(found[0], expected[0], strict=True)):
        close(a, b, f"loss of step {step}")
    assert found[1].keys() == expected[1].keys()
    for name, one in expected[1].items():
        close(found[1][name], one, name)
    losses = expected[0]
    assert len(losses) == 1 or losses[-1] < 0.9 * losses[0], "nothing was learned"


@fastattn.backend("reference")
def fsdp2_of_blocks(mesh: DeviceMesh) -> None:
    """Each block is a unit, pairs go from one to the next, and each rank has half of the batch."""
    for order in ("pre", "sandwich"):
        x, target = batch()
        expected = train(two_blocks(order), x, target)
        model = two_blocks(order)
        for block in model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        rank, ranks = mesh.get_rank(), mesh.size()
        losses, parameters = train(model, x.chunk(ranks)[rank], target.chunk(ranks)[rank])
        for loss in losses:
            dist.all_reduce(loss)
        compare(([loss / ranks for loss in losses], parameters), expected)


PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def columns_and_rows() -> dict[str, ParallelStyle]:
    """The plan for one block that splits its heads and its hidden columns over the ranks."""
    return {
        **{name: ColwiseParallel() for name in (*PROJECTIONS, "mlp.gate_proj", "mlp.up_proj")},
        **{name: RowwiseParallel() for name in ("self_attn.o_proj", "mlp.down_proj")},
        # Every rank has some heads, and a share of the gradients of what is the same for all.
        "self_attn.q_norm": SequenceParallel(sequence_dim=2, use_local_output=True),
        "self_attn.k_norm": SequenceParallel(sequence_dim=2, use_local_output=True),
    }


def heads_as_dtensors() -> dict[str, ParallelStyle]:
    """The same, with attention knowing which heads a rank has, and so what is theirs of all."""
    heads = {name: ColwiseParallel(use_local_output=False) for name in PROJECTIONS}
    return {**columns_and_rows(), **heads}


def with_tokens_split() -> dict[str, ParallelStyle]:
    """The same, with norms and additions between the layers split over the tokens."""
    whole = {"input_layouts": (Shard(1),), "desired_input_layouts": (Replicate(),)}
    return {
        **columns_and_rows(),
        "input_layernorm": SequenceParallel(use_local_output=True),
        "post_attention_layernorm": SequenceParallel(use_local_output=True),
        "self_attn": PrepareModuleInput(**whole, use_local_output=True),
        "mlp": PrepareModuleInput(**whole, use_local_output=True),
        "self_attn.o_proj": RowwiseParallel(output_layouts=Shard(1)),
        "mlp.down_proj": RowwiseParallel(output_layouts=Shard(1)),
    }


def split(
    mesh: DeviceMesh,
    plan: Callable[[], dict[str, ParallelStyle]],
    order: Any = "pre",
    options: Callable[[], dict[str, Any]] = rotary_and_norms,
) -> nn.Module:
    model = two_blocks(order, options)
    for block in model.layers:
        names = dict(block.named_modules())
        own = {name: style for name, style in plan().items() if name in names}
        parallelize_module(block, mesh, own)
    return model


@fastattn.backend("reference")
def tensor_parallel_blocks(mesh: DeviceMesh) -> None:
    """Heads and hidden columns are split, and the losses are those of one process."""
    x, target = batch()
    for order in ("pre", "post", "sandwich"):
        expected = train(two_blocks(order), x, target)
        model: Any = split(mesh, columns_and_rows, order)
        weight = model.layers[0].self_attn.q_proj.weight
        assert weight.to_local().shape == (COLUMNS // 2, COLUMNS)
        compare(train(model, x, target), expected)


@fastattn.backend("reference")
def tensor_parallel_blocks_with_tokens_split(mesh: DeviceMesh) -> None:
    """Between the layers each rank has half of the tokens."""
    x, target = batch()
    expected = train(two_blocks(), x, target)
    rank, ranks = mesh.get_rank(), mesh.size()
    model: Any = split(mesh, with_tokens_split)
    parallelize_module(model, mesh, {"norm": SequenceParallel(use_local_output=True)})
    x, target = (tensor.chunk(ranks, dim=1)[rank] for tensor in (x, target))
    losses, parameters = train(model, x, target, share=1 / ranks)
    for loss in losses:
        dist.all_reduce(loss)
    compare((losses, parameters), expected)


def tensor_parallel_blocks_by_kernels(mesh: DeviceMesh) -> None:
    """One sequence, one step, which is one of the gradients."""
    x, target = batch(sequences=1)
    expected = train(two_blocks(), x, target, steps=1)
    compare(train(split(mesh, columns_and_rows), x, target, steps=1), expected)


@fastattn.backend("reference")
def tensor_parallel_blocks_with_numbers_of_heads(mesh: DeviceMesh) -> None:
    """Sinks and slopes are whole on every rank, and get the gradients of all heads."""
    x, target = batch()
    expected = train(two_blocks(options=numbers_of_heads), x, target)
    model = split(mesh, heads_as_dtensors, options=numbers_of_heads)
    compare(train(model, x, target), expected)
