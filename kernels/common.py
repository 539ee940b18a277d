"""Small device functions that several kernels share."""

import triton
import triton.language as tl

from .config import INTERPRETED


@triton.constexpr_function
def accumulator_dtype(pointer):
    """The dtype that what `pointer` points to is computed in: float64 for float64, else float32."""
    return tl.float64 if pointer.dtype.element_ty == tl.float64 else tl.float32


@triton.jit
def divisible(size, DIVISOR: tl.constexpr):
    """`size` unchanged, in a form that shows the compiler that DIVISOR divides it.

    Triton itself looks for 16 alone, but 8 elements of 16 bits already make a 128-bit load.
    """
    return size // DIVISOR * DIVISOR


@triton.jit
def dropout_keep(seed, row, first_col, threshold, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which elements of a tile dropout keeps: (BLOCK_M, BLOCK_N) booleans.

    The decision depends on the seed and on an element's logical place alone, never on the tile, so
    that a backward kernel may cut its tiles differently. Philox 4x32-10 with the 64-bit `seed` as
    its key and (column // 4, 0, row, row >> 32) as its counter gives the 32-bit words of four
    neighbouring columns; an element is kept where the upper 31 bits of its word reach `threshold`.

    `row` is a (BLOCK_M,) int64 tensor, `first_col` a multiple of 4, BLOCK_N at least 4.
    """
    quad = (first_col // 4 + tl.arange(0, BLOCK_N // 4)).to(tl.int32)  # (BLOCK_N // 4,)
    # Every counter word has the tile's shape, for Philox computes them element by element.
    zero = tl.zeros((BLOCK_M, BLOCK_N // 4), tl.int32)
    word_0, word_1, word_2, word_3 = tl.philox(
        seed,
        zero + quad[None, :],
        zero,
        zero + row.to(tl.int32)[:, None],
        zero + (row >> 32).to(tl.int32)[:, None],
    )
    words = tl.join(tl.join(word_0, word_2), tl.join(word_1, word_3))
    words = tl.reshape(words, (BLOCK_M, BLOCK_N))
    return (words >> 1).to(tl.int32) >= threshold


@triton.jit
def tanh(x):
    """tanh(x) to full precision, and its derivative."""
    magnitude = tl.abs(x)
    e = tl.exp(-2.0 * magnitude)
    result = (1.0 - e) / (1.0 + e)
    if x.dtype != tl.float64:
        # Near zero 1 - e cancels, which float32 cannot afford: there, an odd polynomial of least
        # error on [0, 0.625].
        square = magnitude * magnitude
        series = tl.fma(square, -5.70498872745e-3, 2.06390887954e-2)
        series = tl.fma(series, square, -5.37397155531e-2)
        series = tl.fma(series, square, 1.33314422036e-1)
        series = tl.fma(series, square, -3.33332819422e-1)
        result = tl.where(magnitude < 0.625, magnitude + magnitude * square * series, result)
    else:
        # The first terms of its series.
        square = magnitude * magnitude
        series = square * (62.0 / 2835.0 - square * (1382.0 / 155925.0)) - 17.0 / 315.0
        series = square * (square * series + 2.0 / 15.0) - 1.0 / 3.0
        result = tl.where(magnitude < 0.015625, magnitude + magnitude * square * series, result)
    slope = 4.0 * e / ((1.0 + e) * (1.0 + e))
    return tl.where(x < 0.0, -result, result), slope


# A constexpr, because kernels read it.
UPCAST = tl.constexpr(INTERPRETED)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b in the dtype of acc, by tensor cores.

    PRECISION is how float32 operands multiply: "ieee" or "tf32". Triton's interpreter gets products
    of bfloat16 wrong, so there operands are converted first, which loses nothing.
    """
    if UPCAST:
        a = a.to(acc.dtype)
        b = b.to(acc.dtype)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)
