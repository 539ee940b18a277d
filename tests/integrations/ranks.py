"""Two gloo processes that train patched models: `python ranks.py FOLDER` writes what each gives.

FOLDER/<rank>.pt has for each family and each way of training the losses of two steps, and the
gradients of the first, whole.
"""

import datetime
import sys
from pathlib import Path
from typing import Any

from torchvision_import import import_torchvision

import_torchvision()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402
from torch.multiprocessing.spawn import spawn  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

import fastattn  # noqa: E402
from families import FAMILIES, make_model, tokens  # noqa: E402

RANKS = 2
NAMES = ("llama", "gemma2", "gpt2")
WAYS = ("ddp", "fsdp2", "fsdp2, checkpointing")


def step(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """The losses of two steps, and the gradients of the first."""
    # Not Adam, which sees no wrong factor.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found: dict[str, torch.Tensor] = {}
    for number in range(2):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        found[f"loss {number}"] = loss.detach()
        if number == 0:
            for name, parameter in model.named_parameters():
                gradient = parameter.grad
                whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
                found[f"d{name.removeprefix('module.')}"] = whole.clone()
        optimizer.step()
    return found


def distributed(model: Any, way: str, mesh: Any) -> Any:
    """A patched model, spread over the ranks."""
    if way == "ddp":
        return DistributedDataParallel(model)
    if "checkpointing" in way:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    layers = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def run(rank: int, folder: str) -> None:
    """What one of the processes does."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=RANKS,
        timeout=datetime.timedelta(seconds=60),
    )
    mesh = init_device_mesh("cpu", (RANKS,))
    found = {}
    for name in NAMES:
        for way in WAYS:
            model = make_model(FAMILIES[name])
            fastattn.patch(model)
            results = step(distributed(model, way, mesh), tokens(2 * RANKS).chunk(RANKS)[rank])
            for key in ("loss 0", "loss 1"):
                dist.all_reduce(results[key])
                results[key] /= RANKS
            found[name, way] = results
    torch.save(found, Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()


if __name__ == "__main__":
    spawn(run, args=(sys.argv[1],), nprocs=RANKS)
