"""Attention of DTensors: each rank has some batch elements and heads, and needs no others."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..core.random import draw_seed
from .block_terms import BlockMask
from .terms import OwnTerm, Term


def attend_in_shards(
    op: Callable[..., Any],
    q: Any,
    k: Any,
    v: Any,
    score_mods: Sequence[Term],
    terms: Mapping[str, Term | None],
    tensors: Mapping[str, Any],
    options: Mapping[str, Any],
    packed: bool = False,
) -> Any:
    """`op` on the shards of q, k and v, sharded over batch and heads as q is.

    Other dimensions are gathered first, and heads too where a rank would not get whole groups.
    Tensors that are no DTensors are the same on every rank, which takes its part of them. `terms`
    and `tensors` are arguments of `op` by name; so are `options`, which are neither. Packed
    sequences, (T, H, D), are sharded over heads alone.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
    from torch.distributed.tensor.experimental import local_map

    mesh = q.device_mesh

    def find_placement(placement: Any, ranks: int) -> Any:
        by_batch = placement == Shard(0) and not packed
        by_heads = placement == Shard(1) and k.shape[1] % ranks == 0
        return placement if by_batch or by_heads else Replicate()

    placements = [
        find_placement(placement, mesh.size(dim)) for dim, placement in enumerate(q.placements)
    ]

    def slice_tensor(tensor: Any) -> torch.Tensor:
        """This rank's part of a tensor whose first dimensions are batch and heads, or 1.

        Where ranks have the same part each has its share of the gradient.
        """
        if not isinstance(tensor, DTensor):
            tensor = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
        own, gradients = [], []
        for placement in placements:
            shards = isinstance(placement, Shard)
            cut = shards and placement.dim < tensor.dim() and tensor.shape[placement.dim] > 1
            own.append(placement if cut else Replicate())
            gradients.append(Partial() if shards and not cut else own[-1])
        # Even where it does nothing, its backward would sum up the gradient over the ranks.
        if tuple(own) != tensor.placements:
            tensor = tensor.redistribute(mesh, own)
        return tensor.to_local(grad_placements=gradients)

    def slice_heads(tensor: Any) -> torch.Tensor:
        return slice_tensor(tensor[None])[0]

    def slice_mask(tensor: Any) -> torch.Tensor:
        return slice_tensor(tensor.reshape((1,) * (4 - tensor.dim()) + tuple(tensor.shape)))

    def slice_slopes(slopes: Any) -> torch.Tensor:
        return slice_tensor(slopes) if slopes.dim() == 2 else slice_heads(slopes)

    def slice_documents(ids: Any) -> Any:
        return tuple(map(slice_tensor, ids)) if isinstance(ids, tuple) else slice_tensor(ids)

    def slice_seed(seed: torch.Tensor) -> torch.Tensor:
        shard = 0
        for dim, placement in enumerate(placements):
            if isinstance(placement, Shard):
                shard = shard * mesh.size(dim) + mesh.get_local_rank(dim)
        return seed + shard

    def slice_term(term: OwnTerm) -> OwnTerm:
        if term.by_numbers and any(isinstance(placement, Shard) for placement in placements):
            raise ValueError(
                f"{op.__name__}: {type(term).__name__} depends on the number of its batch element "
                "or head, which a shard does not know, or learns: gather batch and heads first"
            )
        return term.with_tensors([slice_tensor(tensor) for tensor in term.tensors])

    def replicate_tensor(tensor: Any) -> torch.Tensor:
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    takers: dict[str, Callable[[Any], Any]] = {
        "cu_seqlens_q": replicate_tensor,
        "cu_seqlens_k": replicate_tensor,
        "mask": slice_mask,
        "bias": slice_mask,
        "alibi_slopes": slice_slopes,
        "sinks": slice_heads,
        "dropout_seed": slice_seed,
        "kv_lengths": slice_tensor,
        "document_ids": slice_documents,
    }
    given = dict(tensors)
    if options["dropout_p"] > 0.0 and given["dropout_seed"] is None:
        given["dropout_seed"] = draw_seed(q)
    parts = {name: None if x is None else takers[name](x) for name, x in given.items()}
    parts |= {name: None if term is None else slice_term(term) for name, term in terms.items()}
    mods = [slice_term(term) for term in score_mods]
    for term in parts.values():
        if isinstance(term, BlockMask) and term.within is not None:
            term.within = slice_term(term.within)

    def attend_shard(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return op(q, k, v, score_mods=mods, **parts, **options)

    # The lse of packed sequences is (H, T).
    of_lse = [
        Shard(0) if packed and placement == Shard(1) else placement for placement in placements
    ]
    mapped: Any = local_map(
        attend_shard,
        out_placements=(placements, of_lse) if options["return_lse"] else placements,
        in_placements=(placements,) * 3,
        device_mesh=mesh,
        redistribute_inputs=True,
    )
    return mapped(q, k, v)
