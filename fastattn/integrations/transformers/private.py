"""What is private in transformers, as kernels/private.py has what is in torch.

One function is replaced. For a name with "flash" in it transformers wants flash-attn's functions,
which it looks for on the Hub. Without what is done here such a name could not be used, and vision
towers would call attention once for each image.
"""

import functools
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import transformers.modeling_flash_attention_utils as theirs

MOE = "transformers.integrations.moe"
"""Where versions from 5.0 on have the functions of experts."""

moe: Any = import_module(MOE) if find_spec(MOE) else None


def offer_functions(name: str, functions: tuple[Callable, Callable, Callable]) -> bool:
    """Have transformers find functions of flash-attn's by a name; any number of times.

    Args:
        name: with "flash" in it.
        functions: for `flash_attn_func`, `flash_attn_varlen_func` and `flash_attn_with_kvcache`.

    Returns:
        Whether this version of transformers looks for them in the way that is known here.
    """
    load = getattr(theirs, "_lazy_imports", None)
    if load is None:
        return False
    known: dict[str, tuple] = getattr(load, "offered", {})
    if not known:
        theirs._lazy_imports = _with_offers(load, known)
    known[name] = (*functions, theirs._pad_input, theirs._unpad_input)
    return True


def _with_offers(load: Callable[..., tuple], offered: dict[str, tuple]) -> Callable[..., tuple]:
    """The same function, but for the names that are offered."""

    @functools.wraps(load)
    def find(implementation: str | None, *args: Any, **kwargs: Any) -> tuple:
        if implementation in offered:
            return offered[implementation]
        return load(implementation, *args, **kwargs)

    find.offered = offered  # type: ignore[attr-defined]
    return find


LOSS_ATTRIBUTE = "_loss_function"
"""Where a model's own loss function is, once `model.loss_function = f` has been said. To have none
again there is no other way than to take the attribute away."""


def implementation_of(config: Any) -> str | None:
    """The name of attention that a configuration has."""
    return config._attn_implementation


def is_replica(module: Any) -> bool:
    """Whether torch.nn.DataParallel has made a module for one of its devices."""
    return getattr(module, "_is_replica", False)


def gate_of_experts(experts: Any, h: torch.Tensor) -> torch.Tensor:
    """What experts make of the product with gates and ups, by the model's own formula."""
    return experts._apply_gate(h)


def has_gate_of(experts: Any, name: str | None) -> bool:
    """Whether the gate of experts is that of a class, or with None the one that most have."""
    own = type(experts)._apply_gate
    if name is None:
        return own is getattr(moe, "_default_apply_gate", None)
    return own.__qualname__ == f"{name}._apply_gate"


def register_experts(name: str, function: Callable) -> None:
    """Have transformers find experts by a name; any number of times, and not in older versions."""
    functions = getattr(moe, "ALL_EXPERTS_FUNCTIONS", None)
    if functions is not None:
        functions.register(name, function)
