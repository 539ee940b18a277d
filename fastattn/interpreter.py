"""Where Triton's interpreter computes otherwise than a GPU, and how that is mended for checks."""

import functools
from collections.abc import Callable
from typing import Any

import torch

from .kernels.private import replace_float_conversion
from .ops.core.backends import INTERPRETED


@functools.cache
def round_to_bfloat16() -> None:
    """Make the interpreter, where it is on, round float32 to bfloat16 as a GPU does.

    It cuts off the last bits. That costs up to a whole unit in the last place instead of a half,
    and errors of one sign add up in whatever is summed from them.
    """
    if not INTERPRETED:
        return

    def mend(convert: Callable[..., Any]) -> Callable[..., Any]:
        def round_float(data: Any, of: Any, to: Any, rounding_mode: Any) -> Any:
            if (of.name, to.name) != ("fp32", "bf16"):
                return convert(data, of, to, rounding_mode)
            # In one order whatever the strides were, as the interpreter's own bytes are.
            numbers = torch.from_numpy(data.astype("float32", order="C"))
            return numbers.bfloat16().view(torch.int16).numpy().view("uint16")

        return round_float

    replace_float_conversion(mend)
