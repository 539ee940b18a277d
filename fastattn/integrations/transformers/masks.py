"""Masks of Hugging Face's models in linear memory.

transformers makes the mask of a forward pass once for each kind of layer: it calls the registered
mask function with a mask as a Python function of indices, and hands what that returns to every
attention. Ours returns a `CompactMask`, a tensor that knows what it follows from, wherever that is
known: causal, a window, chunks, packed documents, padding. Everything else becomes a boolean tensor
(B, 1, M, N), as for PyTorch's own attention.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
)
from transformers.utils.import_utils import is_tracing

Ids = tuple[torch.Tensor, torch.Tensor]
"""The documents of queries (B or 1, M) and of keys (B or 1, N)."""

NO_DOCUMENT = -(2**31)
"""The id of keys that are padding, which no query has."""

# What is asked of a mask without its numbers.
ABOUT_SHAPE = {
    torch.Tensor.device.__get__,  # type: ignore[attr-defined]
    torch.Tensor.dtype.__get__,  # type: ignore[attr-defined]
    torch.Tensor.is_leaf.__get__,  # type: ignore[attr-defined]
    torch.Tensor.layout.__get__,  # type: ignore[attr-defined]
    torch.Tensor.ndim.__get__,  # type: ignore[attr-defined]
    torch.Tensor.requires_grad.__get__,  # type: ignore[attr-defined]
    torch.Tensor.shape.__get__,  # type: ignore[attr-defined]
    torch.Tensor.dim,
    torch.Tensor.is_contiguous,
    torch.Tensor.size,
    torch.Tensor.storage_offset,
    torch.Tensor.stride,
}


class CompactMask(torch.Tensor):
    """A boolean mask (B, 1, M, N), True where a query sees a key, that holds no such tensor.

    Attention takes it apart. For everything else that reads its numbers it is the dense tensor,
    made then; a copy on another device and a detached one stay compact. Made by `compact_mask`.

    Attributes:
        causal: whether a query sees no key after its own place.
        window: how many keys before and after its own place a query sees; None for all.
        document_ids: a query sees the keys of its own document alone; None where all are of one.
        seen: the last query stands at key `seen` - 1, and no later key is seen.
    """

    causal: bool
    window: tuple[int, int] | None
    document_ids: Ids | None
    seen: int

    def dense(self) -> torch.Tensor:
        """The tensor that this stands for."""
        batch, _, queries, keys = self.shape
        n = torch.arange(keys, device=self.device)
        place = torch.arange(queries, device=self.device)[:, None] + self.seen - queries
        keep = (n < self.seen).expand(queries, keys)
        if self.causal:
            keep = keep & (n <= place)
        if self.window is not None:
            keep = keep & (n >= place - self.window[0]) & (n <= place + self.window[1])
        keep = keep[None, None]
        if self.document_ids is not None:
            of_queries, of_keys = self.document_ids
            keep = keep & (of_queries[:, None, :, None] == of_keys[:, None, None, :])
        return keep.expand(batch, 1, queries, keys)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Answer what is about the shape, move, or compute with the dense tensor."""
        kwargs = kwargs or {}
        if func in ABOUT_SHAPE:
            return super().__torch_function__(func, types, args, kwargs)
        if func in (torch.Tensor.to, torch.Tensor.detach):
            moved = func(torch.ones((), dtype=torch.bool, device=args[0].device), *args[1:], **kwargs)
            if moved.dtype is torch.bool:
                return _on_device(args[0], moved.device)
        dense = [_dense(x) for x in args]
        return func(*dense, **{name: _dense(x) for name, x in kwargs.items()})


def compact_mask(
    shape: tuple[int, int, int, int],
    device: torch.device | str,
    *,
    causal: bool,
    window: tuple[int, int] | None = None,
    document_ids: Ids | None = None,
    seen: int | None = None,
) -> CompactMask:
    """A mask of what it follows from; `seen` is N if None. See `CompactMask`."""
    placeholder = torch.ones((), dtype=torch.bool, device=device).expand(shape)
    mask = placeholder.as_subclass(CompactMask)
    mask.causal = causal
    mask.window = window
    mask.document_ids = document_ids
    mask.seen = shape[3] if seen is None else seen
    return mask


def _on_device(mask: CompactMask, device: torch.device) -> CompactMask:
    ids = mask.document_ids
    if ids is not None:
        ids = (ids[0].to(device), ids[1].to(device))
    return compact_mask(
        tuple(mask.shape),  # type: ignore[arg-type]
        device,
        causal=mask.causal,
        window=mask.window,
        document_ids=ids,
        seen=mask.seen,
    )


