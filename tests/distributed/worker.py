"""Two gloo processes on the CPU that hold what is distributed against one process alone.

`python worker.py FOLDER` runs every check on both ranks and writes FOLDER/<rank>.json: for each
check, null or the traceback of its failure. Kernels run in the interpreter if that is on.
"""

import datetime
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from block_checks import (
    fsdp2_of_blocks,
    tensor_parallel_blocks,
    tensor_parallel_blocks_by_kernels,
    tensor_parallel_blocks_with_numbers_of_heads,
    tensor_parallel_blocks_with_tokens_split,
)
from comparison import close, compare_with_one_process, incoming
from expert_checks import (
    expert_parallel,
    expert_parallel_by_kernels,
    expert_parallel_refusals,
    expert_parallel_training,
)
from family_checks import fsdp2_of_families
from op_checks import (
    attentions,
    contrastive,
    cross_entropies,
    gated_activations,
    linear_cross_entropies,
    log_probs,
    modulated_norms,
    rotations,
    softmaxes,
)
from quick_interpreter import quicken_interpreter
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

import fastattn
from fastattn.interpreter import round_to_bfloat16

RANKS = 2
SHAPE = (4, 6, 20)
ROWS: tuple[Placement, ...] = (Shard(0), Shard(1), Replicate())

Call = Callable[..., Any]

NORMS: dict[str, tuple[Call, tuple[str, ...]]] = {
    "rms_norm": (lambda x, w, b: fastattn.rms_norm(x, w, 1e-6, bias=b), ("x", "w", "b")),
    "layer_norm": (fastattn.layer_norm, ("x", "w", "b")),
    "layer_norm without parameters": (fastattn.layer_norm, ("x",)),
    "add_rms_norm": (lambda x, r, w: fastattn.add_rms_norm(x, r, w, 1e-6), ("x", "r", "w")),
    "add_layer_norm": (fastattn.add_layer_norm, ("x", "r", "w", "b")),
}
"""Ops as functions of tensors: x and r are made of rows, w and b are parameters."""


def seed() -> torch.Tensor:
    return torch.tensor([2**33 + 7])


DROPOUTS: dict[str, tuple[Call, tuple[str, ...]]] = {
    "dropout": (lambda x: fastattn.dropout(x, 0.5, seed=seed()), ("x",)),
    "add_rms_norm": (
        lambda x, r, w: fastattn.add_rms_norm(x, r, w, 1e-6, dropout_p=0.3, seed=seed()),
        ("x", "r", "w"),
    ),
    "add_layer_norm": (
        lambda x, r, w, b: fastattn.add_layer_norm(x, r, w, b, dropout_p=0.3, seed=seed()),
        ("x", "r", "w", "b"),
    ),
}


def plain_tensors(names: tuple[str, ...]) -> list[torch.Tensor]:
    """Leaves with the same numbers on every rank."""
    torch.manual_seed(0)
    shapes = {"x": SHAPE, "r": SHAPE, "w": SHAPE[-1:], "b": SHAPE[-1:]}
    made = {name: torch.randn(shape).requires_grad_() for name, shape in shapes.items()}
    return [made[name] for name in names]


def compare_rows(
    mesh: DeviceMesh, name: str, call: Call, names: tuple[str, ...], rows: Placement
) -> None:
    """A call on DTensors whose parameters are whole on every rank."""
    placements = [rows if key in "xr" else Replicate() for key in names]
    compare_with_one_process(mesh, name, call, plain_tensors(names), placements, rows)


def compile_before_any_eager_call(mesh: DeviceMesh) -> None:
    """Sharding rules are known when Dynamo meets the process's first DTensor."""
    x, w = plain_tensors(("x", "w"))
    fastattn.rms_norm(x, w, 1e-6).backward(incoming(x))
    sharded = distribute_tensor(x.detach(), mesh, [Shard(0)]).requires_grad_()
    weight = distribute_tensor(w.detach(), mesh, [Replicate()]).requires_grad_()

    compiled = torch.compile(
        lambda x, w: fastattn.rms_norm(x, w, 1e-6), fullgraph=True, backend="aot_eager"
    )
    compiled(sharded, weight).backward(distribute_tensor(incoming(x), mesh, [Shard(0)]))
    for tensor, one in ((sharded, x), (weight, w)):
        assert isinstance(tensor.grad, DTensor)
        assert one.grad is not None
        close(tensor.grad.full_tensor(), one.grad, "compiled")


