"""Calling autograd Functions at less cost than PyTorch's own `apply`, and where Dynamo traces.

`call(SomeFunction, ...)` is `SomeFunction.apply(...)`. PyTorch's costs more than most kernels here
take, and cannot be traced with one tensor in two places.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.compiler import is_compiling

from ...kernels.private import are_transforms_active, fix_backward, is_in_forward_mode


def call(function: type[torch.autograd.Function], *args: Any) -> Any:
    """`function.apply(*args)`, at less cost where nothing but autograd listens.

    Nothing is recorded where no gradient is wanted. Of a function with an attribute `returned` the
    caller takes so many outputs, the first ones: the others, if they are there, are what its
    backward needs and nobody else.
    """
    recorded = torch.is_grad_enabled() and _wants_gradient(args)
    if is_compiling():
        # Where nothing is recorded Dynamo itself calls `forward`, but one that takes any number of
        # arguments would get a context as the first of them.
        return function.apply(*_distinct(args)) if recorded else function.forward(*args)
    if are_transforms_active():
        return function.apply(*args)
    if not recorded and not is_in_forward_mode():
        return function.forward(*args)
    return (_eager_applies.get(function) or _eager_apply(function))(*args)


def _distinct(args: Sequence[Any]) -> list[Any]:
    """The arguments with a view in place of every tensor that was there before.

    Dynamo traces no Function that gets one tensor twice, and before it refused, one of the two
    gradients was lost. A view has a gradient of its own, which autograd adds to the first one's.
    """
    found: list[Any] = []
    for arg in args:
        repeated = isinstance(arg, torch.Tensor) and any(arg is other for other in found)
        found.append(arg.view_as(arg) if repeated else arg)
    return found


def _wants_gradient(args: Sequence[Any]) -> bool:
    # A loop takes half the time of any().
    for arg in args:
        if arg is not None and isinstance(arg, torch.Tensor) and arg.requires_grad:
            return True
    return False


_eager_applies: dict[type[torch.autograd.Function], Callable] = {}


def _eager_apply(function: type[torch.autograd.Function]) -> Callable:
    """The `apply` of a Function that does the same as `function` and that functorch cannot use.

    Its forward takes the context, so that PyTorch calls into Python once and keeps no history of
    outputs that nobody takes. PyTorch's own `apply`s are left out: the forward's spends 15
    microseconds on binding the arguments, the backward's 2 on finding `backward`.
    """
    returned = getattr(function, "returned", None)

    def forward(ctx: Any, *args: Any) -> Any:
        output = function.forward(*args)
        function.setup_context(ctx, args, output)
        return output[:returned] if returned else output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(function.backward)}
    eager: Any = type(function.__name__, (torch.autograd.Function,), methods)
    fix_backward(eager, function.backward)
    _eager_applies[function] = super(torch.autograd.Function, eager).apply  # type: ignore[misc]
    return _eager_applies[function]
