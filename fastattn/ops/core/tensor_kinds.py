"""What kind of tensor an argument is: whether kernels can read it, and whether anybody listens.

Kernels read a tensor's memory, which serves where its class is PyTorch's own, eager, and nothing
watches what is called on it. `is_plain` asks that. What `is_foreign` names no kernel and no
registered op of ours can take: PyTorch's own functions must be called on it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.compiler import is_dynamo_compiling
from torch.jit import is_tracing  # type: ignore[attr-defined]
from torch.nn.parameter import Buffer, Parameter

from ...kernels.private import count_dispatch_modes

# Tensors of these very types need no op: not of subclasses, which may be DTensors or fake.
_PLAIN_TYPES = frozenset({torch.Tensor, Parameter, Buffer})

# Subclasses of PyTorch's own that take our registered ops as they take any other. Asked by name,
# for importing DTensor takes long.
_TAKE_ANY_OP = ("AsyncCollectiveTensor", "DTensor", "FakeTensor", "FunctionalTensor")


def is_plain(tensors: Sequence[Any]) -> bool:
    """Whether a direct call serves: eager, no mode listening, no subclass, none negated lazily."""
    return nothing_listens() and are_in_memory(tensors)


def are_in_memory(tensors: Sequence[Any]) -> bool:
    """Whether the numbers of all tensors, in lists too, lie in memory as they are.

    Those of a subclass may not, nor those of a lazily negated view, whose memory has the numbers
    before their sign changes; PyTorch writes them out for every registered op.
    """
    for tensor in tensors:
        if type(tensor) in _PLAIN_TYPES:
            if tensor.is_neg():
                return False
        elif tensor is not None and not (type(tensor) is list and are_in_memory(tensor)):
            return False
    return True


def nothing_listens() -> bool:
    """Whether this is eager, and no mode and no torch.jit.trace watches what is called."""
    # In this order: Dynamo knows the first question, and asked the second it would give up.
    return not (is_dynamo_compiling() or count_dispatch_modes() or is_tracing())


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
    usual_dispatch, dispatch = (k.__torch_dispatch__ for k in (torch.Tensor, kind))  # type: ignore
    return own_function or dispatch is not usual_dispatch
