"""Expert parallelism: each rank of a device mesh keeps its share of the experts.

`shard_experts` cuts a model's experts; `sum_over_ranks` and `exchange_tokens` are the two ways in
which tokens and experts then come together.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
import torch.nn as nn

from ..ops.core.arguments import check_choice
from ..ops.core.sharding import is_distributed, refuse_distributed
from .experts import ExpertLayers

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Parallel = Literal["sum", "all_to_all"]
PARALLELS = ("sum", "all_to_all")

Mix = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""A rank's own experts: (x, ids, weights) to y, where an id of E is no expert's."""


@dataclass(frozen=True)
class Share:
    """Which of all experts a rank has: `count` of them, from number rank * count on."""

    group: Any
    rank: int
    ranks: int
    count: int


def shard_experts(module: nn.Module, mesh: "DeviceMesh", parallel: Parallel = "sum") -> None:
    """Leave each rank its share of the experts of every `Experts` and `PlainExperts` in a module,
    itself included.

    Every rank has made the whole module, with the same numbers; of E experts on R ranks the first
    keeps the first E / R, and so on. Optimizers are made after that. Whatever else is in the
    module, routers and shared experts too, stays whole on every rank.

    With "sum" every rank has all tokens, as between layers that are split by tensor parallelism.
    It runs its own experts on them, and what they give is summed. Outputs and gradients are the
    same on every rank, and those of one process, so nothing has to be summed by the caller.

    With "all_to_all" every rank has tokens of its own, any number of them, as under data
    parallelism. They are sent to the ranks of their experts, and what these make of them is sent
    back. Gradients are those of the sum of the ranks' losses: whole for experts, while of what all
    ranks have alike each rank has its share, to be summed over ranks. How many tokens come is asked
    before they do, for which the host waits.

    Both are differentiable any number of times, and an id that is no expert's adds nothing. What
    `state_dict` has is a rank's own.

    Args:
        module: a module with `Experts` somewhere, as those of `fastattn.models` with experts are.
        mesh: the ranks, of one dimension.
        parallel: "sum" or "all_to_all".

    Raises:
        TypeError: parameters are DTensors; shard experts before that.
        ValueError: the mesh has several dimensions, the module no experts or such as are shared
            out already, or they cannot be dealt out evenly.

    Source: Lepikhin et al., "GShard: Scaling Giant Models with Conditional Computation and
    Automatic Sharding" (2021).
    """
    check_choice("shard_experts", "parallel", parallel, PARALLELS)
    if mesh.ndim != 1:
        raise ValueError(f"shard_experts: mesh must have one dimension, got {mesh.ndim}")
    found = [part for part in module.modules() if isinstance(part, ExpertLayers)]
    if not found:
        raise ValueError(f"shard_experts: {type(module).__name__} has no fastattn.nn.Experts")
    for experts in found:
        _check(experts, mesh.size())
    run = sum_over_ranks if parallel == "sum" else exchange_tokens
    for experts in found:
        count = experts.down_proj.shape[0] // mesh.size()
        share = Share(mesh.get_group(), mesh.get_local_rank(), mesh.size(), count)
        own = slice(share.rank * count, (share.rank + 1) * count)
        for name, whole in list(experts.named_parameters(recurse=False)):
            # A copy, so that the others' memory is given back.
            kept = nn.Parameter(whole.detach()[own].clone(), whole.requires_grad)
            setattr(experts, name, kept)
        experts.distribute = _Distribute(run, share)


@dataclass(frozen=True)
class _Distribute:
    """What a sharded `Experts` calls with its tokens and with what runs its own experts."""

    run: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Mix, Share], torch.Tensor]
    share: Share

    def __call__(
        self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, mix: Mix
    ) -> torch.Tensor:
        refuse_distributed("Experts", x=x, ids=ids, weights=weights)
        return self.run(x, ids, weights, mix, self.share)


def _check(experts: ExpertLayers, ranks: int) -> None:
    if experts.distribute is not None:
        raise ValueError("shard_experts: the experts are dealt out already")
    for name, parameter in experts.named_parameters(recurse=False):
        if is_distributed(parameter):
            raise TypeError(f"shard_experts: {name} is a DTensor; shard experts first")
    count = experts.down_proj.shape[0]
    if count % ranks:
        raise ValueError(f"shard_experts: {count} experts cannot be dealt out to {ranks} ranks")


def sum_over_ranks(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, mix: Mix, share: Share
) -> torch.Tensor:
    """Run a rank's own experts on all tokens, the same on every rank, and sum what they give."""
    x, weights = (_Copy.apply(tensor, share.group) for tensor in (x, weights))
    own = ids - share.rank * share.count
    elsewhere = (own < 0) | (own >= share.count)
    return _Sum.apply(mix(x, own.masked_fill(elsewhere, share.count), weights), share.group)


def exchange_tokens(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, mix: Mix, share: Share
) -> torch.Tensor:
    """Send a rank's own tokens to their experts, and sum what comes back by the weights."""
    flat, experts = x.flatten(0, -2), ids.flatten()
    k, everyone = ids.shape[-1], share.ranks * share.count
    # Pairs of a token and an expert in the experts' order, which is that of ranks; last those of no
    # expert, which are sent nowhere.
    experts = experts.masked_fill((experts < 0) | (experts >= everyone), everyone)
    order = experts.argsort(stable=True)
    places = torch.div(experts, share.count, rounding_mode="floor")
    sent = torch.bincount(places, minlength=share.ranks + 1)[: share.ranks]
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=share.group)
    to, back = sent.tolist(), received.tolist()
    order = order[: sum(to)]

    tokens = _Exchange.apply(flat[order // k], to, back, share.group)
    numbers = _Exchange.apply(experts[order] % share.count, to, back, share.group)
    ones = torch.ones(numbers.shape[0], 1, dtype=torch.float32, device=x.device)
    made = _Exchange.apply(mix(tokens, numbers[:, None], ones), back, to, share.group)

    pairs = made.new_zeros(experts.shape[0], made.shape[-1]).index_copy(0, order, made)
    # Summed as `mixture` does: in float32, in the order of ids, and rounded once.
    wide = torch.promote_types(made.dtype, torch.float32)
    scaled = pairs.view(*ids.shape, made.shape[-1]).to(wide) * weights[..., None].to(wide)
    return scaled.sum(-2).to(made.dtype)


class _Copy(torch.autograd.Function):
    """What every rank has, for each to use its own way: gradients are summed over ranks."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _Sum.apply(dy, ctx.group), None


class _Sum(torch.autograd.Function):
    """The sum over ranks, which every rank uses the same way: gradients are the same on each."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _Copy.apply(dy, ctx.group), None


class _Exchange(torch.autograd.Function):
    """Rows to their ranks: of x so many to each, and so many from each. Gradients go back."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, to: Sequence[int], back: Sequence[int], group: Any
    ) -> torch.Tensor:
        ctx.to, ctx.back, ctx.group = to, back, group
        out = x.new_empty(sum(back), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), list(back), list(to), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return _Exchange.apply(dy, ctx.back, ctx.to, ctx.group), None, None, None
