"""What transformers' attention_mask is for `fastattn.attention`."""

from __future__ import annotations

from typing import Any

import torch


def mask_terms(attention_mask: torch.Tensor | None, batch: int, keys: int) -> dict[str, Any]:
    """The keyword arguments of attention for a mask of the tokens that are attended to.

    Positions do not depend on it: as in transformers, the first column is position 0 also where it
    is padding.

    Args:
        attention_mask: None for no padding; (B, S) booleans or numbers, 0 at the padding, which may
            be anywhere; (B,) integers, the number of tokens before the padding, which spares the
            kernels the blocks behind it; or (B, 1 or H, M or 1, S), booleans that are True where a
            query sees a key, or floats that are added to the scores.
        batch: B.
        keys: S.

    Returns:
        `kv_lengths`, `mask` or `bias`.

    Raises:
        ValueError: the mask has another shape.
    """
    if attention_mask is None:
        return {}
    shape = tuple(attention_mask.shape)
    if shape == (batch,) and not attention_mask.is_floating_point():
        return {"kv_lengths": attention_mask}
    if shape == (batch, keys):
        return {"mask": (attention_mask != 0)[:, None, None]}
    if len(shape) == 4 and shape[-1] == keys:
        return {"bias" if attention_mask.is_floating_point() else "mask": attention_mask}
    raise ValueError(
        f"attention_mask must be ({batch}, {keys}), ({batch},) lengths, or (B, H, M, {keys}), "
        f"got the shape {shape}"
    )
