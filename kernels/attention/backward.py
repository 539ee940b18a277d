r"""Attention, backward: the gradients of q, k and v.

With s, lse, o and the shapes of the forward, and the gradients do of o and dlse of lse:

    delta_i = do_i . o_i - dlse_i
    p_ij    = exp(s_ij - lse_i)                    for the keys that query i sees, else 0
    dv_j    = sum_i p_ij do_i
    ds_ij   = p_ij (do_i . v_j - delta_i)
    dx_ij   = the gradient of terms(x_ij), x_ij = scale q_i . k_j, given ds_ij
    dk_j    = scale sum_i dx_ij q_i
    dq_i    = scale sum_j dx_ij k_j

where the sums of dk and dv also go over the query heads that share the key head. Where dropout
multiplies weights by z_ij, dv_j takes p_ij z_ij, and ds_ij = p_ij (z_ij do_i . v_j - delta_i). The
gradient of a head's sink is - sum_i exp(sink - lse_i) delta_i.

p is computed again from q, k and lse. Sums are accumulated in float32 (float64 for float64), each
by one program in a fixed order, so the gradients have the same bits every time. One kernel owns
tiles of keys and goes over the queries that see them, head after head (backward_keys.py);
another owns tiles of queries and goes over the keys that they see, and sums the gradients of the
terms' parameters on the way (backward_queries.py). A third owns tiles of a bias
(backward_bias.py). This file has what comes before them, delta, and the launcher of all.
"""

import functools

import torch
import triton
import triton.language as tl

from ..config import cdiv
from ..launch import common_divisor, launchable
from .backward_bias import bias_backward
from .backward_keys import keys_backward
from .backward_queries import queries_backward
from .composition import Composition, compose
from .config import NARROWEST
from .launch import Call, Gradient, allocate_statistics, make_rows
from .structures import Columns
from .terms import take_log_sum
from .tiles import load_log_sum, load_rows
from .views import HeadsView, find_rows, view_heads


