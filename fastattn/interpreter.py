"""Where Triton's interpreter computes otherwise than a GPU, and how that is mended for checks."""

import functools
from typing import Any

from .ops.backends import INTERPRETED


@functools.cache
def round_to_bfloat16() -> None:
    """Make the interpreter, where it is on, round float32 to bfloat16 as a GPU does.

    It cuts off the last bits. That costs up to a whole unit in the last place instead of a half,
    and errors of one sign add up in whatever is summed from them.
    """
    if not INTERPRETED:
        return
    import numpy
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(data: Any, of: Any, to: Any, rounding_mode: Any) -> Any:
        if (of.name, to.name) != ("fp32", "bf16"):
            return convert(data, of, to, rounding_mode)
        # In one order whatever the strides were, as the interpreter's own bytes are.
        bits = numpy.ascontiguousarray(data).view(numpy.uint32)
        # To the nearest, and of two equally near ones to the even one. NaN stays NaN.
        nearest = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16
        return numpy.where(numpy.isnan(data), bits >> 16 | 0x40, nearest).astype(numpy.uint16)

    interpreter._convert_float = rounded
