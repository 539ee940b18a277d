"""Triton kernels that copy by TMA, by tensor maps of the host or of their own."""

import triton
import triton.language as tl


@triton.jit
def copy_kernel(source_desc, to_desc, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Copy the tile of this program."""
    place = [tl.program_id(0) * ROWS, tl.program_id(1) * COLUMNS]
    to_desc.store(place, source_desc.load(place))


@triton.jit
def multiply_tiles(
    a_desc, b_desc, c_desc, depth, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr
):
    """The tile of c = a b of this program."""
    row, column = tl.program_id(0) * M, tl.program_id(1) * N
    total = tl.zeros((M, N), tl.float32)
    for k in range(0, depth, K):
        total = tl.dot(a_desc.load([row, k]), b_desc.load([k, column]), total)
    c_desc.store([row, column], total.to(tl.bfloat16))


@triton.jit
def matmul_kernel(a_desc, b_desc, c_desc, depth, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """Multiply by the tensor maps of the host."""
    multiply_tiles(a_desc, b_desc, c_desc, depth, M, N, K)


@triton.jit
def matmul_by_own_maps_kernel(
    a_ptr, b_ptr, c_ptr, rows, columns, depth, a_stride, b_stride, c_stride,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Multiply by tensor maps that the kernel makes itself."""
    a_desc = tl.make_tensor_descriptor(a_ptr, [rows, depth], [a_stride, 1], [M, K])
    b_desc = tl.make_tensor_descriptor(b_ptr, [depth, columns], [b_stride, 1], [K, N])
    c_desc = tl.make_tensor_descriptor(c_ptr, [rows, columns], [c_stride, 1], [M, N])
    multiply_tiles(a_desc, b_desc, c_desc, depth, M, N, K)


@triton.jit
def specialised_matmul_kernel(
    a_ptr, b_ptr, c_ptr, rows, columns, depth,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Multiply in a loop whose warps Triton specialises."""
    a_desc = tl.make_tensor_descriptor(a_ptr, [rows, depth], [depth, 1], [M, K])
    b_desc = tl.make_tensor_descriptor(b_ptr, [depth, columns], [columns, 1], [K, N])
    c_desc = tl.make_tensor_descriptor(c_ptr, [rows, columns], [columns, 1], [M, N])
    row, column = tl.program_id(0) * M, tl.program_id(1) * N
    total = tl.zeros((M, N), tl.float32)
    for k in tl.range(0, depth, K, warp_specialize=True):
        total = tl.dot(a_desc.load([row, k]), b_desc.load([k, column]), total)
    c_desc.store([row, column], total.to(tl.bfloat16))
