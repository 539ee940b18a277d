"""The options of attention for type checkers and editors, and errors that name the right one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypedDict

if TYPE_CHECKING:
    import torch

    from .bias_terms import RelativeBias
    from .block_terms import BlockMask
    from .python_terms.terms import MaskFunction, ScoreFunction
    from .terms import MaskTerm, Term


class AttentionOptions(TypedDict, total=False):
    """What `attention` and `attention_varlen` take by name besides return_lse; see there."""

    causal: bool
    window: int | Sequence[int | None] | None
    mask: torch.Tensor | None
    bias: torch.Tensor | None
    alibi_slopes: torch.Tensor | None
    relative_bias: RelativeBias | None
    softcap: float | None
    sinks: torch.Tensor | None
    dropout_p: float
    dropout_seed: torch.Tensor | None
    scale: float | None
    kv_lengths: torch.Tensor | None
    document_ids: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None
    block_mask: BlockMask | None
    score_mods: Sequence[Term | ScoreFunction] | None
    mask_mod: MaskTerm | MaskFunction | None


OURS = {
    "attention_mask": "mask (booleans) or bias (numbers)",
    "attn_bias": "bias",
    "attn_mask": "mask (booleans) or bias (numbers)",
    "dropout": "dropout_p",
    "is_causal": "causal",
    "key_padding_mask": "mask, or kv_lengths",
    "logits_soft_cap": "softcap",
    "return_attn_probs": "return_lse",
    "return_softmax_lse": "return_lse",
    "score_mod": "score_mods, a sequence",
    "sliding_window": "window",
    "sm_scale": "scale",
    "softmax_scale": "scale",
    "window_size": "window",
}
"""What other libraries call an option, and what we do."""

NEEDLESS = {
    "deterministic": "its gradients have the same bits every time",
    "enable_gqa": "k and v may always have fewer heads",
}
"""Options of other libraries that there is nothing to choose for here."""


def refuse_unknown(op: str, unknown: Mapping[str, Any]) -> NoReturn:
    """The error for an option that there is not, by its name in ours."""
    name = next(iter(unknown))
    if name in OURS:
        raise TypeError(f"{op} has {OURS[name]}, not {name}")
    if name in NEEDLESS:
        raise TypeError(f"{op} has no {name}: {NEEDLESS[name]}")
    raise TypeError(f"{op}() got an unexpected keyword argument {name!r}")
