"""What attention is called with: checks, and the terms that the arguments ask for."""

from collections.abc import Sequence
from typing import Any

import torch

from .arguments import check_float_tensor, check_seed, check_shape
from .attention_bias_terms import AdditiveBias, Alibi, RelativeBias
from .attention_block_terms import BlockMask, DocumentIds
from .attention_terms import (
    BooleanMask,
    Causal,
    KeyLengths,
    MaskTerm,
    ScoreTerm,
    Softcap,
    Term,
    WindowLeft,
    WindowRight,
)
from .precision import autocast
from .products import check_same_dtype
from .random import draw_seed

WIDEST_HEAD = 1024
"""The largest head dimension that the kernels have tiles for. Beyond 512 they fit into the shared
memory of large devices only."""


def composed_terms(
    op: str,
    q: torch.Tensor,
    batch: int,
    queries: int,
    keys: int,
    *,
    causal: bool = False,
    window: int | Sequence[int | None] | None = None,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    relative_bias: RelativeBias | None = None,
    softcap: float | None = None,
    kv_lengths: torch.Tensor | None = None,
    document_ids: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
    block_mask: BlockMask | None = None,
    score_mods: Sequence[Term] = (),
) -> list[Term]:
    """The terms that the arguments ask for, in the order in which they apply."""
    sizes = (batch, q.shape[1], queries, keys)
    terms: list[Term] = []
    if softcap is not None:
        if not softcap > 0.0:
            raise ValueError(f"{op}: softcap must be positive, got {softcap}")
        terms.append(Softcap(softcap))
    if bias is not None:
        check_float_tensor(op, "bias", bias)
        check_device(op, "bias", bias, q)
        terms.append(AdditiveBias(_four_dimensions(op, "bias", bias, sizes)))
    if relative_bias is not None:
        terms.append(_relative_bias(op, relative_bias, q))
    if alibi_slopes is not None:
        terms.append(_alibi(op, alibi_slopes, q, batch))
    if score_mods != ():
        terms.extend(_own_terms(op, score_mods, q, sizes))
    if causal:
        terms.append(Causal())
    if window is not None:
        left, right = _window(op, window)
        if left is not None:
            terms.append(WindowLeft(left))
        if right is not None:
            terms.append(WindowRight(right))
    if mask is not None:
        check_constant(op, "mask", mask, q)
        if mask.dtype is not torch.bool:
            raise TypeError(f"{op}: mask must be boolean, True where attended, got {mask.dtype}")
        terms.append(BooleanMask(_four_dimensions(op, "mask", mask, sizes)))
    if kv_lengths is not None:
        check_constant(op, "kv_lengths", kv_lengths, q)
        if kv_lengths.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{op}: kv_lengths must be int32 or int64, got {kv_lengths.dtype}")
        check_shape(op, "kv_lengths", kv_lengths, (batch,))
        terms.append(KeyLengths(kv_lengths))
    if block_mask is not None:
        terms.append(_block_mask(op, block_mask, q, sizes))
    if document_ids is not None:
        listed = block_mask is None and min(queries, keys) > 0
        terms.append(_documents(op, document_ids, q, sizes, listed))
    return terms


def _relative_bias(op: str, relative_bias: object, q: torch.Tensor) -> RelativeBias:
    if not isinstance(relative_bias, RelativeBias):
        raise TypeError(
            f"{op}: relative_bias must be a fastattn.RelativeBias, "
            f"got {type(relative_bias).__name__}"
        )
    table = relative_bias.tensors[0]
    check_device(op, "relative_bias", table, q)
    if table.shape[1] != q.shape[1]:
        raise ValueError(
            f"{op}: relative_bias must have a table for {q.shape[1]} heads, got {table.shape[1]}"
        )
    return relative_bias


def _alibi(op: str, slopes: torch.Tensor, q: torch.Tensor, batch: int) -> Alibi:
    heads = q.shape[1]
    check_float_tensor(op, "alibi_slopes", slopes)
    check_device(op, "alibi_slopes", slopes, q)
    if slopes.shape not in ((heads,), (batch, heads)):
        raise ValueError(
            f"{op}: alibi_slopes must have shape ({heads},) or ({batch}, {heads}), "
            f"got {tuple(slopes.shape)}"
        )
    return Alibi(slopes)


