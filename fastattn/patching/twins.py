"""Classes that compute as ours do and are, to whoever asks, those that they were made of.

Hugging Face's libraries know modules by the names of their classes: `save_pretrained` writes one,
FSDP wraps layers by it, PEFT and quantizers look for it. A twin derives from a class of theirs and
has its name, qualified name and module; what it computes stands in a body, a class of ours. Neither
the class nor the module that defines it is touched.
"""

import copyreg
import inspect
import types
from typing import Any

import torch.nn as nn


class TwinType(type):
    """The class of twins, by which they are told from others, and pickled."""

    theirs: type[nn.Module]
    body: type[nn.Module]


_twins: dict[tuple[type, type], TwinType] = {}


def make_twin(theirs: type[nn.Module], body: type[nn.Module]) -> type[nn.Module]:
    """The class that is `theirs` to everybody and computes by the methods of `body`.

    There is one for each pair. In a method of `body`, `super()` is `theirs`. Where a body has no
    forward of its own but a static method `rewrite`, forward is what that makes of `theirs`.

    Raises:
        TypeError: `theirs` has a metaclass of its own.
        ValueError: by `rewrite`, which can make nothing of its forward.
    """
    if (theirs, body) not in _twins:
        if type(theirs) is not type:
            raise TypeError(f"make_twin: {theirs.__name__} has a metaclass of its own")
        rewrite = getattr(body, "rewrite", None)
        copied: Any = _copy(body.forward) if rewrite is None else rewrite(theirs)
        # Trainer reads the names of a model's arguments.
        copied.__signature__ = inspect.signature(theirs.forward)
        copied.__doc__ = theirs.forward.__doc__
        members: dict[str, Any] = {
            "forward": copied,
            "theirs": theirs,
            "body": body,
            "__doc__": theirs.__doc__,
            "__module__": theirs.__module__,
            "__qualname__": theirs.__qualname__,
        }
        _twins[theirs, body] = TwinType(theirs.__name__, (body, theirs), members)
    return _twins[theirs, body]  # type: ignore[return-value]  # a metaclass is no type to pyright


def _copy(forward: Any) -> Any:
    return types.FunctionType(
        forward.__code__, forward.__globals__, forward.__name__, None, forward.__closure__
    )


def describe_class(kind: type) -> str:
    """The dotted name of a class, and of a twin that of what computes in it."""
    kind = kind.body if isinstance(kind, TwinType) else kind
    return f"{kind.__module__}.{kind.__qualname__}"


def _reduce(twin: TwinType) -> tuple[Any, ...]:
    return make_twin, (twin.theirs, twin.body)


# By its name pickle would find the class that a twin was made of.
copyreg.pickle(TwinType, _reduce)  # type: ignore[arg-type]
