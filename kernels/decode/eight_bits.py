"""Numbers of 8 bits as caches hold them: float8 (e4m3) by its bits, on any device.

e4m3 has a sign, four bits of exponent (bias 7) and three of mantissa, no infinity, and NaN where
all bits but the sign's are set; its largest number is 448.
"""

import triton
import triton.language as tl

LARGEST = tl.constexpr(448.0)


@triton.jit
def decode_e4m3(bits):
    """The numbers of some bits (uint8), in float32."""
    wide = bits.to(tl.int32)
    # As the bits of a float32 whose exponent is 120 too small, which also holds for subnormals.
    number = (((wide & 0x80) << 24) | ((wide & 0x7F) << 20)).to(tl.float32, bitcast=True)
    return tl.where((wide & 0x7F) == 0x7F, float("nan"), number * 1.329227995784916e36)


@triton.jit
def encode_e4m3(x):
    """The bits (uint8) of the nearest numbers, ties to even; beyond the largest there is it."""
    x = x.to(tl.float32)
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    magnitude = tl.minimum(tl.abs(x), LARGEST)
    # Below 2^-6 numbers are multiples of 2^-9: so they are after 2^14 was added and taken away.
    small = ((magnitude + 16384.0).to(tl.int32, bitcast=True)) & 0xF
    # Above, the lowest 20 bits of the mantissa are rounded away, and the exponent gets its bias.
    whole = magnitude.to(tl.int32, bitcast=True)
    rounded = (whole + 0x7FFFF + ((whole >> 20) & 1)) >> 20
    bits = tl.where(magnitude < 0.015625, small, rounded - (120 << 3))
    return tl.where(x != x, sign | 0x7F, sign | bits).to(tl.uint8)