def _own_terms(
    op: str, score_mods: object, q: torch.Tensor, sizes: tuple[int, int, int, int]
) -> Sequence[Term]:
    """The terms of score_mods, whose tensors fit."""
    if not isinstance(score_mods, Sequence):
        raise TypeError(f"{op}: score_mods must be a sequence of terms, got {score_mods!r}")
    for term in score_mods:
        if not isinstance(term, ScoreTerm | MaskTerm):
            raise TypeError(f"{op}: score_mods must hold ScoreTerm and MaskTerm, got {term!r}")
        if term.learned and (isinstance(term, MaskTerm) or not term.tensors):
            raise TypeError(
                f"{op}: score_mods: {type(term).__name__} is learned, so it must be a ScoreTerm "
                "with a tensor"
            )
        for place, tensor in enumerate(term.tensors):
            name = f"score_mods: a tensor of {type(term).__name__}"
            if term.learned and place == 0:
                check_device(op, name, tensor, q)
            else:
                check_constant(op, name, tensor, q)
            if tensor.dim() < 2 or any(
                size not in (1, full) for size, full in zip(tensor.shape, sizes[:2], strict=False)
            ):
                raise ValueError(
                    f"{op}: {name} must begin with the dimensions batch and heads, {sizes[:2]} or "
                    f"1 for each, got {tuple(tensor.shape)}"
                )
    return score_mods


