"""Masks that say which blocks of scores count at all: block masks, and documents."""

from collections.abc import Sequence

import torch

from ..core.arguments import check_constant, check_integers
from .shapes import insert_dimension
from .terms import Index, MaskTerm, Sizes

DOCUMENT_BLOCK = 128
"""Queries, and keys, of a block of documents."""

SMALLEST_BLOCK = 16
"""What a tile has at least."""

LARGEST_BLOCK = 2**30
"""Kernels add the places of queries and keys in 32 bits."""


def block_lists(visible: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What `BlockLists` of the kernels begins with, for a table (B, H, rows, columns).

    Computed on the table's device, without waiting for it.
    """
    lists: list[torch.Tensor] = []
    for table in (visible, visible.mT):
        counts = torch.nn.functional.pad(table.cumsum(-1), (1, 0))
        # The columns of a row, those that count first, in rising order.
        columns = torch.argsort(table.logical_not().to(torch.uint8), dim=-1, stable=True)
        lists += [counts.int().contiguous(), columns.int().contiguous()]
    return tuple(lists)


def list_integers(table: torch.Tensor, block_size: tuple[int, int]) -> tuple[int, ...]:
    """What `BlockLists` ends with."""
    batch, heads, rows, columns = table.shape
    return (*block_size, rows, columns, heads if batch > 1 else 0, 1 if heads > 1 else 0)


class BlockMask(MaskTerm):
    """Whole blocks of scores that count or do not. The others cost nothing, forward and backward.

    The lists of blocks that kernels walk are made here, once; keep the object for several calls.
    What is done to the table later does not count. See also `fastattn.create_block_mask`.

    Args:
        table: booleans (B or 1, H or 1, rows, columns) or (rows, columns): row i, column j says
            whether the i-th block of queries sees the j-th block of keys.
        block_size: the queries and the keys of a block, multiples of 16 up to 2^30; one number for
            both. Kernels take tiles of at most 128 that divide it, so powers of two are
            best.

    Raises:
        TypeError, ValueError: an argument does not fit.

    Example:
        >>> q = k = v = torch.randn(1, 2, 256, 16)
        >>> table = torch.ones(2, 2, dtype=torch.bool).tril()[None, None]
        >>> fastattn.attention(q, k, v, causal=True, block_mask=fastattn.BlockMask(table)).shape
        torch.Size([1, 2, 256, 16])
    """

    def __init__(self, table: torch.Tensor, block_size: int | tuple[int, int] = 128) -> None:
        if not isinstance(table, torch.Tensor) or table.dtype is not torch.bool:
            raise TypeError("BlockMask: table must be a boolean tensor")
        if table.dim() not in (2, 4):
            raise ValueError(
                "BlockMask: table must have the shape (rows, columns) or (B or 1, H or 1, rows, "
                f"columns), got {tuple(table.shape)}"
            )
        sizes = tuple(block_size) if isinstance(block_size, Sequence) else (block_size, block_size)
        if not all(isinstance(size, int) for size in sizes):
            raise TypeError(f"BlockMask: block_size must be integers, got {block_size!r}")
        if len(sizes) != 2 or any(size < 1 or size % SMALLEST_BLOCK != 0 for size in sizes):
            raise ValueError(
                f"BlockMask: block_size must be multiples of {SMALLEST_BLOCK}, got {block_size}"
            )
        if max(sizes) > LARGEST_BLOCK:
            raise ValueError(
                f"BlockMask: block_size must be at most {LARGEST_BLOCK}, got {block_size}"
            )
        self.block_size = sizes
        # What `create_block_mask` adds: the mask within blocks that are not seen in full, and
        # whether the table hangs on the numbers of batch elements, "b", or of heads, "h".
        self.within: MaskTerm | None = None
        self.numbers_used: frozenset[str] = frozenset()
        # A copy, so that the reference, which reads the table itself, agrees with the lists.
        table = (table if table.dim() == 4 else table[None, None]).clone()
        self.tensors = (*block_lists(table), table)

    def check(self, op: str, name: str, q: torch.Tensor, sizes: Sizes) -> None:
        table = self.tensors[4]
        check_constant(op, name, table, q)
        blocks = tuple(
            -(-size // block) for size, block in zip(sizes[2:], self.block_size, strict=True)
        )
        fits = all(size in (1, full) for size, full in zip(table.shape[:2], sizes[:2], strict=True))
        if not fits or tuple(table.shape[2:]) != blocks:
            raise ValueError(
                f"{op}: {name} must have an entry for each of {blocks} blocks, and as many batch "
                f"elements and heads as {sizes[:2]} or 1, got the table {tuple(table.shape)}"
            )
        for index, own, size, word in zip("bh", table.shape, sizes, ("B", "H"), strict=False):
            if index in self.numbers_used and own != size:
                raise ValueError(
                    f"{op}: {name} was made by create_block_mask with {word} = {own}, and its "
                    f"function depends on {index}, of which there are {size}"
                )

    @property
    def integers(self) -> Sequence[int]:  # type: ignore[override]
        return list_integers(self.tensors[4], self.block_size)

    def function_name(self, dtype: torch.dtype) -> str:
        return "block mask@{},{}".format(*self.block_size)

    def keep(self, m: Index, n: Index, queries: Index, keys: Index) -> torch.Tensor:
        return self.tensors[4][:, :, m // self.block_size[0], n // self.block_size[1]]


class DocumentIds(MaskTerm):
    """A query sees the keys of its own document alone; ids (B or 1, M) and (B or 1, N), integers.

    Blocks in which no query and key can share a document, by the least and the largest of their
    ids, cost nothing: all that lie in different documents where documents follow one another.
    """

    def __init__(self, query_ids: torch.Tensor, key_ids: torch.Tensor) -> None:
        self.tensors = tuple(insert_dimension(ids, 2, at=1) for ids in (query_ids, key_ids))

    def check(self, op: str, name: str, q: torch.Tensor, sizes: Sizes) -> None:
        batch, _, queries, keys = sizes
        for ids, length in zip(self.tensors[-2:], (queries, keys), strict=True):
            check_constant(op, name, ids, q)
            check_integers(op, name, ids)
            if tuple(ids.shape) not in ((batch, 1, length), (1, 1, length)):
                shape = (ids.shape[0], ids.shape[2]) if ids.dim() == 3 else tuple(ids.shape)
                raise ValueError(
                    f"{op}: {name} must be ({batch}, {queries}) for queries and "
                    f"({batch}, {keys}) for keys, got {shape}"
                )

    def prepared(self, sizes: Sizes, listed: bool = True) -> "DocumentIds":
        """With lists of blocks, unless another mask has lists already."""
        ids = tuple(x.contiguous() for x in self.tensors[-2:])
        has_blocks = min(x.shape[-1] for x in ids) > 0
        lists = block_lists(_may_share(*ids)) if listed and has_blocks else ()
        return self.with_tensors((*lists, *ids))

    @property
    def integers(self) -> Sequence[int]:  # type: ignore[override]
        of_queries, of_keys = self.tensors[-2:]
        steps = tuple(0 if x.shape[0] == 1 else x.stride(0) for x in (of_queries, of_keys))
        if len(self.tensors) == 2:
            return steps
        return (*steps, *list_integers(self.tensors[1], (DOCUMENT_BLOCK, DOCUMENT_BLOCK)))

    def function_name(self, dtype: torch.dtype) -> str:
        if len(self.tensors) == 2:
            return "documents"
        return f"listed documents@{DOCUMENT_BLOCK},{DOCUMENT_BLOCK}"

    def keep(self, m: Index, n: Index, queries: Index, keys: Index) -> torch.Tensor:
        of_queries, of_keys = self.tensors[-2:]
        return of_queries[..., None] == of_keys[..., None, :]


def _may_share(query_ids: torch.Tensor, key_ids: torch.Tensor) -> torch.Tensor:
    """Which blocks may share a document: (B or 1, 1, rows, columns)."""
    (low_m, high_m), (low_n, high_n) = (_extremes(ids) for ids in (query_ids, key_ids))
    return (low_m[..., None] <= high_n[..., None, :]) & (low_n[..., None, :] <= high_m[..., None])


def _extremes(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the largest id of each block, (B or 1, 1, blocks)."""
    missing = -ids.shape[-1] % DOCUMENT_BLOCK
    if missing and ids.shape[-1] > 0:
        last = ids[..., -1:].expand(*ids.shape[:-1], missing)
        ids = torch.cat((ids, last), dim=-1)
    return torch.aminmax(ids.unflatten(-1, (-1, DOCUMENT_BLOCK)), dim=-1)
