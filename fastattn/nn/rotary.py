"""Rotary positions as a module: the tables of angles, and the ways to stretch them."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn as nn

from ..ops import apply_rotary_qk
from ..ops.core.arguments import whole_number
from .tracing import one_node

# For each kind of scaling, what it needs and what it may have beside that. The names are those of
# Hugging Face's configurations, where `scaling` is `rope_parameters`.
NEEDED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}
OPTIONAL = {
    "yarn": (
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
}
# What configurations repeat there, and the module takes as arguments of its own.
ELSEWHERE = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
# What configurations have beside that, and no kind of scaling but those that name it depends on.
WITHOUT_EFFECT = ("finetuned", "original_max_position_embeddings")


MOST_POSITIONS = 2**24
"""From here on float32 does not tell positions apart."""


class RotaryEmbedding(nn.Module):
    """Turns queries and keys by their positions; the values are those of Hugging Face's models.

    Args:
        dim: the columns of a head that are turned, R <= D; the head dim for most models.
        max_positions: positions that the tables are kept for. Longer sequences compute theirs at
            each call; "dynamic" scaling begins there.
        base: the wavelengths are 2 pi base^(2i / dim); `rope_theta` in configurations.
        scaling: how angles are stretched for sequences longer than those trained on: a dictionary
            with "rope_type" and what that needs, as `rope_parameters` in Hugging Face's
            configurations.

            - "linear": "factor". Positions are divided by it.
            - "dynamic": "factor". The base grows with a sequence that is longer than max_positions
              (NTK-aware).
            - "yarn": "factor", "original_max_position_embeddings", and optionally "beta_fast",
              "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate".
            - "llama3": "factor", "low_freq_factor", "high_freq_factor",
              "original_max_position_embeddings".
        interleaved: which columns make a pair, as in `fastattn.apply_rotary`.
        device: where the tables lie.

    The tables `cos` and `sin`, (max_positions, dim/2), are float32 buffers that no state_dict
    holds. They stay float32 when the module is cast, because 16 bits are too few for angles.

    Raises:
        ValueError: an argument does not fit.

    Sources: Su et al., "RoFormer" (2021); Chen et al., "Extending Context Window of Large Language
    Models via Positional Interpolation" (2023) for linear; bloc97's NTK-aware scaling (2023) for
    dynamic; Peng, Quesnelle, Fan and Shippole, "YaRN" (2023); the Llama 3.1 release for llama3.

    Example:
        >>> rotary = fastattn.nn.RotaryEmbedding(16)
        >>> q, k = rotary(torch.randn(1, 4, 6, 16), torch.randn(1, 2, 6, 16))
        >>> q.shape
        torch.Size([1, 4, 6, 16])
    """

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(
        self,
        dim: int,
        max_positions: int = 2048,
        base: float = 10000.0,
        *,
        scaling: Mapping[str, Any] | None = None,
        interleaved: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if dim < 2 or dim % 2:
            raise ValueError(f"RotaryEmbedding: dim must be even and positive, got {dim}")
        if max_positions < 1:
            raise ValueError(
                f"RotaryEmbedding: max_positions must be positive, got {max_positions}"
            )
        if not base > 1.0:
            raise ValueError(f"RotaryEmbedding: base must be greater than 1, got {base}")
        self.dim = dim
        self.max_positions = max_positions
        self.base = base
        self.scaling = _check_scaling(scaling, base)
        if dim == 2 and self.scaling["rope_type"] == "dynamic":
            raise ValueError("RotaryEmbedding: dynamic scaling needs a dim greater than 2")
        self.interleaved = interleaved
        cos, sin = self.tables(max_positions, device=device)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    @one_node
    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        positions: torch.Tensor | int | None = None,
        *,
        cu_seqlens: torch.Tensor | None = None,
        length: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Turn q (B, H, S, D) and k (B, Hkv, S, D), or the same without B.

        Args:
            q, k, positions, cu_seqlens: as in `fastattn.apply_rotary_qk`.
            length: the largest position plus one. It has to be given where positions come as a
                tensor, or from cu_seqlens, and exceed max_positions, for reading it from there
                would mean to wait for the device; tokens beyond it come out as NaN.

        Returns:
            The turned q and k.
        """
        positions = whole_number("RotaryEmbedding", "positions", positions)
        if length is None and cu_seqlens is None and not isinstance(positions, torch.Tensor):
            length = q.shape[-2] + (positions or 0)
        cos, sin = self.cos, self.sin
        if length is not None and length > self.max_positions:
            if length > MOST_POSITIONS:
                raise ValueError(
                    f"RotaryEmbedding: positions and length must stay below {MOST_POSITIONS}, "
                    f"which float32 tells apart, got a length of {length}"
                )
            cos, sin = self.tables(length, device=q.device)
        return apply_rotary_qk(
            q,
            k,
            cos,
            sin,
            interleaved=self.interleaved,
            positions=positions,
            cu_seqlens=cu_seqlens,
        )

    def tables(
        self, length: int, *, device: torch.device | str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin) of positions 0 to length - 1, (length, dim/2) each, in float32.

        With "dynamic" scaling, those of a sequence of this length.
        """
        frequencies, factor = FREQUENCIES[self.scaling["rope_type"]](
            self.dim, self.base, self.scaling, self.max_positions, length
        )
        positions = torch.arange(length, device=device, dtype=torch.float32)
        angles = positions[:, None] * frequencies.to(positions.device)
        return angles.cos() * factor, angles.sin() * factor

    def extra_repr(self) -> str:
        """The arguments, for `print`."""
        text = f"{self.dim}, max_positions={self.max_positions}, base={self.base}"
        if self.scaling["rope_type"] != "default":
            text += f", scaling={self.scaling}"
        return text + (", interleaved=True" if self.interleaved else "")

    def _apply(self, fn: Callable, recurse: bool = True) -> "RotaryEmbedding":
        # Casting must not round the tables, and `to_empty` must not leave them unwritten.
        super()._apply(fn, recurse)
        self.cos, self.sin = self.tables(self.max_positions, device=self.cos.device)
        return self


def _check_scaling(scaling: Mapping[str, Any] | None, base: float) -> dict[str, Any]:
    scaling = dict(scaling or {})
    # Older configurations say "type".
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in NEEDED:
        raise ValueError(
            f"RotaryEmbedding: scaling's rope_type must be one of {', '.join(NEEDED)}, got {kind!r}"
        )
    missing = [name for name in NEEDED[kind] if scaling.get(name) is None]
    if missing:
        raise ValueError(f"RotaryEmbedding: {kind} scaling needs {', '.join(missing)}")
    known = {*NEEDED[kind], *OPTIONAL.get(kind, ()), *ELSEWHERE, *WITHOUT_EFFECT}
    if kind == "default" and scaling.get("factor") == 1.0:
        known.add("factor")
    unknown = {
        name
        for name, value in scaling.items()
        if name not in known and value is not None and value is not False
    }
    if unknown:
        raise ValueError(f"RotaryEmbedding: {kind} scaling has no {', '.join(sorted(unknown))}")
    if scaling.get("rope_theta", base) != base:
        raise ValueError(
            f"RotaryEmbedding: scaling's rope_theta is {scaling['rope_theta']}, base is {base}"
        )
    return {**scaling, "rope_type": kind}


def _plain(dim: int, base: float) -> torch.Tensor:
    # In float32 and in this order: the angles of Hugging Face's models, bit for bit.
    return 1.0 / base ** (_steps(dim) / dim)


def _steps(dim: int) -> torch.Tensor:
    """The first column of each pair; not on the default device, which may have no numbers."""
    return torch.arange(0, dim, 2, device="cpu").float()


def _default(dim: int, base: float, *_: Any) -> tuple[torch.Tensor, float]:
    return _plain(dim, base), 1.0


def _linear(dim: int, base: float, scaling: dict, *_: Any) -> tuple[torch.Tensor, float]:
    return _plain(dim, base) / scaling["factor"], 1.0


def _dynamic(
    dim: int, base: float, scaling: dict, max_positions: int, length: int
) -> tuple[torch.Tensor, float]:
    factor = scaling["factor"]
    stretch = factor * max(length, max_positions) / max_positions - (factor - 1)
    return _plain(dim, base * stretch ** (dim / (dim - 2))), 1.0


def _yarn(dim: int, base: float, scaling: dict, *_: Any) -> tuple[torch.Tensor, float]:
    factor = scaling["factor"]
    trained = scaling["original_max_position_embeddings"]

    def pair_that_turns(times: float) -> float:
        """The pair of columns that turns so many times over the trained length."""
        return dim * math.log(trained / (times * 2 * math.pi)) / (2 * math.log(base))

    low = pair_that_turns(scaling.get("beta_fast") or 32)
    high = pair_that_turns(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    # 0 for pairs that turn often and keep their frequency, 1 for those that are slowed down.
    slowed = ((_steps(dim) / 2 - low) / (high - low)).clamp(0, 1)
    wavelengths = base ** (_steps(dim) / dim)
    kept = 1 - slowed
    frequencies = 1.0 / (factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept
    return frequencies, _yarn_attention_factor(scaling)


def _yarn_attention_factor(scaling: dict) -> float:
    """What cos and sin are multiplied by, which sharpens the attention."""

    def of(mscale: float) -> float:
        return 1.0 if scaling["factor"] <= 1 else 0.1 * mscale * math.log(scaling["factor"]) + 1.0

    if scaling.get("attention_factor") is not None:
        return scaling["attention_factor"]
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return of(scaling["mscale"]) / of(scaling["mscale_all_dim"])
    return of(1.0)


def _llama3(dim: int, base: float, scaling: dict, *_: Any) -> tuple[torch.Tensor, float]:
    frequencies = _plain(dim, base)
    factor, trained = scaling["factor"], scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelengths = 2 * math.pi / frequencies
    slowed = torch.where(wavelengths > trained / low, frequencies / factor, frequencies)
    share = (trained / wavelengths - low) / (high - low)
    between = (1 - share) * slowed / factor + share * slowed
    in_between = (wavelengths >= trained / high) & (wavelengths <= trained / low)
    return torch.where(in_between, between, slowed), 1.0


FREQUENCIES: dict[str, Callable[..., tuple[torch.Tensor, float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
}
"""(dim, base, scaling, max_positions, length) -> the angle a position, (dim/2,), and a factor."""
