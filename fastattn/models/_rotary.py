"""Rotary positions as configurations describe them, in their newer and their older form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..nn import RotaryEmbedding
from ._config import ConfigError


def modernize_rope(values: dict[str, Any]) -> dict[str, Any]:
    """A config.json with `rope_parameters` for the older `rope_theta` and `rope_scaling`."""
    values = dict(values)
    theta, scaling = values.pop("rope_theta", None), values.pop("rope_scaling", None)
    if values.get("rope_parameters") is None and (theta is not None or scaling):
        parameters = dict(scaling or {})
        parameters.setdefault("rope_type", parameters.pop("type", "default"))
        parameters.setdefault("rope_theta", 10000.0 if theta is None else theta)
        values["rope_parameters"] = parameters
    return values


def rotary_embedding(
    rope_parameters: Mapping[str, Any],
    head_dim: int,
    max_positions: int,
    *,
    interleaved: bool = False,
) -> RotaryEmbedding:
    """The module for `rope_parameters`.

    Raises:
        ConfigError: they are of a kind that is not supported.
    """
    partial = rope_parameters.get("partial_rotary_factor")
    if partial not in (None, 1.0):
        raise ConfigError(f"rope_parameters: partial_rotary_factor={partial} is not supported")
    base = float(rope_parameters.get("rope_theta", 10000.0))
    scaling = {**rope_parameters, "rope_theta": base}
    # As transformers does for those who leave it out; kinds that do not need it do not mind.
    if scaling.get("original_max_position_embeddings") is None:
        scaling["original_max_position_embeddings"] = max_positions
    try:
        return RotaryEmbedding(
            head_dim, max_positions, base, scaling=scaling, interleaved=interleaved
        )
    except ValueError as error:
        raise ConfigError(f"rope_parameters: {error}") from error
