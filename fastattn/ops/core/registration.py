"""Calling launchers and Functions: directly when eager, as registered ops when something traces.

A plain call of a launcher is the cheapest, but Dynamo cannot trace a kernel launch, FakeTensors
have no memory to launch on, and DTensor needs an op to hang a sharding rule on. Each launcher is
therefore also registered as `fastattn::<name>`, when one of those first calls it: registering takes
more than a millisecond, which importing fastattn would spend on each. All about the choice lives in
this file.
"""

import importlib
import inspect
import itertools
import threading
import typing
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._C import (
    _are_functorch_transforms_active,
    _is_tracing,
    _len_torch_dispatch_stack,
)
from torch.autograd import forward_ad
from torch.compiler import is_compiling, is_dynamo_compiling
from torch.nn.parameter import Buffer, Parameter

from .flops import Formula, tell_counters
from .sharding import is_distributed

Sharding = Callable[..., list[tuple[list[Any], list[Any]]]]

# Tensors of these very types need no op: not of subclasses, which may be DTensors or fake.
_PLAIN_TYPES = frozenset({torch.Tensor, Parameter, Buffer})

# Subclasses of PyTorch's own that take our registered ops as they take any other. Asked by name,
# for importing DTensor takes long.
_TAKE_ANY_OP = ("AsyncCollectiveTensor", "DTensor", "FakeTensor", "FunctionalTensor")


def launcher(
    module: str | Callable, sharding: Sharding | None = None, flops: Formula | None = None
) -> Callable[[Callable], Callable]:
    """The launcher of this name in `fastattn.kernels.<module>`, callable from whatever traces too.

    Decorates a function with the launcher's name and signature whose body says what the outputs
    look like: it returns empty tensors of their shapes and dtypes, and None for absent ones. That
    body is the registered op's fake function; the launcher itself is imported when first called,
    so that importing fastattn needs no Triton.

    Args:
        module: the file in kernels/; or the function itself, for one of ops/ that calls several
            launchers in a loop, which tracing would unroll.
        sharding: DTensor's rule, as `torch.distributed.tensor.experimental.register_sharding`
            takes it: op arguments -> list of (output placements, input placements). The order of
            the arguments then matters, see `_check_order`.
        flops: the arguments -> how many operations products take, for those that compute any.

    Returns:
        A function with the launcher's arguments and results.
    """

    def decorate(fake: Callable) -> Callable:
        name = fake.__name__
        if sharding is not None:
            _check_order(fake)
            _rules[name] = sharding
        _waiting[name] = module, fake
        if flops is not None:
            _formulas[name] = flops

        def first(*args: Any) -> Any:
            scope["direct"] = _launcher(module, name)
            return scope["direct"](*args)

        def registered(*args: Any) -> Any:
            if any(map(is_distributed, args)):
                _register_rules()
            register(name)
            return _restore_absent(_op(name)(*args))

        parameters = inspect.getfullargspec(fake).args
        source = LAUNCH.format(
            parameters=", ".join(parameters),
            are_plain=" and ".join(
                f"(not {name} or is_plain({name}))"
                if fake.__annotations__[name] == list[torch.Tensor]
                else f"({name} is None or type({name}) in plain_types and not {name}.is_neg())"
                for name in parameters[: _leading_tensors(fake)]
            ),
        )
        scope = {
            "plain_types": _PLAIN_TYPES,
            "direct": first,
            "is_plain": is_plain,
            "nothing_listens": nothing_listens,
            "registered": registered,
        }
        exec(compile(source, f"<launch of {name}>", "exec"), scope)
        launch: Any = scope["launch"]
        launch.__name__ = name
        launch.__doc__ = fake.__doc__
        return launch

    return decorate


# With the launcher's own parameters written out a call packs and unpacks none, and asks of tensors
# alone what they are, in half the time. Kernels read memory as it is, where a lazily negated view
# has the numbers before their sign changes; PyTorch writes them out for every registered op.
LAUNCH = """
def launch({parameters}):
    if nothing_listens() and {are_plain}:
        return direct({parameters})
    return registered({parameters})
"""


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
    if _are_functorch_transforms_active():
        return function.apply(*args)
    if not recorded and forward_ad._current_level < 0:
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
    eager._backward_cls.apply = function.backward
    _eager_applies[function] = super(torch.autograd.Function, eager).apply  # type: ignore[misc]
    return _eager_applies[function]


def is_plain(tensors: Sequence[Any]) -> bool:
    """Whether a direct call serves: eager, no mode listening, no subclass, none negated lazily."""
    if not nothing_listens():
        return False
    for tensor in tensors:
        if tensor is not None and (type(tensor) not in _PLAIN_TYPES or tensor.is_neg()):
            return False
    return True


