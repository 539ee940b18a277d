"""Checks of what a user passes: each error names the argument, what it got and what it wants.

How a tensor lies in memory is nobody's error, but for one kind. For every tensor of every op, also
those that get no gradient, and incoming gradients:

    strides, offsets, overlaps   read by strides, or copied once where kernels could not
    negated lazily               written out before a launch, see `tensor_kinds.are_in_memory`
    a subclass                   as a tensor; or, if it says itself what happens to it, our
                                 registered ops are handed to it like any others
    on meta, fake                shapes and dtypes, forward and backward
    made in inference mode       as in PyTorch, which saves none for a backward
    nested, of either layout     refused by name

Of nested tensors and of subclasses with a behaviour of their own, such as quantized weights, the
functions of `fastattn.functional` and modules with a counterpart in torch call that one instead,
see `tensor_kinds.is_foreign`; modules that read a layer's parameters call the layer.
"""

import operator
from typing import Any, NoReturn

import torch

from ...reference.softcap import caps

FLOAT_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


def check_float_tensor(
    op: str, name: str, tensor: object, like: torch.Tensor | None = None
) -> None:
    """A floating-point tensor of a supported dtype, on the device of `like` if that is given.

    float64 does not mix with other dtypes: compiled kernels have none to accumulate it in.
    """
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"{op}: {name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}"
        )
    if tensor.is_nested:
        refuse_nested(op, name)
    if like is None or like is tensor:
        return
    if tensor.device != like.device:
        raise ValueError(f"{op}: {name} must be on {like.device}, got {tensor.device}")
    if tensor.dtype is not like.dtype and torch.float64 in (tensor.dtype, like.dtype):
        raise TypeError(
            f"{op}: {name} is {tensor.dtype} beside {like.dtype}; float64 mixes with no other dtype"
        )


def check_device(op: str, name: str, tensor: object, like: torch.Tensor) -> None:
    """A tensor on the device of `like`."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    if tensor.device != like.device:
        raise ValueError(f"{op}: {name} must be on {like.device}, got {tensor.device}")
    if tensor.is_nested:
        refuse_nested(op, name)


def check_constant(op: str, name: str, tensor: object, like: torch.Tensor) -> None:
    """A tensor on the device of `like` that asks for no gradient."""
    check_device(op, name, tensor, like)
    assert isinstance(tensor, torch.Tensor)
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op}: {name} must not require a gradient, for it would get none")


def check_integers(op: str, name: str, tensor: torch.Tensor) -> None:
    """A tensor of int32 or int64."""
    if tensor.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: {name} must be int32 or int64, got {tensor.dtype}")


def check_length(op: str, name: str, length: object) -> None:
    """A number of queries or keys; while compiling it may be a symbol."""
    if isinstance(length, bool) or not isinstance(length, int | torch.SymInt):
        raise TypeError(f"{op}: {name} must be an integer, got {length!r}")
    if length < 0:
        raise ValueError(f"{op}: {name} must not be negative, got {length}")


def refuse_nested(op: str, name: str) -> NoReturn:
    """The error for a nested tensor, of either layout, in the place of an ordinary one."""
    raise TypeError(
        f"{op}: {name} is a nested tensor, which is not supported here: for packed sequences there "
        "is attention_varlen, ops of single rows take its values(), and the functions of "
        "fastattn.functional take nested tensors where torch's do"
    )


def check_shape(op: str, name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Exactly this shape; ops that broadcast say so themselves."""
    if tensor.is_nested:
        refuse_nested(op, name)
    if tensor.shape != shape:
        raise ValueError(f"{op}: {name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")


def check_probability(op: str, name: str, p: float) -> None:
    """A dropout probability: in [0, 1)."""
    if not 0.0 <= p < 1.0:
        raise ValueError(f"{op}: {name} must be in [0, 1), got {p}")


def read_softcap(op: str, softcap: float | None, dtype: torch.dtype) -> float | None:
    """A softcap, which must be positive, or None where it is so large that it caps nothing."""
    if softcap is None:
        return None
    if not softcap > 0.0:
        raise ValueError(f"{op}: softcap must be positive, got {softcap}")
    # All is computed in float32, in float64 for float64.
    return float(softcap) if caps(softcap, torch.promote_types(dtype, torch.float32)) else None


def check_choice(op: str, name: str, value: object, choices: tuple[str, ...]) -> None:
    """One of a few words."""
    if value not in choices:
        raise ValueError(f"{op}: {name} must be one of {', '.join(choices)}, got {value!r}")


def whole_number(op: str, name: str, value: Any) -> Any:
    """A number of any type that counts, as NumPy's, as an int; tensors and None as they are."""
    if value is None or isinstance(value, torch.Tensor | torch.SymInt):
        return value
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(
            f"{op}: {name} must be a tensor or an int, got {type(value).__name__}"
        ) from None


def check_seed(op: str, seed: torch.Tensor, like: torch.Tensor) -> None:
    """A dropout seed: int64, one element, on the device of `like`."""
    if not isinstance(seed, torch.Tensor) or seed.dtype is not torch.int64 or seed.numel() != 1:
        raise TypeError(f"{op}: seed must be an int64 tensor of one element, got {seed!r}")
    if seed.device != like.device:
        raise ValueError(f"{op}: seed must be on {like.device}, got {seed.device}")
