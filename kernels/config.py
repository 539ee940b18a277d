"""Block sizes: which device this is, and what the rules of kernels that work on rows share.

Each rule stands beside its kernel. It is a pure function of feature sizes and of a `Target`, so a
test on any machine can ask what a GPU would get. Nothing is ever timed here.
"""

import functools
from dataclasses import dataclass

import torch

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


# The widest rows held in registers. Past it a forward spills, and so does a backward, which also
# holds dy and the sums of two gradients.
WIDEST_FORWARD_ROW = 16384
WIDEST_BACKWARD_ROW = 8192

# Elements of a tile of several short rows.
SHORT_ROWS_TILE = 1024
# Dropout draws the numbers of four columns at once, and a narrower tile would save nothing.
NARROWEST_TILE = 16
MOST_ROWS = 64

# Elements of a column tile of a wide row. Large, so that few rows are under way at once and the
# second read of a wide row finds it in L2: at 65,536 columns of 16 bits, two programs on each of
# 132 multiprocessors hold 34 MB of rows.
COLUMN_TILE = 8192
# Columns that a forward over logits takes in one step: two 128-bit loads of 16-bit data a thread.
LOGITS_TILE = 4096

# One 128-bit load of 16-bit data; with twice as many, kernels with dropout spill.
ELEMENTS_PER_THREAD = 8
MOST_THREADS = 1024


@dataclass(frozen=True)
class TileConfig:
    """How rows are cut into tiles of (block_m, block_n) elements."""

    block_m: int
    """Rows of a tile. More than one only where a whole row is short."""
    block_n: int
    """Columns of a tile, a power of two."""
    num_warps: int


@dataclass(frozen=True)
class RowConfig(TileConfig):
    """How a kernel that needs sums over its rows is cut: one program block_m rows."""

    whole_row: bool
    """Whether one tile spans all columns; otherwise a program loops over column tiles."""


def choose_width(cols: int) -> int:
    """Columns of a tile that spans a row."""
    return max(NARROWEST_TILE, 1 << (cols - 1).bit_length())


def choose_height(width: int, tile: int = SHORT_ROWS_TILE) -> int:
    """Rows of a tile of about so many elements."""
    return max(1, min(tile // width, MOST_ROWS))


def choose_warps(tile: int, target: Target) -> int:
    """Warps of a program that holds a tile in its registers."""
    warps = tile // (ELEMENTS_PER_THREAD * target.warp_size)
    return max(2, min(warps, MOST_THREADS // target.warp_size))


def cut_whole_rows(cols: int, target: Target) -> RowConfig:
    """The configuration of a kernel that holds its rows whole."""
    width = choose_width(cols)
    height = choose_height(width)
    return RowConfig(height, width, choose_warps(height * width, target), whole_row=True)
