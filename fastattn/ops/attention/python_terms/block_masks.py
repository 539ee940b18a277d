"""Block masks of plain Python functions."""

from collections.abc import Iterator

import torch

from ...core.arguments import check_length
from ..block_terms import BlockMask
from .terms import MaskFunction, PythonMask, mask_term
from .trace import captured_values

MOST_SCORES = 2**22
"""How many scores a function is asked about at a time, or those of one block."""


def create_block_mask(
    mask_mod: MaskFunction,
    B: int | None,
    H: int | None,
    Q_LEN: int,
    KV_LEN: int,
    device: torch.device | str | None = None,
    BLOCK_SIZE: int | tuple[int, int] = 128,
) -> BlockMask:
    """Make the block mask of a plain Python function, with the signature that FlexAttention has.

    The function is asked about every score, some millions at a time. Blocks that nobody sees then
    cost nothing in `fastattn.attention`, forward and backward; in the others the function decides,
    unless all of them are seen in full. Keep the result for several calls: making it waits for the
    device. What captured tensors say within blocks counts as it is at each call, but which blocks
    there are is settled here.

    Args:
        mask_mod: f(b, h, q_idx, kv_idx), see `fastattn.mask_mod`.
        B: the number of batch elements; None or 1 where the function does not depend on b.
        H: the number of query heads; None or 1 where it does not depend on h.
        Q_LEN: the number of queries.
        KV_LEN: the number of keys.
        device: where to compute it, and of the tensors it is for; that of the tensors that the
            function captures, or else the CPU, if None.
        BLOCK_SIZE: the queries and the keys of a block, see `fastattn.BlockMask`.

    Returns:
        A block mask for `block_mask` of `fastattn.attention`, `attention_varlen` and
        `attention_weights`.

    Raises:
        TypeError: the function cannot be compiled into the kernels.
        ValueError: a number does not fit, or the function depends on b or h where it is None.

    Example:
        >>> import fastattn, torch
        >>> q = k = v = torch.randn(1, 2, 300, 16)
        >>> def near(b, h, q_idx, kv_idx):
        ...     return (q_idx - kv_idx).abs() < 20
        >>> blocks = fastattn.create_block_mask(near, None, None, 300, 300)
        >>> fastattn.attention(q, k, v, block_mask=blocks).shape
        torch.Size([1, 2, 300, 16])
    """
    op = "create_block_mask"
    term = mask_term(mask_mod)
    for name, size in (("B", B), ("H", H), ("Q_LEN", Q_LEN), ("KV_LEN", KV_LEN)):
        if size is not None or name in ("Q_LEN", "KV_LEN"):
            check_length(op, name, size)
    for index, name, size in (("b", "B", B), ("h", "H", H)):
        if size is None and index in term.numbers_used:
            raise ValueError(f"{op}: {name} is None, and the function depends on {index}")
    sizes = (B or 1, H or 1, Q_LEN, KV_LEN)
    # Checked first, for it says what is wrong with a block's size.
    made = BlockMask(torch.zeros((0, 0), dtype=torch.bool), BLOCK_SIZE)
    place = torch.device(device) if device is not None else _captured_device(mask_mod)
    with torch.no_grad():
        some, full = _find_blocks(term, sizes, made.block_size, place)
    made = BlockMask(some, made.block_size)
    made.within = None if bool((some == full).all()) else term
    made.numbers_used = term.numbers_used
    return made


def _captured_device(function: MaskFunction) -> torch.device:
    """Where the tensors are that a function captures."""
    devices = [x.device for x in captured_values(function) if isinstance(x, torch.Tensor)]
    return devices[0] if devices else torch.device("cpu")


def _find_blocks(
    term: PythonMask,
    sizes: tuple[int, int, int, int],
    block: tuple[int, int],
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """In which blocks some scores count, and in which all: tables (B, H, rows, columns)."""
    batch, heads, queries, keys = sizes
    shape = (batch, heads, -(-queries // block[0]), -(-keys // block[1]))
    some = torch.zeros(shape, dtype=torch.bool, device=device)
    full = torch.zeros_like(some)
    wide = _in_blocks(MOST_SCORES // block[0], block[1], keys)
    high = _in_blocks(MOST_SCORES // wide, block[0], queries)
    deep = max(1, MOST_SCORES // (wide * high))
    for pairs in _ranges(0, batch * heads, deep):
        pair = torch.arange(*pairs, device=device)
        for rows in _ranges(0, queries, high):
            for columns in _ranges(0, keys, wide):
                kept = term.keep_of(
                    pair // heads,
                    pair % heads,
                    torch.arange(*rows, device=device),
                    torch.arange(*columns, device=device),
                )
                for table, missing in ((some, False), (full, True)):
                    found = _of_blocks(kept, block, missing)
                    table.view(-1, *shape[2:])[
                        pairs[0] : pairs[1],
                        rows[0] // block[0] : -(-rows[1] // block[0]),
                        columns[0] // block[1] : -(-columns[1] // block[1]),
                    ] = found
    return some, full


def _in_blocks(most: int, block: int, length: int) -> int:
    """The largest multiple of a block's size up to `most` that a length asks for, at least one."""
    return min(max(1, most // block), max(1, -(-length // block))) * block


def _ranges(first: int, end: int, step: int) -> Iterator[tuple[int, int]]:
    """A range in parts."""
    return ((start, min(start + step, end)) for start in range(first, end, step))


def _of_blocks(kept: torch.Tensor, block: tuple[int, int], missing: bool) -> torch.Tensor:
    """Whether some (all, where what is `missing` counts as seen) scores of each block count."""
    pads = (0, -kept.shape[2] % block[1], 0, -kept.shape[1] % block[0])
    parts = torch.nn.functional.pad(kept, pads, value=missing)
    parts = parts.unflatten(1, (-1, block[0])).unflatten(3, (-1, block[1]))
    return parts.all(4).all(2) if missing else parts.any(4).any(2)
