"""The maximum, the sum of exponentials, and the mean below the maximum, of rows in one walk.

The rows are wider than the registers.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def lane_width(pointer):
    """How many neighbouring elements make a lane: as many as one 128-bit load takes."""
    return 128 // pointer.dtype.element_ty.primitive_bitwidth


@triton.jit
def accumulate_lanes(x, lane_max, lane_sum):
    """Take the tile x (BLOCK_M, LANES, LANE) into running maxima and sums (BLOCK_M, LANES).

    Each lane keeps a maximum of its own and its sum of exp(x - maximum). A lane is what one thread
    loads at once, so that no thread waits for another until `merge_lanes`.
    """
    new_max = tl.maximum(lane_max, tl.max(x, 2))
    # A lane that has seen nothing but -inf must not subtract it from itself.
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    lane_sum = lane_sum * tl.exp(lane_max - shift) + tl.sum(tl.exp(x - shift[:, :, None]), 2)
    return new_max, lane_sum


@triton.jit
def accumulate_moments(x, lane_max, lane_sum, lane_moment):
    """Take x into each lane's sum of exp(x - maximum) (maximum - x), of terms that are positive.

    Before `accumulate_lanes` takes it into lane_max and lane_sum. A lane's maximum that rises by d
    is farther by d from all that the lane has seen. What is endlessly far below counts nothing.
    """
    new_max = tl.maximum(lane_max, tl.max(x, 2))
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    rise = tl.where(lane_sum == 0.0, 0.0, shift - lane_max)
    below = tl.where(x == float("-inf"), 0.0, shift[:, :, None] - x)
    seen = (lane_moment + rise * lane_sum) * tl.exp(lane_max - shift)
    return seen + tl.sum(tl.exp(x - shift[:, :, None]) * below, 2)


@triton.jit
def merge_lanes(lane_max, lane_sum):
    """Each row's maximum, and its sum of exp(x - maximum), which is 0 where all x are -inf."""
    row_max = tl.max(lane_max, 1)  # (BLOCK_M,)
    shift = tl.where(row_max == float("-inf"), 0.0, row_max)
    return row_max, tl.sum(lane_sum * tl.exp(lane_max - shift[:, None]), 1)


@triton.jit
def merge_moments(lane_max, lane_sum, lane_moment):
    """Each row's sum of exp(x - maximum) (maximum - x)."""
    row_max = tl.max(lane_max, 1)  # (BLOCK_M,)
    shift = tl.where(row_max == float("-inf"), 0.0, row_max)
    rise = tl.where(lane_sum == 0.0, 0.0, shift[:, None] - lane_max)
    return tl.sum((lane_moment + rise * lane_sum) * tl.exp(lane_max - shift[:, None]), 1)
