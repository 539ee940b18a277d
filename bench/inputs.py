"""Random inputs of an op at real sizes, and what a call makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastattn.ops.core.catalog import Normal

from .op import BOTH, FORWARD, Op, Shape

Arguments = dict[str, Any]


def random_arguments(op: Op, shape: Shape, dtype: torch.dtype, device: torch.device) -> Arguments:
    """The arguments of a sample, drawn on the device: drawing on the host would take minutes."""
    made: Arguments = {}
    for name, value in op.sample(shape).arguments.items():
        if isinstance(value, Normal):
            numbers = torch.randn(value.shape, dtype=value.dtype or dtype, device=device)
            made[name] = numbers.mul_(value.scale).add_(value.mean).requires_grad_()
        else:
            made[name] = value(device) if callable(value) else value
    return made


def seeded(op: Op, arguments: Arguments) -> Arguments:
    """The arguments with a seed, if the op draws random numbers."""
    if op.benchmark is None or not op.benchmark.random:
        return arguments
    device = tensors_of(arguments)[0].device
    return arguments | {"seed": torch.tensor([2**40 + 3], device=device)}


def tensors_of(arguments: Arguments) -> list[torch.Tensor]:
    """The arguments that gradients go to."""
    return [value for value in arguments.values() if has_gradient(value)]


def has_gradient(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def outputs_of(call: Callable[..., Any], arguments: Arguments) -> list[torch.Tensor]:
    """The outputs of a call as a list."""
    outputs = call(**arguments)
    return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)


def incoming_like(outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Random gradients for the outputs."""
    return [torch.randn_like(output) for output in outputs]


def results_of(
    call: Callable[..., Any], arguments: Arguments, incoming: Sequence[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Outputs ("output 0", ...) of a call, and with incoming gradients those of it ("dx", ...)."""
    outputs = outputs_of(call, arguments)
    results = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    if not incoming:
        return results
    names = [name for name, value in arguments.items() if has_gradient(value)]
    gradients = torch.autograd.grad(outputs, tensors_of(arguments), incoming)
    return results | {f"d{name}": g for name, g in zip(names, gradients, strict=True)}


def count_saved(call: Callable[..., Any], arguments: Arguments) -> int:
    """Bytes that a call keeps for its backward, its arguments not among them."""
    given = [value for value in arguments.values() if isinstance(value, torch.Tensor)]
    known = {tensor.untyped_storage().data_ptr() for tensor in given}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs_of(call, arguments)
    return sum(saved.values())


class InputSets:
    """Several sets of inputs and incoming gradients, together far larger than the L2 cache."""

    def __init__(self, op: Op, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        self.device = device
        first = random_arguments(op, shape, dtype, device)
        self.arguments = [first]
        for _ in range(1, _sets(tensors_of(first), device)):
            self.arguments.append(random_arguments(op, shape, dtype, device))
        with torch.no_grad():
            # Where the reference has no room, ours says what outputs there are.
            call = op.reference if op.timing.in_float64(shape) else op.call
            outputs = outputs_of(call, first)
        self.incoming = [incoming_like(outputs) for _ in self.arguments]

    def calls(self, call: Callable[..., Any], direction: str) -> list[Callable[[], Any]]:
        """A call for each set; what a backward needs of its forward is done here."""
        return [
            _call(call, arguments, incoming, direction)
            for arguments, incoming in zip(self.arguments, self.incoming, strict=True)
        ]


def _sets(tensors: Sequence[torch.Tensor], device: torch.device) -> int:
    cache = 0
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
    size = sum(tensor.nbytes for tensor in tensors)
    return min(8, max(2, -(-4 * cache // size)))


def _call(
    call: Callable[..., Any],
    arguments: Arguments,
    incoming: Sequence[torch.Tensor],
    direction: str,
) -> Callable[[], Any]:
    if direction == FORWARD:
        return lambda: call(**arguments)
    tensors = tensors_of(arguments)
    if direction == BOTH:
        return lambda: torch.autograd.grad(outputs_of(call, arguments), tensors, incoming)
    outputs = outputs_of(call, arguments)
    return lambda: torch.autograd.grad(outputs, tensors, incoming)