def _dense(x: Any) -> Any:
    if isinstance(x, CompactMask):
        return x.dense()
    if isinstance(x, list | tuple):
        return type(x)(_dense(item) for item in x)
    return x


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


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    config: Any = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """The mask of a forward pass, as `transformers.AttentionMaskInterface` asks for it.

    Args:
        batch_size: B.
        q_length: M.
        kv_length: N.
        q_offset: the place of the first query.
        kv_offset: the place of the first key.
        mask_function: (batch, head, query, key) -> whether the query sees the key.
        attention_mask: (B, S) booleans, False where a token is padding.
        local_size: the size of the window or chunk that `mask_function` has.
        allow_is_causal_skip: whether None may be returned for what is plainly causal.
        allow_is_bidirectional_skip: the same for what sees everything.
        use_vmap: whether `mask_function` takes single indices only.
        device: where the mask is made.
        config: the model's configuration.
        kwargs: other arguments of `transformers.masking_utils.sdpa_mask`.

    Returns:
        None where attention needs no mask, a `CompactMask` (B, 1, M, N) where what is seen is
        known, or a boolean tensor of that shape.
    """
    pattern = find_pattern(
        mask_function,
        local_size,
        use_vmap,
        allow_is_causal_skip,
        allow_is_bidirectional_skip,
        config,
    )
    seen = None if pattern is None else _find_seen(pattern, q_length, kv_length, q_offset, kv_offset)
    if pattern is not None and seen is not None:
        shape = (batch_size, 1, q_length, kv_length)
        mask = _apply(pattern, shape, seen, kv_offset, attention_mask, device)
        skip = allow_is_causal_skip if pattern.causal else allow_is_bidirectional_skip
        if skip and _is_plain(mask):
            return None
        # Of one query it is small, and read faster than its parts.
        return mask if q_length > 1 else mask.dense()
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,  # type: ignore[arg-type]
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False,
        use_vmap=use_vmap,
        device=device,
        config=config,
        **kwargs,
    )


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


def _find_seen(
    pattern: Pattern, queries: int, keys: int, q_offset: int | torch.Tensor, kv_offset: int
) -> int | None:
    """How many keys there are up to the last query's own; None where attention cannot tell."""
    if isinstance(q_offset, torch.Tensor):
        # A static cache. Of one query the mask is small, and its place need not be waited for.
        if queries == 1 or is_tracing(q_offset):
            return None
        q_offset = int(q_offset)
    seen = q_offset - kv_offset + queries
    if pattern.causal and queries <= seen <= keys:
        return seen
    # Without an order or a place, all keys are alike.
    placeless = not pattern.causal and pattern.window is None and pattern.chunk is None
    return keys if placeless or seen == keys else None


def _apply(
    pattern: Pattern,
    shape: tuple[int, int, int, int],
    seen: int,
    kv_offset: int,
    attention_mask: torch.Tensor | None,
    device: torch.device | str,
) -> CompactMask:
    """The mask of a pattern and of padding, as far as either matters."""
    _, _, queries, keys = shape
    padding = None if attention_mask is None else _cut(attention_mask, keys, kv_offset)
    traced = is_tracing(padding)
    if padding is not None and not traced and bool(padding[:, :seen].all()):
        padding = None
    window = pattern.window
    # What is traced would hold for these lengths alone if the window were compared with them.
    if window is not None and not traced:
        reach = window[0] if pattern.causal else min(window)
        window = window if reach < seen - 1 else None
    ids: Ids | None = None
    if pattern.documents is not None:
        ids = (pattern.documents, pattern.documents)
    elif pattern.chunk is not None and (traced or padding is not None or seen > pattern.chunk):
        ids = _chunk_ids(pattern.chunk, queries, keys, seen, kv_offset, attention_mask, device)
    if padding is not None:
        if ids is None:
            ids = tuple(padding.new_zeros((1, n), dtype=torch.int32) for n in (queries, keys))
        ids = (ids[0], torch.where(padding, ids[1], NO_DOCUMENT))
    return compact_mask(
        shape, device, causal=pattern.causal, window=window, document_ids=ids, seen=seen
    )


def _cut(attention_mask: torch.Tensor, keys: int, kv_offset: int) -> torch.Tensor:
    """Which of the keys are no padding: (B, N)."""
    missing = keys + kv_offset - attention_mask.shape[-1]
    if missing > 0:
        attention_mask = torch.nn.functional.pad(attention_mask, (0, missing))
    return attention_mask[:, kv_offset : kv_offset + keys].bool()


def _chunk_ids(
    chunk: int,
    queries: int,
    keys: int,
    seen: int,
    kv_offset: int,
    attention_mask: torch.Tensor | None,
    device: torch.device | str,
) -> Ids:
    """The number of each token's chunk, counted from the first token that is no padding."""
    places = torch.arange(keys, device=device)[None] + kv_offset
    if attention_mask is not None:
        left = (attention_mask.cumsum(-1) == 0).sum(-1, keepdim=True)
        places = places - left
    ids = (places // chunk).int()
    return ids[:, seen - queries : seen], ids


def _is_plain(mask: CompactMask) -> bool:
    """Whether attention without a mask sees the same."""
    if mask.document_ids is not None or mask.window is not None:
        return False
    queries, keys = mask.shape[2:]
    # Without a mask the first query stands at the first key, and one query alone sees all keys.
    return not mask.causal or mask.seen == (queries if queries > 1 else keys)
