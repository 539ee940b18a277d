"""Whole models on two ranks: each block a unit of FSDP2, each rank with half of the batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from comparison import close
from small_models import batch_of, blocks_of, small
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import fastattn

STEPS = 3


def train(model: Any, batch: dict[str, torch.Tensor]) -> tuple[list[torch.Tensor], Any]:
    """The losses of a few steps, and the parameters after them, whole."""
    # Not Adam, which sees no wrong factor.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses, {
        name: parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach()
        for name, parameter in model.named_parameters()
    }


@fastattn.backend("reference")
def fsdp2_of_families(mesh: DeviceMesh) -> None:
    """T5 reads a table of its first block in all others, and GPT-2 ties its head."""
    for name in ("T5ForConditionalGeneration", "GPT2LMHeadModel"):
        whole = batch_of(small(name), sequences=4)
        losses, parameters = train(small(name), whole)
        assert losses[-1] < losses[0], "nothing was learned"
        for reshard in (None, True):
            model: Any = small(name)
            for block in blocks_of(model):
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh, reshard_after_forward=reshard)
            rank, ranks = mesh.get_rank(), mesh.size()
            half = {key: tensor.chunk(ranks)[rank] for key, tensor in whole.items()}
            found, sharded = train(model, half)
            for step, (loss, expected) in enumerate(zip(found, losses, strict=True)):
                dist.all_reduce(loss)
                close(loss / ranks, expected, f"{name}: loss of step {step}")
            assert sharded.keys() == parameters.keys()
            for parameter, expected in parameters.items():
                close(sharded[parameter], expected, f"{name}: {parameter}")
