"""What models take of transformers' arguments besides their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def embed(
    embedding: Callable[[torch.Tensor], torch.Tensor],
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    prefix: str = "",
) -> torch.Tensor:
    """What a body begins with, of tokens (B, S) or given as it is: (B, S, C).

    Args:
        embedding: tokens to what the body begins with.
        input_ids: the tokens, or None.
        inputs_embeds: what the embedding would give, or None.
        prefix: what the names of both arguments begin with.

    Raises:
        TypeError: both are given, or none.
    """
    if inputs_embeds is None and input_ids is not None:
        return embedding(input_ids)
    if input_ids is None and inputs_embeds is not None:
        return inputs_embeds
    names = f"{prefix}input_ids and {prefix}inputs_embeds"
    raise TypeError(f"one of {names} must be given, and not both")


def refuse_others(model: str, others: dict[str, Any]) -> None:
    """Arguments of transformers' models that change nothing pass, and others are errors.

    Raises:
        TypeError: one is asked for that is not there, or is not known; the message names it.
    """
    for name, value in others.items():
        if value is not None and value is not False and (name, value) != ("return_dict", True):
            raise TypeError(f"{model}: {name}={value!r} is not supported; leave it out")