def _block_mask(
    op: str, block_mask: object, q: torch.Tensor, sizes: tuple[int, int, int, int]
) -> BlockMask:
    if not isinstance(block_mask, BlockMask):
        raise TypeError(
            f"{op}: block_mask must be a fastattn.BlockMask, got {type(block_mask).__name__}"
        )
    table = block_mask.tensors[4]
    check_constant(op, "block_mask", table, q)
    blocks = tuple(
        -(-size // block) for size, block in zip(sizes[2:], block_mask.block_size, strict=True)
    )
    wanted = (*sizes[:2], *blocks)
    fits = all(size in (1, want) for size, want in zip(table.shape[:2], wanted, strict=False))
    if not fits or tuple(table.shape[2:]) != blocks:
        raise ValueError(
            f"{op}: block_mask must have an entry for each of {blocks} blocks, and as many batch "
            f"elements and heads as {sizes[:2]} or 1, got the table {tuple(table.shape)}"
        )
    return block_mask


def _documents(
    op: str,
    document_ids: Any,
    q: torch.Tensor,
    sizes: tuple[int, int, int, int],
    listed: bool,
) -> DocumentIds:
    batch, _, queries, keys = sizes
    pair = document_ids if isinstance(document_ids, tuple) else (document_ids, document_ids)
    if len(pair) != 2:
        raise ValueError(f"{op}: document_ids must be a tensor or a pair, got {len(pair)} tensors")
    for ids, length in zip(pair, (queries, keys), strict=True):
        check_constant(op, "document_ids", ids, q)
        if ids.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{op}: document_ids must be int32 or int64, got {ids.dtype}")
        if tuple(ids.shape) not in ((batch, length), (1, length)):
            raise ValueError(
                f"{op}: document_ids must be ({batch}, {queries}) for queries and "
                f"({batch}, {keys}) for keys, got {tuple(ids.shape)}"
            )
    return DocumentIds(*pair, listed=listed)


def check_sinks(op: str, sinks: torch.Tensor, q: torch.Tensor) -> None:
    """A number for each query head."""
    check_float_tensor(op, "sinks", sinks)
    check_device(op, "sinks", sinks, q)
    check_shape(op, "sinks", sinks, (q.shape[1],))


def seed_for(
    op: str, q: torch.Tensor, dropout_p: float, seed: torch.Tensor | None
) -> torch.Tensor | None:
    """Dropout's seed, drawn if none is given; None without dropout."""
    if seed is not None:
        check_seed(op, seed, like=q)
    if dropout_p == 0.0:
        return None
    return draw_seed(q) if seed is None else seed


def check_device(op: str, name: str, tensor: object, q: torch.Tensor) -> None:
    """A tensor on the device of q."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    if tensor.device != q.device:
        raise ValueError(f"{op}: {name} must be on {q.device}, got {tensor.device}")


def check_constant(op: str, name: str, tensor: object, q: torch.Tensor) -> None:
    """A tensor on the device of q that asks for no gradient."""
    check_device(op, name, tensor, q)
    assert isinstance(tensor, torch.Tensor)
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op}: {name} must not require a gradient, for it would get none")


def _window(op: str, window: int | Sequence[int | None]) -> tuple[int | None, int | None]:
    """How many keys to the left and to the right of its own place a query sees."""
    sides = window if isinstance(window, Sequence) else (window, None)
    if len(sides) != 2 or not all(side is None or isinstance(side, int) for side in sides):
        raise TypeError(f"{op}: window must be an integer, a pair of them, or None, got {window!r}")
    left, right = sides
    if min(left or 0, right or 0) < 0:
        raise ValueError(f"{op}: window must not be negative, got {window}")
    return left, right


def _four_dimensions(
    op: str, name: str, x: torch.Tensor, sizes: tuple[int, int, int, int]
) -> torch.Tensor:
    """`x` with leading dimensions of 1, checked to broadcast to (B, H, M, N)."""
    full = x[(None,) * (4 - x.dim())] if x.dim() < 4 else x
    fits = full.dim() == 4 and all(
        size in (1, want) for size, want in zip(full.shape, sizes, strict=True)
    )
    if not fits:
        raise ValueError(f"{op}: {name} must broadcast to {sizes}, got {tuple(x.shape)}")
    return full


def check_qkv(op: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: str) -> None:
    """q, k and v fit together; `layout` has their dimensions, among which heads and lengths."""
    check_float_tensor(op, "q", q)
    dtype, device = q.dtype, q.device
    for name, x in (("q", q), ("k", k), ("v", v)):
        # So much of the usual tensor: all checks of one take twice as long.
        if not (isinstance(x, torch.Tensor) and x.dtype is dtype and x.device == device):
            check_float_tensor(op, name, x, like=q)
        if x.ndim != len(layout):
            raise ValueError(
                f"{op}: {name} must have {len(layout)} dimensions ({', '.join(layout)}), "
                f"got the shape {tuple(x.shape)}"
            )
    # A tensor's shape is an object that takes longer to make than to compare.
    q_shape, k_shape, v_shape = q.shape, k.shape, v.shape
    heads, length = layout.index("H"), layout.index("N")
    batched = layout[0] == "B"
    if k_shape[length] != v_shape[length] or (batched and k_shape[0] != v_shape[0]):
        raise ValueError(
            f"{op}: k and v must have the same length and batch, "
            f"got {tuple(k_shape)} and {tuple(v_shape)}"
        )
    if batched and q_shape[0] != k_shape[0]:
        raise ValueError(
            f"{op}: q and k must have the same batch, got {tuple(q_shape)} and {tuple(k_shape)}"
        )
    q_heads, k_heads, v_heads = q_shape[heads], k_shape[heads], v_shape[heads]
    if k_heads != v_heads or k_heads == 0 or q_heads % k_heads != 0:
        raise ValueError(
            f"{op}: k and v must have the same number of heads, one that divides that of q, "
            f"got {q_heads}, {k_heads} and {v_heads}"
        )
    key_dim, value_dim = q_shape[-1], v_shape[-1]
    if key_dim != k_shape[-1]:
        raise ValueError(
            f"{op}: q and k must have the same head dimension, got {key_dim} and {k_shape[-1]}"
        )
    for name, dim in (("q", key_dim), ("v", value_dim)):
        if not 0 < dim <= WIDEST_HEAD:
            raise ValueError(
                f"{op}: the head dimension of {name} must be in [1, {WIDEST_HEAD}], got {dim}"
            )


def cast(
    op: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v in autocast's dtype, or else in the one that they have to have in common."""
    q, k, v = autocast(q, k, v)
    dtype = q.dtype
    if k.dtype is not dtype or v.dtype is not dtype:
        check_same_dtype(op, "k", k, "q", q)
        check_same_dtype(op, "v", v, "q", q)
    return q, k, v


def check_cumulative(
    op: str, name: str, cumulative: torch.Tensor, x: torch.Tensor, longest: int
) -> None:
    check_constant(op, name, cumulative, x)
    if cumulative.dtype is not torch.int32 or cumulative.dim() != 1 or cumulative.numel() == 0:
        raise ValueError(
            f"{op}: {name} must be int32 of shape (B + 1,), "
            f"got {cumulative.dtype} of shape {tuple(cumulative.shape)}"
        )
    if cumulative.device.type != "cpu" or torch.compiler.is_compiling():
        return
    lengths = cumulative.diff()
    if cumulative[0] != 0 or (lengths < 0).any() or cumulative[-1] > x.shape[0]:
        raise ValueError(
            f"{op}: {name} must rise from 0 to at most {x.shape[0]}, got {cumulative.tolist()}"
        )
    if (lengths > longest).any():
        raise ValueError(
            f"{op}: {name} has a sequence of {lengths.max().item()}, more than the {longest} of "
            f"max_seqlen_{name[-1]}"
        )
