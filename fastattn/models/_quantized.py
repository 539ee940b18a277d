"""Weights that a checkpoint has in fp8 or mxfp4, as numbers of 16 or 32 bits.

fp8 (DeepSeek-V3, Qwen3): a weight (..., N, K) in float8_e4m3fn, and beside it `<name>_scale_inv`
with a number for each block of it, (..., ceil(N / 128), ceil(K / 128)), or with one for all:

    w[n, k] = weight[n, k] * scale_inv[n // 128, k // 128]

mxfp4 (gpt-oss): `<name>_blocks` (E, N, G, 16) in bytes of two numbers of four bits, the lower four
the first, and `<name>_scales` (E, N, G), the exponents of two by which groups of 32 are multiplied:

    w[e, 32 g + i, n] = FP4[number i of blocks[e, n, g]] * 2^(scales[e, n, g] - 127)

Source: DeepSeek-AI, "DeepSeek-V3 Technical Report" (2024), 3.3; Open Compute Project, "OCP
Microscaling Formats (MX) Specification" (2023).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ._checkpoint import Checkpoint, CheckpointError, Packed
from ._config import ConfigError
from ._states import choose_dtype

logger = logging.getLogger("fastattn")

KEY = "quantization_config"

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The numbers of four bits, without their sign, which is the highest bit."""

GROUP = 32
"""Numbers of mxfp4 that share a scale."""

Shape = tuple[int, ...]
Found = dict[str, tuple[Packed, Shape]]
"""Weights that other tensors of a checkpoint stand for, and their shapes."""


def plan_unpacking(
    values: dict[str, Any], ignore: Sequence[str], dtype: torch.dtype | None
) -> tuple[dict[str, Any], Callable[[Checkpoint], Checkpoint]]:
    """A configuration as if no weights were quantized, and what makes its checkpoint so.

    That raises CheckpointError if what stands for a weight has other shapes than it must. Weights
    are restored when they are read, in the dtype asked for, or else in that of the configuration,
    or in bfloat16.

    Args:
        values: the content of a config.json.
        ignore: keys of it that do not count.
        dtype: what weights are to be in.

    Raises:
        ConfigError: weights are quantized in a way that is not known here.
    """
    says = values.get(KEY)
    if not says or KEY in ([ignore] if isinstance(ignore, str) else ignore):
        return values, lambda stored: stored
    dtype = dtype or choose_dtype("auto", values) or torch.bfloat16
    if says.get("quant_method") == "mxfp4":
        find = partial(_find_mxfp4, dtype=dtype)
    elif _is_fp8(says):
        find = partial(_find_fp8, dtype=dtype, block=says["weight_block_size"])
    else:
        raise ConfigError(
            f"{KEY}={says!r}: weights are read in 16 or 32 bits, in mxfp4, and in fp8 (e4m3) with "
            "scales of blocks and activations scaled as they come; convert others to bfloat16 first"
        )
    plain = {name: value for name, value in values.items() if name != KEY}
    return plain, lambda stored: _unpack(stored, find(stored))


def _unpack(stored: Checkpoint, found: Found) -> Checkpoint:
    """A checkpoint with the weights that were found in place of what they are made of."""
    logger.warning("%s: %d quantized weights are read in 16 or 32 bits", stored.folder, len(found))
    parts = {part for packed, _ in found.values() for part in packed.parts}
    files = {name: file for name, file in stored.files.items() if name not in parts}
    files |= {name: next(iter(packed.parts.values())) for name, (packed, _) in found.items()}
    shapes = {name: shape for name, shape in stored.shapes.items() if name not in parts}
    shapes |= {name: shape for name, (_, shape) in found.items()}
    packed = {name: packed for name, (packed, _) in found.items()}
    return replace(stored, files=files, shapes=shapes, packed=packed)


