r"""Grouped linear layers: each row times the weight of its expert, y_r = x_r W_e^T + b_e.

x is (M, K), its rows sorted by expert (see groups.py), weight (E, N, K) and bias (E, N). Rows of no
expert give 0. With an index, row r of the product is row index[r] of x, which then has any number
of rows.

The gradient of x is a product of the same kernel with the weights' transposes; those of the
weights are sums over the rows of each expert, in their order (grouped_gradients.py):

    dx_r = dy_r W_e,    dW_e = sum_r dy_r^T x_r,    db_e = sum_r dy_r

Products are summed in float32 (float64 for float64), and rounded once.
"""

import torch
import triton
import triton.language as tl

from ..common import divisible
from ..config import cdiv, find_target
from ..launch import common_divisor, flatten_rows, launchable
from ..matmul.config import block_k_of_single_elements, loads_single_elements
from ..matmul.operands import Matrices, neighbours, restore_matrices, view_matrices
from ..matmul.tiles import FAR, load_bias, make_cut, slice_columns, store_tile, sum_products
from ..structures import Rows, make_rows, restore_stride
from .config import ExpertsConfig, experts_config
from .groups import choose_group, gather_rows, most_tiles


@triton.jit
def slice_expert(weight, expert, experts, tile, CUT: tl.constexpr):
    """What a tile needs of an expert's weight; of the last one for rows of none."""
    own = tl.minimum(expert, experts - 1).to(tl.int64)
    pointer = weight.pointer + own * weight.stride_outer
    return slice_columns(pointer, weight.stride_row, weight.stride_col, tile, CUT)


@launchable
@triton.jit(do_not_specialize=["rows", "tiles_m"])
def grouped_linear_kernel(
    x_view: Rows,
    weight_view: Matrices,
    bias_ptr,
    index_ptr,
    offsets_ptr,
    y_ptr,
    rows,
    tiles_m,
    experts,
    n,
    k,
    FILL: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    EXPERTS: tl.constexpr,
    DIVISOR: tl.constexpr,
    CUT: tl.constexpr,
):
    """One program a tile (BLOCK_M, BLOCK_N) of one expert's rows. weight is (E, K, N).

    FILL: rows of no expert get 0; otherwise they are left as they are.
    """
    n = divisible(n, DIVISOR)
    group, tile = choose_group(offsets_ptr, rows, experts, tiles_m, n, EXPERTS, CUT)
    if group.expert < experts + FILL:
        weight = restore_matrices(weight_view, TRANSPOSED, DIVISOR)
        stride_xm = divisible(restore_stride(x_view.stride), DIVISOR)
        x = gather_rows(x_view.pointer, stride_xm, index_ptr, tile, CUT)
        columns = slice_expert(weight, group.expert, experts, tile, CUT)
        # Rows of no expert sum nothing.
        has_expert = group.expert < experts
        length = divisible(tl.where(has_expert, k, 0), DIVISOR)
        acc = sum_products(x, columns, None, length, CUT)
        if bias_ptr is not None:
            if has_expert:
                acc += load_bias(bias_ptr + group.expert.to(tl.int64) * n, tile, CUT.block_n).to(
                    acc.dtype
                )
        store_tile(y_ptr, n, tile, acc, CUT.far_apart)


def grouped_linear_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    offsets: torch.Tensor,
    bias: torch.Tensor | None,
    index: torch.Tensor | None,
    fill: int,
    tf32: int,
    batch_invariant: bool,
    config: ExpertsConfig | None = None,
) -> torch.Tensor:
    """Launch y (M, N): x (M, K), or with an index of M entries any rows; weight (E, N, K).

    With `fill` rows of no expert are 0, without they are not written. `config` is what is used
    instead of what the rule or a table says.
    """
    experts, n, k = weight.shape
    rows = x.shape[0] if index is None else index.shape[0]
    y = torch.empty(rows, n, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    target, dtype, precision = find_target(x), str(x.dtype)[6:], "tf32" if tf32 else "ieee"
    sizes = (rows, experts, n, k, dtype, precision, target)
    config = config or experts_config("grouped_linear", *sizes, batch_invariant=batch_invariant)
    x, stride_xm = flatten_rows(x, k)
    weight, stride_wk, stride_wn, unit = neighbours(weight.mT, "k", "n")
    stride_we = weight.stride(0)
    strides = (stride_xm, stride_we, stride_wn if unit == "k" else stride_wk, n)
    divisor = common_divisor(k, *strides)
    block_m, block_n, block_k = config.block_m, config.block_n, config.block_k
    if not batch_invariant and loads_single_elements(divisor, x.element_size(), target):
        block_k = block_k_of_single_elements(block_m + block_n, block_k, config.num_warps, target)
    reach = max(n, stride_xm, stride_wk, stride_wn) * max(block_m, block_n, block_k)
    blocks = (block_m, block_n, block_k, config.group_m)
    tiles_m = most_tiles(rows, experts, block_m)
    grouped_linear_kernel.launch(
        (tiles_m * cdiv(n, block_n),),
        x_view=make_rows(x, stride_xm),
        weight_view=view_matrices(weight, stride_we, 0, stride_wk, stride_wn),
        bias_ptr=None if bias is None else bias.contiguous(),
        index_ptr=index,
        offsets_ptr=offsets.contiguous(),
        y_ptr=y,
        rows=rows,
        tiles_m=tiles_m,
        experts=experts,
        n=n,
        k=k,
        FILL=int(fill),
        TRANSPOSED=unit == "k",
        EXPERTS=triton.next_power_of_2(experts + 1),
        DIVISOR=divisor,
        CUT=make_cut(*blocks, precision, k % block_k != 0, reach >= FAR),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return y
