"""What attention is called with: checks, and the terms that the arguments ask for."""

from collections.abc import Sequence
from types import NoneType

import torch
from torch.compiler import is_dynamo_compiling

from ..core.arguments import (
    check_constant,
    check_device,
    check_float_tensor,
    check_seed,
    check_shape,
    read_softcap,
)
from ..core.precision import autocast
from ..core.products import check_same_dtype
from ..core.random import draw_seed
from ..core.tensor_kinds import is_plain
from .bias_terms import AdditiveBias, Alibi, RelativeBias
from .block_terms import BlockMask, DocumentIds
from .python_terms.terms import MaskFunction, ScoreFunction, mask_term, score_term
from .terms import (
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

WIDEST_HEAD = 1024
"""The largest head dimension that the kernels have tiles for. Beyond 512 they fit into the shared
memory of large devices only."""


def compose_terms(
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
    score_mods: Sequence[Term | ScoreFunction] | None = (),
    mask_mod: MaskTerm | MaskFunction | None = None,
) -> list[Term]:
    """The terms that the arguments ask for, checked and prepared, in the order they apply in.

    Each term has its own checks, whichever argument it came by.
    """
    key = None
    if (
        mask is None
        and bias is None
        and alibi_slopes is None
        and relative_bias is None
        and kv_lengths is None
        and document_ids is None
        and block_mask is None
        and mask_mod is None
        and (score_mods is None or score_mods == ())
    ):
        key = _make_key(op, q.dtype, causal, window, softcap)
        known = None if key is None else _composed.get(key)
        if known is not None:
            return known.copy()
    given: list[tuple[str, Term]] = []
    softcap = read_softcap(op, softcap, q.dtype)
    if softcap is not None:
        given.append(("softcap", Softcap(softcap)))
    if bias is not None:
        given.append(("bias", AdditiveBias(bias)))
    if relative_bias is not None:
        _check_kind(op, "relative_bias", relative_bias, RelativeBias)
        given.append(("relative_bias", relative_bias))
    if alibi_slopes is not None:
        given.append(("alibi_slopes", Alibi(alibi_slopes)))
    if mask_mod is not None or (score_mods is not None and score_mods != ()):
        given += [(_name_of(term), term) for term in own_terms(op, score_mods, mask_mod)]
    if causal:
        given.append(("causal", Causal()))
    if window is not None:
        left, right = _window(op, window)
        if left is not None:
            given.append(("window", WindowLeft(left)))
        if right is not None:
            given.append(("window", WindowRight(right)))
    if mask is not None:
        given.append(("mask", BooleanMask(mask)))
    if kv_lengths is not None:
        given.append(("kv_lengths", KeyLengths(kv_lengths)))
    if block_mask is not None:
        _check_kind(op, "block_mask", block_mask, BlockMask)
        given.append(("block_mask", block_mask))
        if block_mask.within is not None:
            given.append(("block_mask", block_mask.within))
    if document_ids is not None:
        pair = document_ids if isinstance(document_ids, tuple) else (document_ids, document_ids)
        if len(pair) != 2:
            raise ValueError(
                f"{op}: document_ids must be a tensor or a pair, got {len(pair)} tensors"
            )
        given.append(("document_ids", DocumentIds(*pair)))
    sizes = (batch, q.shape[1], queries, keys)
    for name, term in given:
        term.check(op, name, q, sizes)
    # Kernels walk the lists of one mask, and those of documents are made here.
    others = any(isinstance(term, BlockMask) for _, term in given)
    terms: list[Term] = []
    for _, term in given:
        if isinstance(term, DocumentIds):
            terms.append(term.prepared(sizes, listed=not others))
            others = True
        else:
            terms.append(term.prepared(sizes))
    if key is not None:
        if len(_composed) >= MOST_COMPOSED:
            _composed.clear()
        _composed[key] = terms.copy()
    return terms


MOST_COMPOSED = 256

_composed: dict[tuple, list[Term]] = {}
"""The terms of calls that give numbers alone, of which a model has a few."""


def _make_key(
    op: str, dtype: torch.dtype, causal: object, window: object, softcap: object
) -> tuple | None:
    """What terms of numbers alone are remembered by; None where they are not to be."""
    # Exact types, because 1, 1.0 and True are equal, and a tensor is another tomorrow.
    known = type(causal) is bool and type(window) in (int, NoneType)
    if known and type(softcap) in (float, NoneType) and not is_dynamo_compiling():
        return op, dtype, causal, window, softcap
    return None


def _check_kind(op: str, name: str, term: object, kind: type[Term]) -> None:
    if not isinstance(term, kind):
        raise TypeError(
            f"{op}: {name} must be a fastattn.{kind.__name__}, got {type(term).__name__}"
        )


def own_terms(op: str, score_mods: object, mask_mod: object) -> list[Term]:
    """The terms of score_mods and mask_mod, of functions those that they are made into."""
    if not isinstance(score_mods, Sequence | None):
        raise TypeError(f"{op}: score_mods must be a sequence of terms, got {score_mods!r}")
    terms: list[Term] = []
    for term in score_mods or ():
        if isinstance(term, ScoreTerm | MaskTerm):
            terms.append(term)
        elif callable(term):
            _refuse_while_compiling(op, "score_mod")
            terms.append(score_term(term))
        else:
            raise TypeError(
                f"{op}: score_mods must hold functions, ScoreTerm and MaskTerm, got {term!r}"
            )
    if isinstance(mask_mod, MaskTerm):
        terms.append(mask_mod)
    elif callable(mask_mod):
        _refuse_while_compiling(op, "mask_mod")
        terms.append(mask_term(mask_mod))
    elif mask_mod is not None:
        raise TypeError(f"{op}: mask_mod must be a function or a MaskTerm, got {mask_mod!r}")
    return terms


def _refuse_while_compiling(op: str, maker: str) -> None:
    """Of a function's captured values a graph would know nothing, and keep the first for good."""
    if is_dynamo_compiling():
        raise TypeError(
            f"{op}: torch.compile cannot look into a function: make a term of it beforehand, by "
            f"fastattn.{maker}, outside of what is compiled"
        )


def _name_of(term: Term) -> str:
    """What errors call a term of one's own."""
    return f"score_mods: {type(term).__name__}"


def check_sinks(op: str, sinks: torch.Tensor, q: torch.Tensor) -> None:
    """A number for each query head."""
    check_float_tensor(op, "sinks", sinks)
    check_device(op, "sinks", sinks, q)
    check_shape(op, "sinks", sinks, (q.shape[1],))


def choose_seed(
    op: str, q: torch.Tensor, dropout_p: float, seed: torch.Tensor | None
) -> torch.Tensor | None:
    """Dropout's seed, drawn if none is given; None without dropout."""
    if seed is not None:
        check_seed(op, seed, like=q)
    if dropout_p == 0.0:
        return None
    return draw_seed(q) if seed is None else seed


def _window(op: str, window: int | Sequence[int | None]) -> tuple[int | None, int | None]:
    """How many keys to the left and to the right of its own place a query sees."""
    sides = window if isinstance(window, Sequence) else (window, None)
    if len(sides) != 2 or not all(
        side is None or (isinstance(side, int) and not isinstance(side, bool)) for side in sides
    ):
        raise TypeError(f"{op}: window must be an integer, a pair of them, or None, got {window!r}")
    left, right = sides
    return left, right


def check_qkv(op: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: str) -> None:
    """q, k and v fit together; `layout` has their dimensions, among which heads and lengths."""
    check_float_tensor(op, "q", q)
    dtype, device = q.dtype, q.device
    for name, x in (("q", q), ("k", k), ("v", v)):
        # So much of the usual tensor: all checks of one take twice as long.
        alike = isinstance(x, torch.Tensor) and x.dtype is dtype and x.device == device
        if not alike or x.is_nested:
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
    # A fake tensor has no numbers, whatever its device.
    if cumulative.device.type != "cpu" or not is_plain((cumulative,)):
        return
    # In 64 bits: in 32 a difference of two of them may come round.
    lengths = cumulative.long().diff()
    if cumulative[0] != 0 or (lengths < 0).any() or cumulative[-1] > x.shape[0]:
        raise ValueError(
            f"{op}: {name} must rise from 0 to at most {x.shape[0]}, got {cumulative.tolist()}"
        )
    if (lengths > longest).any():
        raise ValueError(
            f"{op}: {name} has a sequence of {lengths.max().item()}, more than the {longest} of "
            f"max_seqlen_{name[-1]}"
        )
