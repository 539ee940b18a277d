"""Kernels' launchers as registered ops `fastattn::<name>`, for whatever traces.

A plain call of a launcher is the cheapest, but Dynamo cannot trace a kernel launch, FakeTensors
have no memory to launch on, and DTensor needs an op to hang a sharding rule on. Each launcher is
therefore declared by `kernel_op`, and registered when one of those first calls it: registering
takes more than a millisecond, which importing fastattn would spend on each.
"""

import functools
import inspect
import itertools
import threading
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from ...kernels.private import run_while_tracing
from .flops import NAMESPACE, Formula, tell_counters
from .lazy_imports import find
from .sharding import Sharding, check_order, is_distributed, refuse_distributed, tell_dtensor
from .tensor_kinds import are_in_memory, nothing_listens

Result = TypeVar("Result")


@dataclass(frozen=True)
class KernelOp:
    """What `kernel_op` was told of a launcher: its arguments, and the function it decorates."""

    launcher: Callable[..., Any]
    declaration: Callable[..., Any]
    sharding: Sharding | None
    flops: Formula | None


KERNEL_OPS: dict[str, KernelOp] = {}
"""Every declared launcher by its op's name."""


def kernel_op(
    launcher: Callable[..., Any], sharding: Sharding | None = None, flops: Formula | None = None
) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Declare the op of a kernel's launcher: callable from eager code and from whatever traces.

    Decorates a function that has the launcher's parameters, and launches nothing: its body says
    what the outputs look like. It returns empty tensors of their shapes and dtypes, and None for
    absent ones, which is the registered op's fake function. Its annotations are the op's schema,
    and its name, which is usually the launcher's own, the op's.

        if TYPE_CHECKING:
            from ..kernels import dropout as kernels
        else:
            kernels = lazy_module("fastattn.kernels.dropout")

        @kernel_op(kernels.dropout_forward)
        def dropout_forward(x: torch.Tensor, seed: torch.Tensor, p: float) -> torch.Tensor:
            return x.new_empty(x.shape)

    Args:
        launcher: the function in kernels/ that launches, by a `lazy_module`, for importing fastattn
            needs no Triton; or one of ops/ that calls several launchers in a loop, which tracing
            would unroll.
        sharding: DTensor's rule, as `torch.distributed.tensor.experimental.register_sharding`
            takes it: op arguments -> list of (output placements, input placements). The order of
            the arguments then matters, see `check_order`. Without one DTensors are refused.
        flops: the arguments -> how many operations products take, for those that compute any.

    Returns:
        A function with the launcher's arguments, by position, and its results.
    """

    def declare(declaration: Callable[..., Result]) -> Callable[..., Result]:
        name = declaration.__name__
        if sharding is not None:
            check_order(declaration)
            _untold_rules[name] = sharding
        KERNEL_OPS[name] = KernelOp(launcher, declaration, sharding, flops)
        _unregistered.add(name)

        def find_and_launch(*args: Any) -> Any:
            nonlocal direct
            direct = find(launcher)
            return direct(*args)

        def call_registered(*args: Any) -> Any:
            if any(map(is_distributed, args)):
                if sharding is None:
                    refuse_distributed(name, **dict(zip(parameters, args, strict=True)))
                _tell_rules()
            register(name)
            return _restore_absent(_op(name)(*args))

        direct: Callable[..., Any] = find_and_launch
        tensors = _leading_tensors(declaration)
        parameters = tuple(inspect.signature(declaration).parameters)

        @functools.wraps(declaration)
        def launch(*args: Any) -> Any:
            if nothing_listens() and are_in_memory(args[:tensors]):
                return direct(*args)
            return call_registered(*args)

        return launch

    return declare


def _leading_tensors(declaration: Callable) -> int:
    """How many arguments come before the first that can be no tensor."""
    tensors = (torch.Tensor, torch.Tensor | None, list[torch.Tensor])
    parameters = inspect.signature(declaration).parameters.values()
    kinds = (parameter.annotation for parameter in parameters)
    return len(list(itertools.takewhile(tensors.__contains__, kinds)))


# Declared and not yet registered.
_unregistered: set[str] = set()

# Held while registering, so that no thread sees an op half made.
_lock = threading.RLock()


# The first op that is traced may come while Dynamo traces, and the first DTensor below.
@run_while_tracing
def register(name: str) -> None:
    """Define the op `fastattn::<name>`, unless that has been done, and let it be counted."""
    with _lock:
        if name in _unregistered:
            _define(name)
            _unregistered.remove(name)
    flops = KERNEL_OPS[name].flops
    if flops is not None:
        tell_counters(name, flops)


def register_all() -> None:
    """Register every launcher that nothing has needed yet."""
    for name in sorted(_unregistered):
        register(name)


def _define(name: str) -> None:
    """Define `fastattn::<name>` with the schema that the annotations of its declaration give."""
    launcher, declaration = KERNEL_OPS[name].launcher, KERNEL_OPS[name].declaration
    signature = inspect.signature(declaration)
    returns = typing.get_args(signature.return_annotation)
    outputs = tuple(output if output == list[torch.Tensor] else torch.Tensor for output in returns)

    def run(*args: Any) -> Any:
        return _mark_absent(find(launcher)(*args), args)

    def run_fake(*args: Any) -> Any:
        return _mark_absent(declaration(*args), args)

    # An op has no optional outputs: absent ones are marked, see _mark_absent.
    described = signature.replace(
        return_annotation=tuple[outputs] if outputs else torch.Tensor  # type: ignore[valid-type]
    )
    run.__signature__ = described  # type: ignore[attr-defined]
    run.__annotations__ = dict(
        declaration.__annotations__, **{"return": described.return_annotation}
    )
    op = torch.library.custom_op(f"{NAMESPACE}::{name}", run, mutates_args=())
    op.register_fake(run_fake)


def _op(name: str) -> Any:
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def _mark_absent(outputs: Any, args: Sequence[Any]) -> Any:
    """Replace absent outputs by empty uint8 tensors, a dtype that no output of ours has."""
    if not isinstance(outputs, tuple):
        return outputs
    like = next(arg for arg in args if isinstance(arg, torch.Tensor))
    return tuple(
        torch.empty(0, dtype=torch.uint8, device=like.device) if output is None else output
        for output in outputs
    )


def _restore_absent(outputs: Any) -> Any:
    if not isinstance(outputs, tuple):
        return outputs
    return tuple(
        None if isinstance(output, torch.Tensor) and output.dtype is torch.uint8 else output
        for output in outputs
    )


# Sharding rules that DTensor does not know yet: it takes most of a second to import, so they wait
# for the first DTensor.
_untold_rules: dict[str, Sharding] = {}


@run_while_tracing
def _tell_rules() -> None:
    """Let DTensor know of every sharding rule that waits."""
    with _lock:
        for name, sharding in _untold_rules.items():
            register(name)
            tell_dtensor(_op(name), sharding)
        _untold_rules.clear()
