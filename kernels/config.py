"""Block sizes: which device this is, and the configuration that each kernel is launched with there.

Every rule is a pure function of feature sizes and of a `Target`, so a test on any machine can ask
what a GPU would get. Nothing is ever timed here.
"""

import functools
from dataclasses import dataclass

import torch
import triton

from .private import is_interpreting, triton_driver


@dataclass(frozen=True, eq=False)
class Target:
    """What a configuration may depend on: the architecture and its limits.

    There is one object a device, compared by identity: rules are cached by it at every launch.
    """

    backend: str
    """"cuda", "hip", or "interpreter"."""
    arch: int | str
    """Compute capability times ten on NVIDIA (90), the gfx name on AMD ("gfx942")."""
    warp_size: int
    multiprocessors: int
    shared_memory: int
    """Bytes of shared memory that one block may use."""


INTERPRETED = is_interpreting()

# Kernels that walk their rows in a fixed number of programs still walk several rows each here.
INTERPRETER = Target("interpreter", 0, 32, multiprocessors=2, shared_memory=1 << 20)


@functools.cache
def device_target(device_index: int | None) -> Target:
    """The target behind a GPU of this machine, or the interpreter's, whatever the index."""
    if INTERPRETED:
        return INTERPRETER
    driver = triton_driver()
    target = driver.get_current_target()
    properties = driver.utils.get_device_properties(device_index)
    return Target(
        target.backend,
        target.arch,
        target.warp_size,
        properties["multiprocessor_count"],
        properties["max_shared_mem"],
    )


def find_target(tensor: torch.Tensor) -> Target:
    """The target that a kernel on `tensor` runs on."""
    return device_target(tensor.get_device())


INVARIANT_ROWS = 1024
"""How many rows a batch-invariant product is cut for, whatever it has. Cut for fewer, its tiles
would be too small for many rows to be fast; for more, too large for few rows to fill the device."""


