"""What is private in transformers, as kernels/private.py has what is in torch.

One function is replaced. For a name with "flash" in it transformers wants flash-attn's functions,
which it looks for on the Hub. Without what is done here such a name could not be used, and vision
towers would call attention once for each image.
"""

import functools
from collections.abc import Callable
from typing import Any

import transformers.modeling_flash_attention_utils as theirs


def offer_functions(name: str, functions: tuple[Callable, Callable]) -> bool:
    """Have transformers find functions of flash-attn's by a name; any number of times.

    Args:
        name: with "flash" in it.
        functions: for `flash_attn_func` and `flash_attn_varlen_func`.

    Returns:
        Whether this version of transformers looks for them in the way that is known here.
    """
    load = getattr(theirs, "_lazy_imports", None)
    if load is None:
        return False
    known: dict[str, tuple] = getattr(load, "offered", {})
    if not known:
        theirs._lazy_imports = _with_offers(load, known)
    known[name] = (*functions, None, theirs._pad_input, theirs._unpad_input)
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
