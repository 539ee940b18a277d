"""A warp-specialised attention forward in Gluon, small: a kernel to try the machine on.

One warp (the producer) copies Q, K and V to a ring of buffers in shared memory; two warpgroups (the
consumers) have 64 rows of Q each and multiply. Each buffer has two barriers: `ready` is completed
by the bytes that arrive, `empty` by the consumers that have done with it. K is copied one block
ahead of V, for that is the order in which consumers need them.
"""

# The type of a jitted function is that of its Python text, to which Gluon's operators are unknown.
# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# pyright: reportAssignmentType=false

from __future__ import annotations

import math

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

ROWS = gl.constexpr(64)
"""Rows of Q for each consumer."""


@gluon.jit
def copy_block(desc, bufs, ready, empty, row, block, BLOCK: gl.constexpr, STAGES: gl.constexpr):
    stage = block % STAGES
    phase = (block // STAGES) & 1
    mbarrier.wait(empty.index(stage), phase ^ 1)
    mbarrier.expect(ready.index(stage), desc.block_type.nbytes)
    place = [row + block * BLOCK, 0]
    tma.async_copy_global_to_shared(desc, place, ready.index(stage), bufs.index(stage))


@gluon.jit
def produce(
    q_desc, k_desc, v_desc, q_bufs, k_bufs, v_bufs, q_ready, k_ready, k_empty, v_ready, v_empty,
    q_row, kv_row, blocks, BLOCK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    for number in gl.static_range(2):
        mbarrier.expect(q_ready.index(number), q_desc.block_type.nbytes)
        place = [q_row + ROWS * number, 0]
        tma.async_copy_global_to_shared(q_desc, place, q_ready.index(number), q_bufs.index(number))
    copy_block(k_desc, k_bufs, k_ready, k_empty, kv_row, 0, BLOCK, STAGES)
    for block in range(1, blocks):
        copy_block(k_desc, k_bufs, k_ready, k_empty, kv_row, block, BLOCK, STAGES)
        copy_block(v_desc, v_bufs, v_ready, v_empty, kv_row, block - 1, BLOCK, STAGES)
    copy_block(v_desc, v_bufs, v_ready, v_empty, kv_row, blocks - 1, BLOCK, STAGES)


@gluon.jit
def consume(
    q_bufs, k_bufs, v_bufs, q_ready, k_ready, k_empty, v_ready, v_empty,
    o_ptr, row, blocks, scale_log2,
    NUMBER: gl.constexpr, BLOCK: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=o_layout, k_width=2)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    zero = gl.zeros([ROWS, BLOCK], gl.float32, s_layout)
    acc = gl.zeros([ROWS, D], gl.float32, o_layout)
    q = q_bufs.index(NUMBER)
    mbarrier.wait(q_ready.index(NUMBER), 0)
    mbarrier.wait(k_ready.index(0), 0)
    s = warpgroup_mma(q, k_bufs.index(0).permute((1, 0)), zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=(s,))
    mbarrier.arrive(k_empty.index(0), count=1)
    high = gl.max(s, 1) * scale_log2
    p = gl.exp2(s * scale_log2 - high[:, None])
    total = gl.sum(p, 1)
    p16 = gl.convert_layout(p.to(gl.bfloat16), p_layout)
    for block in range(1, blocks):
        stage = block % STAGES
        phase = (block // STAGES) & 1
        v_stage = (block - 1) % STAGES
        v_phase = ((block - 1) // STAGES) & 1
        mbarrier.wait(k_ready.index(stage), phase)
        k = k_bufs.index(stage).permute((1, 0))
        s_running = warpgroup_mma(q, k, zero, use_acc=False, is_async=True)
        mbarrier.wait(v_ready.index(v_stage), v_phase)
        acc_running = warpgroup_mma(p16, v_bufs.index(v_stage), acc, is_async=True)
        s = warpgroup_mma_wait(1, deps=(s_running,))
        mbarrier.arrive(k_empty.index(stage), count=1)
        higher = gl.maximum(high, gl.max(s, 1) * scale_log2)
        rescale = gl.exp2(high - higher)
        p = gl.exp2(s * scale_log2 - higher[:, None])
        total = total * rescale + gl.sum(p, 1)
        high = higher
        acc = warpgroup_mma_wait(0, deps=(acc_running,))
        mbarrier.arrive(v_empty.index(v_stage), count=1)
        p16 = gl.convert_layout(p.to(gl.bfloat16), p_layout)
        acc = acc * gl.convert_layout(rescale, o_rows)[:, None]
    last = (blocks - 1) % STAGES
    mbarrier.wait(v_ready.index(last), ((blocks - 1) // STAGES) & 1)
    acc = warpgroup_mma(p16, v_bufs.index(last), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    acc = acc * gl.convert_layout(1.0 / total, o_rows)[:, None]
    rows = row + ROWS * NUMBER + gl.arange(0, ROWS, o_rows)
    columns = gl.arange(0, D, gl.SliceLayout(0, o_layout))
    gl.store(o_ptr + rows[:, None] * D + columns[None, :], acc.to(gl.bfloat16))


@gluon.jit
def consume_first(
    q_bufs, k_bufs, v_bufs, q_ready, k_ready, k_empty, v_ready, v_empty,
    o_ptr, row, blocks, scale_log2, BLOCK: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    consume(
        q_bufs, k_bufs, v_bufs, q_ready, k_ready, k_empty, v_ready, v_empty,
        o_ptr, row, blocks, scale_log2, 0, BLOCK, D, STAGES,
    )  # fmt: skip


@gluon.jit
def consume_second(
    q_bufs, k_bufs, v_bufs, q_ready, k_ready, k_empty, v_ready, v_empty,
    o_ptr, row, blocks, scale_log2, BLOCK: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    consume(
        q_bufs, k_bufs, v_bufs, q_ready, k_ready, k_empty, v_ready, v_empty,
        o_ptr, row, blocks, scale_log2, 1, BLOCK, D, STAGES,
    )  # fmt: skip


@gluon.jit
def attention_kernel(
    q_desc, k_desc, v_desc, o_ptr, n, scale_log2,
    BLOCK: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    kv_row = 0
    row = gl.program_id(0) * 2 * ROWS
    blocks = n // BLOCK
    q_bufs = gl.allocate_shared_memory(gl.bfloat16, [2, ROWS, D], q_desc.layout)
    k_bufs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK, D], k_desc.layout)
    v_bufs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK, D], v_desc.layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for number in gl.static_range(2):
        mbarrier.init(q_ready.index(number), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(stage), count=1)
        mbarrier.init(v_ready.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=2)
        mbarrier.init(v_empty.index(stage), count=2)
    gl.warp_specialize(
        [
            (consume_first, (
                q_bufs, k_bufs, v_bufs, q_ready, k_ready, k_empty, v_ready, v_empty,
                o_ptr, row, blocks, scale_log2, BLOCK, D, STAGES,
            )),
            (consume_second, (
                q_bufs, k_bufs, v_bufs, q_ready, k_ready, k_empty, v_ready, v_empty,
                o_ptr, row, blocks, scale_log2, BLOCK, D, STAGES,
            )),
            (produce, (
                q_desc, k_desc, v_desc, q_bufs, k_bufs, v_bufs, q_ready, k_ready, k_empty, v_ready,
                v_empty, row, kv_row, blocks, BLOCK, STAGES,
            )),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    stages: int,
    registers: int = 240,
) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v of one head.

    Args:
        q: (a multiple of 128, D) in bfloat16.
        k: (a multiple of 64, D).
        v: like k.
        stages: how many blocks of K, and of V, the ring holds.
        registers: how many each thread of the second consumer has.
    """
    n, width = k.shape
    layout = gl.NVMMASharedLayout.get_default_for([64, width], gl.bfloat16)
    descriptors = (TensorDescriptor.from_tensor(x, [64, width], layout) for x in (q, k, v))
    o = torch.full_like(q, math.nan)
    attention_kernel[len(q) // 128,](
        *descriptors, o, n, math.log2(math.e) / math.sqrt(width),
        BLOCK=64, D=width, STAGES=stages, REGISTERS=registers, num_warps=4,
    )  # fmt: skip
    return o