def cdiv(numerator: int, denominator: int) -> int:
    """The quotient rounded up; `triton.cdiv` takes microseconds on the host."""
    return -(-numerator // denominator)


@dataclass(frozen=True)
class NormForwardConfig:
    """How a norm's forward is cut: one program a tile of (block_m, block_n) elements."""

    block_m: int
    """Rows of a tile. More than one only where a whole row is short."""
    block_n: int
    """Columns of a tile, a power of two."""
    num_warps: int
    whole_row: bool
    """Whether one tile spans all columns; otherwise a program loops over column tiles."""


@dataclass(frozen=True)
class NormBackwardConfig:
    """How a norm's backward is cut: input gradients in tiles of (block_m, block_n) elements."""

    block_m: int
    block_n: int
    num_warps: int
    whole_row: bool
    most_programs: int
    """How many programs at most share the rows and write partial sums of the weight's gradient."""
    weight_block_m: int = 0
    """Rows of a tile where the weight's gradient has a kernel of its own (not whole_row)."""
    weight_block_n: int = 0


# The widest rows held in registers. Past it a forward spills, and so does a backward, which also
# holds dy and the sums of two gradients.
WIDEST_FORWARD_ROW = 16384
WIDEST_BACKWARD_ROW = 8192

# Elements of a tile of several short rows, and of a column tile of a wide row.
SHORT_ROWS_TILE = 1024
# Large, so that few rows are under way at once and the second read of a wide row finds it in L2: at
# 65,536 columns of 16 bits, two programs on each of 132 multiprocessors hold 34 MB of rows.
COLUMN_TILE = 8192

# Dropout draws the numbers of four columns at once, and a narrower tile would save nothing.
NARROWEST_TILE = 16
MOST_ROWS = 64

# One 128-bit load of 16-bit data; with twice as many, kernels with dropout spill.
ELEMENTS_PER_THREAD = 8
MOST_THREADS = 1024


@functools.cache
def norm_forward_config(cols: int, target: Target) -> NormForwardConfig:
    """The configuration of a norm's forward: a function of the row's width and the device."""
    width = max(NARROWEST_TILE, triton.next_power_of_2(cols))
    if width > WIDEST_FORWARD_ROW:
        return NormForwardConfig(1, COLUMN_TILE, _warps(COLUMN_TILE, target), whole_row=False)
    block_m = max(1, min(SHORT_ROWS_TILE // width, MOST_ROWS))
    return NormForwardConfig(block_m, width, _warps(block_m * width, target), whole_row=True)


@functools.cache
def norm_backward_config(cols: int, target: Target) -> NormBackwardConfig:
    """The configuration of a norm's backward.

    Tiles depend on the row's width and the device. The number of programs decides nothing but the
    order in which the gradients of weight and bias are summed.
    """
    width = max(NARROWEST_TILE, triton.next_power_of_2(cols))
    if width > WIDEST_BACKWARD_ROW:
        weight_block_n = 512
        return NormBackwardConfig(
            block_m=1,
            block_n=COLUMN_TILE,
            num_warps=_warps(COLUMN_TILE, target),
            whole_row=False,
            # Enough programs in all to give every multiprocessor several.
            most_programs=max(1, 8 * target.multiprocessors * weight_block_n // cols),
            weight_block_m=4,
            weight_block_n=weight_block_n,
        )
    block_m = max(1, min(SHORT_ROWS_TILE // width, MOST_ROWS))
    num_warps = _warps(block_m * width, target)
    # As many programs as are resident at once: more would only make more partial sums.
    resident = max(1, MOST_THREADS // (num_warps * target.warp_size))
    return NormBackwardConfig(block_m, width, num_warps, True, resident * target.multiprocessors)


@dataclass(frozen=True)
class TileConfig:
    """How an element-wise kernel is cut: one program a tile of (block_m, block_n) elements."""

    block_m: int
    block_n: int
    num_warps: int


@functools.cache
def elementwise_config(cols: int, target: Target) -> TileConfig:
    """The configuration of an element-wise kernel on rows of `cols` elements."""
    block_n = max(NARROWEST_TILE, min(triton.next_power_of_2(cols), SHORT_ROWS_TILE))
    block_m = min(SHORT_ROWS_TILE // block_n, MOST_ROWS)
    return TileConfig(block_m, block_n, _warps(block_m * block_n, target))


# Columns that a forward over logits takes in one step: two 128-bit loads of 16-bit data a thread.
LOGITS_TILE = 4096


@functools.cache
def cross_entropy_forward_config(cols: int, target: Target) -> TileConfig:
    """The configuration of cross entropy's forward: a program loops over tiles of its rows."""
    block_n = max(NARROWEST_TILE, min(triton.next_power_of_2(cols), LOGITS_TILE))
    block_m = max(1, min(SHORT_ROWS_TILE // block_n, MOST_ROWS))
    return TileConfig(block_m, block_n, _warps(block_m * block_n // 2, target))


@functools.cache
def cross_entropy_backward_config(cols: int, target: Target) -> TileConfig:
    """The configuration of cross entropy's backward, which is element-wise."""
    block_n = max(NARROWEST_TILE, min(triton.next_power_of_2(cols), COLUMN_TILE))
    block_m = min(COLUMN_TILE // block_n, MOST_ROWS)
    # Twice the elements of other kernels a thread, for the numbers that it reads of each row.
    return TileConfig(block_m, block_n, _warps(block_m * block_n // 2, target))


@dataclass(frozen=True)
class RotaryConfig:
    """How a rotation is cut: one program block_m tokens, block_n pairs of columns, some heads."""

    block_m: int
    block_n: int
    heads: int
    """Heads that a program turns one after another by the angles it has loaded once."""
    num_warps: int


@functools.cache
def rotary_config(half: int, target: Target) -> RotaryConfig:
    """The configuration of a rotation of `half` pairs of columns."""
    block_n = max(NARROWEST_TILE // 2, triton.next_power_of_2(half))
    block_m = max(1, min(SHORT_ROWS_TILE // block_n, MOST_ROWS))
    # With eight heads, float32 tables are an eighth of what a program reads and writes in 16 bits.
    # More heads would leave few programs where sequences are short.
    return RotaryConfig(block_m, block_n, 8, _warps(block_m * block_n, target))


@dataclass(frozen=True)
class SoftmaxConfig(TileConfig):
    """How softmax is cut: one program block_m rows."""

    whole_row: bool
    """Whether one tile spans all columns; otherwise a program loops over column tiles."""


@functools.cache
def softmax_forward_config(cols: int, target: Target) -> SoftmaxConfig:
    """The configuration of softmax and log_softmax."""
    return _softmax_config(cols, WIDEST_FORWARD_ROW, target)


@functools.cache
def softmax_backward_config(cols: int, target: Target) -> SoftmaxConfig:
    """The configuration of their backward, which holds two tensors."""
    return _softmax_config(cols, WIDEST_BACKWARD_ROW, target)


def _softmax_config(cols: int, widest_row: int, target: Target) -> SoftmaxConfig:
    width = max(NARROWEST_TILE, triton.next_power_of_2(cols))
    if width > widest_row:
        return SoftmaxConfig(1, LOGITS_TILE, _warps(LOGITS_TILE // 2, target), whole_row=False)
    block_m = max(1, min(SHORT_ROWS_TILE // width, MOST_ROWS))
    return SoftmaxConfig(block_m, width, _warps(block_m * width, target), whole_row=True)


def _warps(tile: int, target: Target) -> int:
    """Warps of a program that holds a tile in its registers."""
    warps = tile // (ELEMENTS_PER_THREAD * target.warp_size)
    return max(2, min(warps, MOST_THREADS // target.warp_size))