def is_foreign(tensor: Any) -> bool:
    """Whether PyTorch's own functions must be called on a tensor, for kernels cannot read it.

    So are nested tensors, and those of a subclass with a behaviour of its own, as quantizers make
    them: it knows PyTorch's functions, and not our ops. What has no such function, as ours of two
    products, is refused by name: see `check_float_tensor`. What is no tensor, as None or what
    torch.fx traces with, is not foreign.
    """
    kind = type(tensor)
    if kind in _PLAIN_TYPES:
        return tensor.is_nested
    return issubclass(kind, torch.Tensor) and (_behaves(kind) or tensor.is_nested)


def _behaves(kind: type) -> bool:
    """Whether a subclass says itself what happens to it."""
    if kind.__name__ in _TAKE_ANY_OP and kind.__module__.startswith("torch."):
        return False
    usual = getattr(torch.Tensor.__torch_function__, "__func__", None)
    function = getattr(kind.__torch_function__, "__func__", kind.__torch_function__)
    own_function = function not in (usual, Parameter.__torch_function__)
    own_dispatch: Any = kind.__torch_dispatch__  # type: ignore[attr-defined]
    return own_function or own_dispatch is not torch._C._disabled_torch_dispatch_impl


def nothing_listens() -> bool:
    """Whether this is eager, and no mode and no torch.jit.trace watches what is called."""
    # In this order: Dynamo knows the first question, and asked the second it would give up.
    return not (is_dynamo_compiling() or _len_torch_dispatch_stack() or _is_tracing())


def _leading_tensors(fake: Callable) -> int:
    """How many arguments come before the first that can be no tensor."""
    tensors = (torch.Tensor, torch.Tensor | None, list[torch.Tensor])
    kinds = (fake.__annotations__[name] for name in inspect.getfullargspec(fake).args)
    return len(list(itertools.takewhile(tensors.__contains__, kinds)))


def _launcher(module: str | Callable, name: str) -> Callable:
    if callable(module):
        return module
    return getattr(importlib.import_module(f"fastattn.kernels.{module}"), name)


# Launchers that are not registered yet, by name: where they are, and their fake functions.
_waiting: dict[str, tuple[str | Callable, Callable]] = {}

# What launchers compute, by name.
_formulas: dict[str, Formula] = {}

# Held while registering, so that no thread sees an op half made.
_lock = threading.RLock()


def register(name: str) -> None:
    """Define the op `fastattn::<name>`, unless that has been done, and let it be counted."""
    with _lock:
        if name in _waiting:
            _define(name, *_waiting[name])
            del _waiting[name]
    if name in _formulas:
        tell_counters(name, _formulas[name])


def register_all() -> None:
    """Register every launcher that nothing has needed yet."""
    for name in list(_waiting):
        register(name)


def _define(name: str, module: str | Callable, fake: Callable) -> None:
    """Define `fastattn::<name>` with the schema that the annotations of `fake` give."""
    signature = inspect.signature(fake)
    returns = typing.get_args(signature.return_annotation)
    outputs = tuple(output if output == list[torch.Tensor] else torch.Tensor for output in returns)

    def run(*args: Any) -> Any:
        return _mark_absent(_launcher(module, name)(*args), args)

    def run_fake(*args: Any) -> Any:
        return _mark_absent(fake(*args), args)

    # An op has no optional outputs: absent ones are marked, see _mark_absent.
    described = signature.replace(
        return_annotation=tuple[outputs] if outputs else torch.Tensor  # type: ignore[valid-type]
    )
    run.__signature__ = described  # type: ignore[attr-defined]
    run.__annotations__ = dict(fake.__annotations__, **{"return": described.return_annotation})
    op = torch.library.custom_op(f"fastattn::{name}", run, mutates_args=())
    op.register_fake(run_fake)


def _op(name: str) -> Any:
    return getattr(torch.ops.fastattn, name).default


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
_rules: dict[str, Sharding] = {}


def _check_order(fake: Callable) -> None:
    """Dtypes and integers come before bools, strings and lists.

    DTensor remembers what an op's outputs look like by its tensors and, of the other arguments, by
    those from the first dtype or integer on. An earlier one would have no say in it.
    """
    kinds = [parameter.annotation for parameter in inspect.signature(fake).parameters.values()]
    heard = False
    for kind in kinds:
        heard = heard or kind in (int, torch.dtype, int | None, torch.dtype | None)
        if not heard and kind in (bool, str, list[int]):
            raise TypeError(f"{fake.__name__}: dtypes and integers must come before {kind}")


def _register_rules() -> None:
    with _lock:
        if _rules:
            from torch.distributed.tensor.experimental import register_sharding

            for name, sharding in _rules.items():
                register(name)
                register_sharding(_op(name))(sharding)
            _rules.clear()


# The first op that is traced, or the first DTensor, may come while Dynamo traces, which then runs
# these instead of tracing them. The mark is all that torch.compiler.assume_constant_result sets,
# but that imports Dynamo.
register._dynamo_marked_constant = True  # type: ignore[attr-defined]
_register_rules._dynamo_marked_constant = True  # type: ignore[attr-defined]
