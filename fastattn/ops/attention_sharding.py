"""Attention of DTensors: each rank has some batch elements and heads, and needs no others."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .attention_terms import Term


def attention_of_shards(
    op: Callable[..., Any],
    q: Any,
    k: Any,
    v: Any,
    score_mods: Sequence[Term],
    tensors: Mapping[str, torch.Tensor | None],
    options: Mapping[str, Any],
) -> Any:
    """`op` on the shards of q, k and v, sharded over batch and heads as q is.

    Other dimensions are gathered first, and heads too where a rank would not get whole groups.
    Tensors that are no DTensors are the same on every rank, which takes its part of them.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor.experimental import local_map

    mesh = q.device_mesh

    def kept(placement: Any, ranks: int) -> Any:
        if placement == Shard(0) or (placement == Shard(1) and k.shape[1] % ranks == 0):
            return placement
        return Replicate()

    placements = [kept(placement, mesh.size(dim)) for dim, placement in enumerate(q.placements)]

    def part(tensor: Any) -> torch.Tensor:
        """This rank's part of a tensor whose first dimensions are batch and heads, or 1."""
        if not isinstance(tensor, DTensor):
            tensor = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
        own = [
            placement
            if isinstance(placement, Shard)
            and placement.dim < tensor.dim()
            and tensor.shape[placement.dim] > 1
            else Replicate()
            for placement in placements
        ]
        return tensor.redistribute(mesh, own).to_local()

    parts = dict(tensors)
    mask, slopes, lengths = (tensors[name] for name in ("mask", "alibi_slopes", "kv_lengths"))
    if mask is not None:
        parts["mask"] = part(mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape)))
    if slopes is not None:
        parts["alibi_slopes"] = part(slopes) if slopes.dim() == 2 else part(slopes[None])[0]
    if lengths is not None:
        parts["kv_lengths"] = part(lengths)
    mods = []
    for term in score_mods:
        own_term: Any = copy.copy(term)
        own_term.tensors = tuple(part(tensor) for tensor in term.tensors)
        mods.append(own_term)

    def of_shard(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return op(q, k, v, score_mods=mods, **parts, **options)

    mapped: Any = local_map(
        of_shard,
        out_placements=(placements, placements) if options["return_lse"] else placements,
        in_placements=(placements,) * 3,
        device_mesh=mesh,
        redistribute_inputs=True,
    )
    return mapped(q, k, v)
