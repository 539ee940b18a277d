"""A mask in linear memory that is a tensor to everybody but attention."""

from typing import Any

import torch

Ids = tuple[torch.Tensor, torch.Tensor]
"""The documents of queries (B or 1, M) and of keys (B or 1, N)."""

# What is asked of a mask without its numbers.
ABOUT_SHAPE = {
    torch.Tensor.device.__get__,  # type: ignore[attr-defined]
    torch.Tensor.dtype.__get__,  # type: ignore[attr-defined]
    torch.Tensor.grad_fn.__get__,  # type: ignore[attr-defined]
    torch.Tensor.is_cpu.__get__,  # type: ignore[attr-defined]
    torch.Tensor.is_cuda.__get__,  # type: ignore[attr-defined]
    torch.Tensor.is_leaf.__get__,  # type: ignore[attr-defined]
    torch.Tensor.is_nested.__get__,  # type: ignore[attr-defined]
    torch.Tensor.layout.__get__,  # type: ignore[attr-defined]
    torch.Tensor.ndim.__get__,  # type: ignore[attr-defined]
    torch.Tensor.requires_grad.__get__,  # type: ignore[attr-defined]
    torch.Tensor.shape.__get__,  # type: ignore[attr-defined]
    torch.Tensor.__len__,
    torch.Tensor.dim,
    torch.Tensor.element_size,
    torch.Tensor.get_device,
    torch.Tensor.is_complex,
    torch.Tensor.is_contiguous,
    torch.Tensor.is_floating_point,
    torch.Tensor.nelement,
    torch.Tensor.numel,
    torch.Tensor.size,
    torch.Tensor.storage_offset,
    torch.Tensor.stride,
    torch.is_complex,
    torch.is_floating_point,
    torch.numel,
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
            mask, *where = args
            one = torch.ones((), dtype=torch.bool, device=mask.device)
            moved = func(one, *where, **kwargs)
            if moved.dtype is torch.bool:
                return _on_device(mask, moved.device)
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