def restore_fp8(
    weight: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype, block: Sequence[int]
) -> torch.Tensor:
    """A weight (..., N, K) of its numbers in fp8 and of the scales of its blocks, rounded once.

    Raises:
        TypeError: the numbers are no float8_e4m3fn.
    """
    if weight.dtype != torch.float8_e4m3fn:
        raise TypeError(f"the weight must be float8_e4m3fn, got {weight.dtype}")
    scales = _powers(scales) if scales.dtype == torch.uint8 else scales.float()
    for dim, size in zip((-2, -1), block, strict=True):
        scales = scales.repeat_interleave(size, dim).narrow(dim, 0, weight.shape[dim])
    return (weight.float() * scales).to(dtype)


def restore_mxfp4(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A weight (E, 32 G, N) of its numbers in fp4 (E, N, G, 16) and of their scales (E, N, G).

    Raises:
        TypeError: they are no bytes.
    """
    for name, given in (("blocks", blocks), ("scales", scales)):
        if given.dtype != torch.uint8:
            raise TypeError(f"{name} must be uint8, got {given.dtype}")
    experts, rows, groups, _ = blocks.shape
    table = torch.tensor([*FP4, *(-x for x in FP4)], device=blocks.device)
    weight = torch.empty((experts, groups * GROUP, rows), dtype=dtype, device=blocks.device)
    # One expert at a time, for its numbers in float32 are eight times as large as in fp4.
    for own, packed, exponents in zip(weight, blocks, scales, strict=True):
        places = torch.stack((packed & 15, packed >> 4), -1).int()
        numbers = table[places].flatten(-2) * _powers(exponents)[..., None]
        own.copy_(numbers.flatten(1).T)
    return weight


def _powers(scales: torch.Tensor) -> torch.Tensor:
    """2^(scale - 127) in float32, of bytes that are exponents; 255 is NaN."""
    return scales.view(torch.float8_e8m0fnu).float()


def _is_fp8(says: Mapping[str, Any]) -> bool:
    """Whether weights are in fp8 as it is read here."""
    block = says.get("weight_block_size") or ()
    return (
        says.get("quant_method") == "fp8"
        and says.get("fmt", "e4m3") == "e4m3"
        and says.get("activation_scheme", "dynamic") == "dynamic"
        and len(block) == 2
        and min(block) > 0
    )


def _find_fp8(stored: Checkpoint, *, dtype: torch.dtype, block: Sequence[int]) -> Found:
    """Each weight beside which there are scales."""
    found: Found = {}
    for name, shape in stored.shapes.items():
        scales = f"{name}_scale_inv"
        if scales in stored.shapes:
            blocks = [-(-n // size) for n, size in zip(shape[-2:], block, strict=False)]
            _check(stored, scales, (*shape[:-2], *blocks))
            packed = _pack(stored, (name, scales), partial(restore_fp8, block=block), dtype)
            found[name] = packed, shape
    return found


def _find_mxfp4(stored: Checkpoint, *, dtype: torch.dtype) -> Found:
    """Each weight that blocks and scales stand for."""
    found: Found = {}
    for blocks, shape in stored.shapes.items():
        name = blocks.removesuffix("_blocks")
        scales = f"{name}_scales"
        if name != blocks and scales in stored.shapes:
            _check(stored, blocks, (*shape[:3], GROUP // 2))
            _check(stored, scales, shape[:3])
            packed = _pack(stored, (blocks, scales), restore_mxfp4, dtype)
            found[name] = packed, (shape[0], shape[2] * GROUP, shape[1])
    return found


def _pack(
    stored: Checkpoint, names: Sequence[str], restore: Callable[..., Any], dtype: torch.dtype
) -> Packed:
    return Packed({name: stored.files[name] for name in names}, restore, dtype)


def _check(stored: Checkpoint, name: str, wanted: Shape) -> None:
    if stored.shapes[name] != wanted:
        raise CheckpointError(
            f"{stored.files[name]}: {name} is {stored.shapes[name]}, and must be {wanted}"
        )
