"""Experts that are dealt out to two ranks, against all of them in one process."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from comparison import close, incoming
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, distribute_tensor

import fastattn

COLUMNS, EXPERTS, K, TOKENS = 6, 4, 2, 7
PARALLELS = ("sum", "all_to_all")


def layer(kind: Any = fastattn.nn.Experts, **options: Any) -> Any:
    """A layer with shared experts, the same on every rank."""
    torch.manual_seed(2)
    return fastattn.nn.MixtureOfExperts(
        fastattn.nn.TopKRouter(COLUMNS, EXPERTS, K),
        kind(EXPERTS, COLUMNS, 5, **options),
        fastattn.nn.GatedMLP(COLUMNS, 3),
    )


def own_share(mesh: DeviceMesh, parallel: str, whole: torch.Tensor) -> torch.Tensor:
    """A rank's tokens: all of them, or 4 of 7 on the first rank and 3 on the second."""
    return whole if parallel == "sum" else whole.split([4, 3])[mesh.get_rank()]


def whole_numbers(
    mesh: DeviceMesh, parallel: str, name: str, expected: torch.Tensor, own: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A parameter's gradient as data parallelism sums it, and what it has to be on this rank."""
    if name.startswith("experts."):
        return own, expected.chunk(mesh.size())[mesh.get_rank()]
    if parallel == "all_to_all":
        dist.all_reduce(own)
    return own, expected


def compare_layer(mesh: DeviceMesh, parallel: Any, **options: Any) -> None:
    """Output, gradients, and gradients of gradients."""
    torch.manual_seed(3)
    x = torch.randn(TOKENS, COLUMNS, requires_grad=True)
    one, many = layer(**options), layer(**options)
    fastattn.nn.shard_experts(many, mesh, parallel)
    assert many.experts.down_proj.shape[0] == EXPERTS // mesh.size()
    part = own_share(mesh, parallel, x.detach()).clone().requires_grad_()
    y, found = one(x), many(part)
    close(found, own_share(mesh, parallel, y), f"{parallel}, output")
    given = own_share(mesh, parallel, incoming(y))
    (dx,) = torch.autograd.grad(y, x, incoming(y), create_graph=True)
    (dpart,) = torch.autograd.grad(found, part, given, create_graph=True)
    close(dpart, own_share(mesh, parallel, dx), f"{parallel}, gradient of x")
    (y.square().sum() + dx.square().sum()).backward()
    (found.square().sum() + dpart.square().sum()).backward()
    assert x.grad is not None
    assert part.grad is not None
    close(part.grad, own_share(mesh, parallel, x.grad), f"{parallel}, second gradient of x")
    expected = dict(one.named_parameters())
    for name, parameter in many.named_parameters():
        right, own = expected[name].grad, parameter.grad
        assert right is not None
        assert own is not None
        gradients = whole_numbers(mesh, parallel, name, right, own)
        close(*gradients, f"{parallel}, gradient of {name}")


@fastattn.backend("reference")
def expert_parallel(mesh: DeviceMesh) -> None:
    for parallel in PARALLELS:
        compare_layer(mesh, parallel)
        compare_layer(mesh, parallel, bias=True, transposed=True, interleaved=True)
        compare_layer(mesh, parallel, kind=fastattn.nn.PlainExperts, bias=True)


def expert_parallel_by_kernels(mesh: DeviceMesh) -> None:
    """The first rank's experts get all tokens but one's second, which no expert gets."""
    ids = torch.tensor([[0, 1], [1, 0], [1, EXPERTS]])
    x, weights = torch.randn(3, COLUMNS), torch.rand(3, 2)
    for tensor in (x, weights):
        dist.broadcast(tensor, 0)
    for parallel in PARALLELS:
        one, many = layer().experts, layer().experts
        fastattn.nn.shard_experts(many, mesh, parallel)  # type: ignore[arg-type]
        rows = slice(None)
        if parallel == "all_to_all":
            # The second rank has no tokens either.
            rows = slice(0, 3 if mesh.get_rank() == 0 else 0)
        y, found = one(x, ids, weights), many(x[rows], ids[rows], weights[rows])
        close(found, y[rows], f"{parallel}, output")
        y.backward(incoming(y))
        found.backward(incoming(y)[rows])
        for name, parameter in many.named_parameters():
            whole = one.get_parameter(name).grad
            assert parameter.grad is not None
            own = whole.chunk(mesh.size())[mesh.get_rank()]
            close(parameter.grad, own, f"{parallel}, gradient of {name}")


@fastattn.backend("reference")
def expert_parallel_training(mesh: DeviceMesh) -> None:
    """A Mixtral learns on two ranks what it learns in one process."""
    config = fastattn.models.MixtralConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=6,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=EXPERTS,
    )
    torch.manual_seed(5)
    tokens = torch.randint(11, (4, 6))

    def train(parallel: Any) -> list[torch.Tensor]:
        torch.manual_seed(4)
        model = fastattn.models.MixtralForCausalLM(config)
        text, apart = tokens, parallel == "all_to_all"
        if parallel:
            fastattn.nn.shard_experts(model, mesh, parallel)
        if apart:
            text = tokens.chunk(mesh.size())[mesh.get_rank()]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        losses = []
        for _ in range(3):
            loss = model(input_ids=text, labels=text).loss
            if apart:
                loss = loss / mesh.size()
            optimizer.zero_grad()
            loss.backward()
            losses.append(loss.detach())
            if apart:
                dist.all_reduce(losses[-1])
                for name, parameter in model.named_parameters():
                    if ".experts." not in name:
                        dist.all_reduce(parameter.grad)
            optimizer.step()
        return losses

    expected = train(None)
    assert expected[-1] < 0.95 * expected[0], "nothing was learned"
    for parallel in PARALLELS:
        for step, (loss, right) in enumerate(zip(train(parallel), expected, strict=True)):
            close(loss, right, f"{parallel}, loss of step {step}")


def expert_parallel_refusals(mesh: DeviceMesh) -> None:
    with pytest.raises(ValueError, match=r"Linear has no fastattn\.nn\.Experts"):
        fastattn.nn.shard_experts(nn.Linear(2, 2), mesh)
    with pytest.raises(ValueError, match="3 experts cannot be dealt out to 2 ranks"):
        fastattn.nn.shard_experts(fastattn.nn.Experts(3, 4, 2), mesh)
    with pytest.raises(ValueError, match="parallel must be one of"):
        fastattn.nn.shard_experts(layer(), mesh, "product")  # type: ignore[arg-type]
    two = init_device_mesh("cpu", (1, mesh.size()))
    with pytest.raises(ValueError, match="mesh must have one dimension, got 2"):
        fastattn.nn.shard_experts(layer(), two)
    sharded = layer()
    fastattn.nn.shard_experts(sharded, mesh)
    with pytest.raises(ValueError, match="dealt out already"):
        fastattn.nn.shard_experts(sharded, mesh)
    x: Any = distribute_tensor(torch.ones(2, COLUMNS), mesh, [Replicate()])
    with pytest.raises(TypeError, match="Experts: x is a DTensor"):
        sharded.experts(x, torch.zeros(2, K, dtype=torch.int64), torch.ones(2, K))
    whole = layer()
    fully_shard(whole, mesh=mesh)
    with pytest.raises(TypeError, match="gate_up_proj is a DTensor; shard experts first"):
        fastattn.nn.shard_experts(whole, mesh)
