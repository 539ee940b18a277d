"""Outputs and gradients on two ranks against those of one process alone."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode


def incoming(output: torch.Tensor) -> torch.Tensor:
    """A gradient that no symmetry hides."""
    return torch.linspace(-1.0, 2.0, output.numel()).reshape(output.shape)


def close(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    torch.testing.assert_close(
        actual, expected, rtol=1e-5, atol=1e-5, msg=lambda difference: f"{what}: {difference}"
    )


def compare_with_one_process(
    mesh: DeviceMesh,
    name: str,
    call: Callable[..., Any],
    tensors: Sequence[torch.Tensor],
    placements: Sequence[Placement],
    result: Placement | None,
) -> None:
    """A call on DTensors: outputs and gradients are right, and nothing is gathered.

    Args:
        mesh: the ranks.
        name: what is compared, for messages.
        call: a function of the tensors.
        tensors: its arguments, with the same numbers on every rank.
        placements: how each of them is spread. Its gradient has to come out spread the same, or,
            of a tensor that is whole beside sharded ones, as a partial sum.
        result: how the outputs have to come out, their gradients being given so; None where they
            are sums over ranks, which communicate.
    """
    what = f"{name}, {', '.join(map(str, placements))}"
    expected = listed(call(*tensors))
    torch.autograd.backward(expected, [incoming(output) for output in expected])

    distributed = [
        distribute_tensor(tensor.detach(), mesh, [placement]).requires_grad_(tensor.requires_grad)
        for tensor, placement in zip(tensors, placements, strict=True)
    ]
    arriving = [result or Replicate()]
    gradients = [distribute_tensor(incoming(output), mesh, arriving) for output in expected]
    with CommDebugMode() as communication:
        outputs = listed(call(*distributed))
        torch.autograd.backward(outputs, gradients)
    if result is not None:
        assert communication.get_total_counts() == 0, (what, communication.get_comm_counts())

    for output, one in zip(outputs, expected, strict=True):
        assert result is None or output.placements == (result,), (what, output.placements)
        close(output.full_tensor(), one, what)
    sharded = any(isinstance(placement, Shard) for placement in placements)
    for place, (tensor, one) in enumerate(zip(distributed, tensors, strict=True)):
        if not tensor.requires_grad:
            continue
        gradient, right = tensor.grad, one.grad
        assert isinstance(gradient, DTensor), what
        assert right is not None, what
        if sharded and placements[place] == Replicate():
            assert gradient.placements[0].is_partial(), what
        else:
            assert gradient.placements == (placements[place],), what
        close(gradient.full_tensor(), right, f"{what}, gradient {place}")


def listed(outputs: Any) -> list[Any]:
    return list(outputs) if isinstance(outputs, tuple) else [outputs]
