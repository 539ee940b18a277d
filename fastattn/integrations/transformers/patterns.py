"""What a mask function of transformers says, found without calling it on all indices."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function
from transformers.utils.import_utils import is_tracing


@dataclass(frozen=True)
class Pattern:
    """What a mask function says of indices, padding aside.

    Attributes:
        causal: see `CompactMask`.
        window: see `CompactMask`.
        chunk: how many tokens, counted from the first that is no padding, see one another alone.
        documents: (B, S), for as many queries as keys.
    """

    causal: bool
    window: tuple[int, int] | None = None
    chunk: int | None = None
    documents: torch.Tensor | None = None


def find_pattern(
    mask_function: Callable,
    local_size: int | None,
    use_vmap: bool,
    allow_is_causal_skip: bool,
    allow_is_bidirectional_skip: bool,
    config: Any,
) -> Pattern | None:
    """What a mask function says, or None where only calling it tells.

    Eagerly the function is read; what traces it cannot be read then, and the arguments that
    transformers makes with it tell instead.
    """
    if mask_function is causal_mask_function:
        return Pattern(causal=True)
    if mask_function is bidirectional_mask_function:
        return Pattern(causal=False)
    if use_vmap:
        return None
    if not is_tracing():
        return _read(mask_function)
    if local_size is None:
        return None
    if allow_is_causal_skip:
        sizes = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
        if sizes[0] == sizes[1]:
            return None
        if local_size == sizes[0]:
            return Pattern(causal=True, window=(local_size - 1, 0))
        return Pattern(causal=True, chunk=local_size) if local_size == sizes[1] else None
    if allow_is_bidirectional_skip:
        return Pattern(causal=False, window=(local_size, local_size))
    return None


def _read(mask_function: Callable) -> Pattern | None:
    """What a function made by transformers.masking_utils says, or None of another."""
    pattern = Pattern(causal=False)
    for part in _parts(mask_function):
        if part is None:
            return None
        pattern = replace(pattern, **part)
    # Packed documents have chunks of their own.
    return None if pattern.chunk and pattern.documents is not None else pattern


def _parts(function: Callable) -> Iterator[dict[str, Any] | None]:
    """What each part of a conjunction says as fields of a `Pattern`; None for one unknown."""
    if function is causal_mask_function:
        yield {"causal": True}
        return
    if function is bidirectional_mask_function:
        yield {}
        return
    maker, _, _ = getattr(function, "__qualname__", "").partition(".<locals>.")
    if getattr(function, "__module__", None) != "transformers.masking_utils":
        maker = ""
    if maker == "and_masks":
        for part in _enclosed(function, "mask_functions"):
            yield from _parts(part)
    elif maker == "remap_positions_for_packed_sequence":
        # Within a document positions rise by one, as indices do.
        yield from _parts(_enclosed(function, "mask_function"))
    elif maker == "packed_sequence_mask_function":
        yield {"documents": _enclosed(function, "packed_sequence_mask")}
    elif maker == "sliding_window_overlay":
        yield {"window": (_enclosed(function, "sliding_window") - 1, 0)}
    elif maker == "sliding_window_bidirectional_overlay":
        yield {"window": (_enclosed(function, "sliding_window"),) * 2}
    elif maker == "chunked_overlay":
        yield {"chunk": _enclosed(function, "chunk_size")}
    else:
        yield None


def _enclosed(function: Any, name: str) -> Any:
    """The variable of a function's closure."""
    return function.__closure__[function.__code__.co_freevars.index(name)].cell_contents
