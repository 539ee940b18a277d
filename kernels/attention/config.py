"""Block sizes of attention, by what was compiled for each kind of device: the rules.

The tiles that they choose from stand in tables.py. What was measured on a device goes before them,
see tuning.py.
"""

import functools
from dataclasses import dataclass

import torch
import triton

from ..config import Target, cdiv
from ..tuning import choose
from .tables import TERM_CLASSES, TILES

NARROWEST = 16
"""Columns of a head, queries and keys that a product needs at least."""


@dataclass(frozen=True)
class AttentionConfig:
    """How one of attention's kernels is cut."""

    block_m: int
    """Queries of a tile."""
    block_n: int
    """Keys of a tile."""
    num_warps: int
    num_stages: int
    one_loop: bool = False
    """Whether the gradients of k and v come without a loop of their own for the queries that see
    all of a tile. Two loops share the registers of one."""
    reloads: bool = False
    """Whether a backward kernel loads its own tiles again in every step of its loop."""


@functools.cache
def head_chunks(dim: int) -> tuple[int, int]:
    """The widths of the one or two chunks, powers of two, that hold a head of `dim` columns.

    80 columns are held as 64 and 16. Where a second chunk would save nothing over one that is
    padded, as with 112, it is 0.
    """
    padded: int = max(NARROWEST, triton.next_power_of_2(dim))
    width = padded // 2
    tail: int = max(NARROWEST, triton.next_power_of_2(dim - width))
    return (width, tail) if width >= NARROWEST and width + tail < padded else (padded, 0)


SHARED_MEMORY_OF_SM_80 = 166_912
"""Bytes that a block may use there; sm_86, sm_89 and sm_120 have 101,376 and the same products. As
code for sm_120 takes more registers, it has tiles of its own."""

WIDEST_OF_TWO_LOOPS = {"plain": 128, "index": 64, "tensor": 0}
"""The widest heads for which the gradients of k and v take two loops, by the class of terms."""

WIDEST_HELD = 80
"""The widest heads whose tiles registers hold on RDNA, where each is there twice as an operand of
the matrix units. Wider ones are loaded again in each step."""

INTERPRETED = {
    # Small, so that short sequences have several blocks there, and unequal, so that none passes for
    # another.
    "attention_forward": AttentionConfig(32, 16, 4, 1),
    "attention_keys_backward": AttentionConfig(16, 32, 4, 1),
    "attention_queries_backward": AttentionConfig(16, 32, 4, 1),
    "attention_bias_backward": AttentionConfig(32, 16, 4, 1),
}


def attention_forward_config(
    key_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    precision: str,
    term_class: str,
    target: Target,
) -> AttentionConfig:
    """The configuration of the forward.

    Args:
        key_dim: the columns of a head of q and k.
        value_dim: those of v.
        dtype: the dtype of q, k and v.
        precision: "ieee" or "tf32", for float32.
        term_class: one of TERM_CLASSES.
        target: the device.

    Raises:
        ValueError: there are no tiles for such wide heads.
    """
    return _choose("attention_forward", key_dim, value_dim, dtype, precision, term_class, target)


def attention_keys_backward_config(
    key_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    precision: str,
    term_class: str,
    target: Target,
) -> AttentionConfig:
    """The configuration of the gradients of k and v, with arguments as the forward's."""
    return _choose(
        "attention_keys_backward", key_dim, value_dim, dtype, precision, term_class, target
    )


def attention_queries_backward_config(
    key_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    precision: str,
    term_class: str,
    target: Target,
) -> AttentionConfig:
    """The configuration of the gradient of q, with arguments as the forward's."""
    return _choose(
        "attention_queries_backward", key_dim, value_dim, dtype, precision, term_class, target
    )


def attention_bias_backward_config(
    key_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    precision: str,
    term_class: str,
    target: Target,
) -> AttentionConfig:
    """The configuration of a bias's gradient, with arguments as the forward's."""
    return _choose(
        "attention_bias_backward", key_dim, value_dim, dtype, precision, term_class, target
    )


def _choose(
    kernel: str,
    key_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    precision: str,
    term_class: str,
    target: Target,
) -> AttentionConfig:
    return choose(
        kernel,
        _rules[kernel],
        target,
        key_dim=key_dim,
        value_dim=value_dim,
        operands="16 bits" if dtype.itemsize == 2 else precision,
        term_class=term_class,
    )


def attention_rule(
    target: Target, *, kernel: str, key_dim: int, value_dim: int, operands: str, term_class: str
) -> AttentionConfig:
    """The configuration of one of the kernels where no table has an entry; see `choose`."""
    if target.backend == "interpreter":
        return INTERPRETED[kernel]
    of_keys = kernel == "attention_keys_backward"
    width = max(key_dim, value_dim)
    if of_keys:
        # A program there accumulates as many columns as q and v have together.
        width = cdiv(key_dim + value_dim, 2)
    table = TILES[kernel][find_kind(target) if operands == "16 bits" else operands]
    if width > max(table):
        raise ValueError(f"attention takes heads of at most {max(table)} columns, not of {width}")
    limit = min(limit for limit in table if limit >= width)
    tile = table[limit][TERM_CLASSES.index(term_class)]
    return AttentionConfig(
        *tile,
        one_loop=of_keys and width > WIDEST_OF_TWO_LOOPS[term_class],
        reloads=find_kind(target) == "gfx11" and width > WIDEST_HELD,
    )


_rules = {kernel: functools.partial(attention_rule, kernel=kernel) for kernel in TILES}


def find_kind(target: Target) -> str:
    """The tables of a device: by how its tensor cores get their operands."""
    if target.backend == "hip":
        return "gfx9" if target.warp_size == 64 else "gfx11"
    arch = int(target.arch)
    if arch >= 90:
        return "sm_90" if arch < 100 else "sm_100" if arch < 120 else "sm_120"
    return "sm_80" if target.shared_memory >= SHARED_MEMORY_OF_SM_80 else "sm_86"