@launchable
@triton.jit(do_not_specialize=["queries"])
def attention_delta_kernel(
    o_view: HeadsView,
    do_view: HeadsView,
    dlse_view: HeadsView,
    lse_ptr,
    sinks_ptr,
    log_sums_ptr,
    delta_ptr,
    dsinks_ptr,
    queries,
    HEADS: tl.constexpr,
    FOLDED: tl.constexpr,
    DIVISOR: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """One program BLOCK_M queries of one head, and what they add to the gradient of its sink.

    It also writes lse as the other kernels take it, who would do so in every step of their loops.
    """
    # Of delta and do . v, which are close to each other, the difference counts. The rounding of
    # this sum would be most of a gradient's error in float32.
    SHORT: tl.constexpr = o_view.pointer.dtype.element_ty.primitive_bitwidth == 16
    ACC: tl.constexpr = tl.float32 if SHORT else tl.float64
    blocks = tl.cdiv(queries, BLOCK_M)
    program = tl.program_id(0)
    pair = program // blocks
    batch = pair // HEADS
    head = pair % HEADS
    start_m = program % blocks * BLOCK_M
    offs_block = tl.arange(0, BLOCK_M)
    inside = start_m + offs_block < queries
    o = find_rows(o_view, batch, head, start_m, DIVISOR)
    do = find_rows(do_view, batch, head, start_m, DIVISOR)
    (o_tile,) = load_rows(o, inside, COLUMNS, BLOCK_M, True)
    (do_tile,) = load_rows(do, inside, COLUMNS, BLOCK_M, True)
    delta = tl.sum(o_tile.to(ACC) * do_tile.to(ACC), 1)
    if dlse_view is not None:
        dlse = find_rows(dlse_view, batch, head, start_m, 1)
        pointers = dlse.base + offs_block.to(tl.int64) * dlse.stride
        delta -= tl.load(pointers, inside, other=0.0).to(ACC)
    row = pair.to(tl.int64) * queries + start_m
    tl.store(delta_ptr + row + offs_block, delta, inside)
    lse = load_log_sum(lse_ptr + row + offs_block, inside)
    tl.store(log_sums_ptr + row + offs_block, take_log_sum(lse, FOLDED), inside)
    if dsinks_ptr is not None:
        weights = tl.exp(tl.load(sinks_ptr + head).to(ACC) - lse.to(ACC))
        tl.store(dsinks_ptr + program, -tl.sum(tl.where(inside, weights * delta, 0.0), 0))


DELTA_TILE = 4096
"""Elements of a tile of o: with four warps, 128 bits of 16-bit data at a time."""


def compute_delta(
    o: torch.Tensor,
    do: torch.Tensor,
    dlse: torch.Tensor | None,
    lse: torch.Tensor,
    sinks: torch.Tensor | None,
    folded: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Launch delta and the kernels' log sums, both (B, H, M), and with sinks their gradient (H,).

    `folded` says whether scores wait for the scale, as `Call.folded` does.
    """
    batch, heads, queries, value_dim = o.shape
    delta = allocate_statistics(o)
    log_sums = allocate_statistics(o)
    padded = triton.next_power_of_2(value_dim)
    block_m = max(NARROWEST, DELTA_TILE // padded)
    blocks = cdiv(queries, block_m)
    dsinks = None if sinks is None else delta.new_empty((batch, heads, blocks))
    if delta.numel() == 0:
        return log_sums, delta, None if sinks is None else torch.zeros_like(sinks)
    attention_delta_kernel.launch(
        (batch * heads * blocks, 1, 1),
        o_view=view_heads(o),
        do_view=view_heads(do),
        dlse_view=None if dlse is None else view_heads(dlse),
        lse_ptr=lse,
        sinks_ptr=sinks,
        log_sums_ptr=log_sums,
        delta_ptr=delta,
        dsinks_ptr=dsinks,
        queries=queries,
        HEADS=heads,
        FOLDED=folded,
        DIVISOR=common_divisor(*o.stride()[:3], *do.stride()[:3]),
        COLUMNS=Columns(value_dim, padded, 0),
        BLOCK_M=block_m,
        num_warps=4,
    )
    if dsinks is None or sinks is None:
        return log_sums, delta, None
    return log_sums, delta, dsinks.sum((0, 2)).to(sinks.dtype)


def attention_backward(
    do: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    sinks: torch.Tensor | None,
    seed: torch.Tensor | None,
    tensors: list[torch.Tensor],
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    dropout_p: float,
    precision: str,
    terms: str,
    floats: list[float],
    integers: list[int],
    batch_invariant: bool,
    learned: list[int],
    needs_dq: bool,
    needs_dkv: bool,
    needs_dsinks: bool,
) -> tuple[
    torch.Tensor | None,
    torch.Tensor | None,
    torch.Tensor | None,
    torch.Tensor | None,
    list[torch.Tensor],
]:
    """Launch the backward.

    Arguments are those of the forward and what it returned. `learned` has the places, among
    `tensors`, of the terms' parameters whose gradients are wanted.

    Returns:
        (dq, dk, dv, dsinks, gradients of parameters), None for what is not needed. The gradients
        come in the order of `learned`.
    """
    do, q, k, v, o = (make_rows(x) for x in (do, q, k, v, o))
    call = Call(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        seed,
        dropout_p,
        scale,
        precision,
        terms,
        tensors,
        floats,
        integers,
        batch_invariant,
    )
    log_sums, delta, dsinks = compute_delta(
        o, do, dlse, lse, sinks if needs_dsinks else None, call.folded
    )
    if q.numel() == 0 or v.numel() == 0:
        return (
            torch.zeros_like(q) if needs_dq else None,
            torch.zeros_like(k) if needs_dkv else None,
            torch.zeros_like(v) if needs_dkv else None,
            dsinks,
            [torch.zeros_like(tensors[place]) for place in learned],
        )
    gradient = Gradient(do, lse, log_sums, delta)
    parameters = compose(terms).parameters
    entries = count_entries(compose(terms), tensors, learned)
    dq, sums = None, []
    if needs_dq or any(entries):
        dq, sums = queries_backward(call, gradient, entries)
    dk, dv = keys_backward(call, gradient) if needs_dkv else (None, None)
    found = dict(zip((i for i, count in enumerate(entries) if count), sums, strict=True))
    gradients = []
    for place in learned:
        parts = [
            bias_backward(
                call, gradient, learner, tensors[place], 1 if repeat is None else integers[repeat]
            )
            if per_score
            else sum_like(found[learner], tensors[place])
            for learner, per_score, repeat in parameters[place]
        ]
        gradients.append(functools.reduce(torch.add, parts))
    return dq if needs_dq else None, dk, dv, dsinks, gradients


def count_entries(
    composition: Composition, tensors: list[torch.Tensor], places: list[int]
) -> tuple[int, ...]:
    """How many numbers for a head the kernel of dq sums for each tensor that terms learn.

    0 for those that are not at `places`, and for those that have a number for each score.
    """
    entries = [0] * len(composition.terms.learners)
    for place in places:
        shape = tensors[place].shape
        for learner, per_score, _ in composition.parameters[place]:
            if not per_score:
                entries[learner] = shape[2] if len(shape) > 2 else 1
    return tuple(entries)


def sum_like(gradient: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A gradient (B, H, entries), summed over what the parameter is the same for."""
    shared = [dim for dim in (0, 1) if parameter.shape[dim] == 1]
    total = gradient.sum(shared, keepdim=True) if shared else gradient
    return total.to(parameter.dtype).reshape(parameter.shape)