def norms_of_sharded_rows(mesh: DeviceMesh) -> None:
    for name, (call, names) in NORMS.items():
        for rows in ROWS:
            compare_rows(mesh, name, call, names, rows)


def dropout_of_sharded_rows(mesh: DeviceMesh) -> None:
    for name, (call, names) in DROPOUTS.items():
        for rows in ROWS:
            compare_rows(mesh, name, call, names, rows)


ROW_CHECKS = (
    norms_of_sharded_rows,
    dropout_of_sharded_rows,
    modulated_norms,
    gated_activations,
    softmaxes,
    rotations,
    cross_entropies,
    linear_cross_entropies,
    log_probs,
    contrastive,
    attentions,
)


def reference_backend(mesh: DeviceMesh) -> None:
    with fastattn.backend("reference"):
        for check in ROW_CHECKS:
            check(mesh)


def sharded_columns(mesh: DeviceMesh) -> None:
    """A row that is spread over ranks has to be gathered, and is."""
    x, w = plain_tensors(("x", "w"))
    expected = fastattn.rms_norm(x, w, 1e-6)
    sharded = distribute_tensor(x.detach(), mesh, [Shard(2)])
    weight = distribute_tensor(w.detach(), mesh, [Replicate()])
    found: Any = fastattn.rms_norm(sharded, weight, 1e-6)
    close(found.full_tensor(), expected, "sharded columns")


def drawn_seeds_agree(mesh: DeviceMesh) -> None:
    """Ranks whose generators differ still apply one mask to what they hold in common."""
    torch.manual_seed(dist.get_rank())
    ones = distribute_tensor(torch.ones(SHAPE), mesh, [Replicate()])
    dropped: Any = fastattn.dropout(ones, 0.5)
    kept = dropped.to_local()
    parts = [torch.empty_like(kept) for _ in range(RANKS)]
    dist.all_gather(parts, kept)
    assert torch.equal(parts[0], parts[1])
    assert 0 < kept.count_nonzero() < kept.numel()


def small_model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        fastattn.nn.LayerNorm(12),
        nn.Linear(12, 24),
        nn.GELU(),
        fastattn.nn.RMSNorm(24, eps=1e-6),
        nn.Linear(24, 5),
    )


def train(model: nn.Module, batch: torch.Tensor) -> list[torch.Tensor]:
    """Two steps; returns the parameters, whole."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
    return [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]


def data_parallel_training(mesh: DeviceMesh, wrap: Callable[[nn.Module], Any]) -> None:
    """Half a batch on each of two ranks trains what the whole batch trains in one process."""
    torch.manual_seed(1)
    batch = torch.randn(8, 3, 12)
    expected = train(small_model(), batch)
    found = train(wrap(small_model()), batch.chunk(RANKS)[mesh.get_rank()])
    for place, (a, b) in enumerate(zip(found, expected, strict=True)):
        close(a, b, f"parameter {place}")


def ddp(mesh: DeviceMesh) -> None:
    data_parallel_training(mesh, DistributedDataParallel)


def fsdp2(mesh: DeviceMesh) -> None:
    data_parallel_training(mesh, lambda model: fully_shard(model, mesh=mesh))


CHECKS = (
    # First, for it is about the process's first DTensor.
    compile_before_any_eager_call,
    *ROW_CHECKS,
    reference_backend,
    sharded_columns,
    drawn_seeds_agree,
    ddp,
    fsdp2,
    fsdp2_of_blocks,
    fsdp2_of_families,
    tensor_parallel_blocks,
    tensor_parallel_blocks_with_tokens_split,
    tensor_parallel_blocks_by_kernels,
    tensor_parallel_blocks_with_numbers_of_heads,
    expert_parallel,
    expert_parallel_by_kernels,
    expert_parallel_refusals,
    expert_parallel_training,
)


def run(rank: int, folder: str) -> None:
    """What one of the processes does."""
    torch.set_num_threads(1)
    round_to_bfloat16()
    quicken_interpreter()
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=RANKS,
        timeout=datetime.timedelta(seconds=60),
    )
    mesh = init_device_mesh("cpu", (RANKS,))
    outcomes: dict[str, str | None] = {}
    for check in CHECKS:
        try:
            check(mesh)
            outcomes[check.__name__] = None
        except Exception:
            outcomes[check.__name__] = traceback.format_exc()
    Path(folder, f"{rank}.json").write_text(json.dumps(outcomes))
    dist.destroy_process_group()


if __name__ == "__main__":
    spawn(run, args=(sys.argv[1],), nprocs=RANKS)
