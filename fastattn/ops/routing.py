"""Which experts a token goes to, and the losses that keep them evenly used: plain PyTorch.

There are few experts, so that nothing here takes long; and a kernel that chose where torch.topk
does would choose other experts where scores are equal, as many are in 16 bits.
"""

from collections.abc import Sequence
from typing import Literal

import torch

from ..reference import torch_functions as F
from .core.arguments import check_choice, check_device, check_float_tensor, check_shape
from .core.precision import disable_autocast

Score = Literal["softmax", "sigmoid", "softmax_top_k"]

SCORES: tuple[Score, ...] = ("softmax", "sigmoid", "softmax_top_k")


def route_top_k(
    logits: torch.Tensor,
    k: int,
    *,
    score: Score = "softmax",
    normalize: bool = True,
    bias: torch.Tensor | None = None,
    groups: int | None = None,
    top_groups: int | None = None,
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k experts of each token with the largest scores, and their weights.

    Mixtral and Qwen3-MoE have score="softmax"; gpt-oss has "softmax_top_k", a softmax over the
    chosen logits alone; DeepSeek-V3 has "sigmoid" with a bias and groups; Switch has k=1 and
    normalize=False. Computed in float32 (float64 for float64), whatever autocast says.

    Args:
        logits: (..., E), what the router makes of each token.
        k: experts of a token, from 1 to E.
        score: "softmax" over all experts, "sigmoid" of each, or "softmax_top_k".
        normalize: divide the weights of a token by their sum. Of "softmax_top_k" they are.
        bias: (E,), added to the scores for the choice and not in the weights, so that it has no
            gradient: it is moved by hand, up for experts with too few tokens.
        groups: the number of groups of neighbouring experts, of which only some are chosen from.
            A group counts by the sum of its two largest scores.
        top_groups: how many of the groups.
        scale: multiplies the weights.

    Returns:
        (weights, ids), both (..., k): float32 (float64 for float64), differentiable in logits any
        number of times, and int64. The largest score comes first; of equal ones torch.topk chooses.

    Raises:
        TypeError: an argument is no tensor, or of an unsupported dtype.
        ValueError: a shape, device or number does not fit.

    Example:
        >>> import torch, fastattn
        >>> weights, ids = fastattn.route_top_k(torch.tensor([[1.0, 3.0, 3.0]]).log(), 2)
        >>> weights, ids.sort().values
        (tensor([[0.5000, 0.5000]]), tensor([[1, 2]]))

    Source: Fedus et al., "Switch Transformers" (2021); DeepSeek-AI, "DeepSeek-V3 Technical Report"
    (2024).
    """
    _check(logits, k, score, bias, groups, top_groups)
    with disable_autocast(logits):
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        scores = logits
        if score != "softmax_top_k":
            scores = F.softmax(logits, dim=-1) if score == "softmax" else logits.sigmoid()
        ids = _choose(scores.detach(), k, bias, groups, top_groups)
        weights = scores.gather(-1, ids)
        if score == "softmax_top_k":
            weights = F.softmax(weights, dim=-1)
        elif normalize:
            # Sigmoids may all be 0; a softmax's largest is not.
            least = 1e-20 if score == "sigmoid" else 0.0
            weights = weights / (weights.sum(-1, keepdim=True) + least)
        return weights if scale == 1.0 else weights * scale, ids


def _choose(
    scores: torch.Tensor,
    k: int,
    bias: torch.Tensor | None,
    groups: int | None,
    top_groups: int | None,
) -> torch.Tensor:
    """The experts with the largest scores, within the best groups."""
    if bias is not None:
        scores = scores + bias.detach()
    if groups is not None:
        grouped = scores.unflatten(-1, (groups, -1))
        best = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
        chosen = best.topk(top_groups or groups, dim=-1).indices
        allowed = torch.zeros_like(best, dtype=torch.bool).scatter(-1, chosen, True)
        scores = grouped.masked_fill(~allowed[..., None], float("-inf")).flatten(-2)
    return scores.topk(k, dim=-1).indices


def _check(
    logits: torch.Tensor,
    k: int,
    score: str,
    bias: torch.Tensor | None,
    groups: int | None,
    top_groups: int | None,
) -> None:
    op = "route_top_k"
    check_float_tensor(op, "logits", logits)
    if logits.dim() == 0:
        raise ValueError(f"{op}: logits must have at least one dimension, got a scalar")
    experts = logits.shape[-1]
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"{op}: k must be an integer, got {k!r}")
    if not 1 <= k <= experts:
        raise ValueError(f"{op}: k must be in [1, {experts}], got {k}")
    check_choice(op, "score", score, SCORES)
    if bias is not None:
        check_float_tensor(op, "bias", bias, like=logits)
        check_shape(op, "bias", bias, (experts,))
    if groups is None:
        if top_groups is not None:
            raise ValueError(f"{op}: top_groups says how many of groups, which is None")
        return
    if groups < 1 or experts % groups:
        raise ValueError(f"{op}: groups must divide the {experts} experts, got {groups}")
    if top_groups is not None and not 1 <= top_groups <= groups:
        raise ValueError(f"{op}: top_groups must be in [1, {groups}], got {top_groups}")
    within = (top_groups or groups) * (experts // groups)
    if k > within:
        raise ValueError(f"{op}: k must be at most the {within} experts of top_groups, got {k}")


Tensors = torch.Tensor | Sequence[torch.Tensor]


def load_balancing_loss(
    logits: Tensors, ids: Tensors, num_experts: int, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """What a model pays for using its experts unevenly: E * sum over experts of f_e P_e.

    f_e is the number of tokens that went to expert e over the number of tokens, and P_e the mean of
    its probability. Both are taken over all layers together, as transformers has it. Evenly used
    experts give k, which is the least where probabilities follow.

    Args:
        logits: (..., E), or a sequence of as many layers' of one shape.
        ids: (..., k), what `route_top_k` chose, or a sequence; numbers outside of [0, E) count as
            no expert's.
        num_experts: E.
        mask: (...), bool or numbers that are 0 or 1: the tokens that count, None for all.

    Returns:
        A scalar, float32 (float64 for float64), differentiable in logits.

    Raises:
        TypeError: an argument is no tensor, or of an unsupported dtype.
        ValueError: a shape or device does not fit, or there are not as many ids as logits.

    Source: Fedus et al., "Switch Transformers" (2021).

    Example:
        >>> logits = torch.randn(64, 8)
        >>> weights, ids = fastattn.route_top_k(logits, 2)
        >>> fastattn.load_balancing_loss(logits, ids, 8).shape
        torch.Size([])
    """
    op = "load_balancing_loss"
    layers, choices = _as_list(logits), _as_list(ids)
    if len(layers) != len(choices) or not layers:
        raise ValueError(f"{op}: ids must be of {len(layers)} layers, got {len(choices)}")
    probability = tokens = counts = None
    for x, chosen in zip(layers, choices, strict=True):
        check_float_tensor(op, "logits", x)
        check_device(op, "ids", chosen, x)
        check_shape(op, "logits", x, (*chosen.shape[:-1], num_experts))
        counted = _weigh_tokens(op, x, mask)
        probabilities = F.softmax(x.to(counted.dtype), dim=-1)
        own = (probabilities * counted[..., None]).flatten(0, -2).sum(0)
        places = torch.where((chosen >= 0) & (chosen < num_experts), chosen, num_experts)
        each = counted[..., None].expand(chosen.shape).reshape(-1)
        sums = counted.new_zeros(num_experts + 1)
        found = sums.scatter_add(0, places.reshape(-1).long(), each)[:num_experts]
        probability = own if probability is None else probability + own
        counts = found if counts is None else counts + found
        tokens = counted.sum() if tokens is None else tokens + counted.sum()
    assert probability is not None
    assert counts is not None
    assert tokens is not None
    return num_experts * (counts / tokens * (probability / tokens)).sum()


def router_z_loss(logits: Tensors, mask: torch.Tensor | None = None) -> torch.Tensor:
    """The mean of logsumexp(logits)^2 over tokens, which keeps a router's logits small.

    Args:
        logits: (..., E), or a sequence of layers' of one shape.
        mask: (...), bool or numbers that are 0 or 1: the tokens that count, None for all.

    Returns:
        A scalar, float32 (float64 for float64), differentiable in logits.

    Raises:
        TypeError: logits are no tensor, or of an unsupported dtype.
        ValueError: the mask has another shape or device.

    Source: Zoph et al., "ST-MoE: Designing Stable and Transferable Sparse Expert Models" (2022).

    Example:
        >>> torch.testing.assert_close(fastattn.router_z_loss(torch.zeros(5, 1)), torch.tensor(0.0))
    """
    total = tokens = None
    for x in _as_list(logits):
        check_float_tensor("router_z_loss", "logits", x)
        counted = _weigh_tokens("router_z_loss", x, mask)
        squares = x.to(counted.dtype).logsumexp(-1).square()
        own = (squares * counted).sum()
        total = own if total is None else total + own
        tokens = counted.sum() if tokens is None else tokens + counted.sum()
    if total is None or tokens is None:
        raise ValueError("router_z_loss: logits must be of at least one layer, got none")
    return total / tokens


def _as_list(tensors: Tensors) -> list[torch.Tensor]:
    return [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)


def _weigh_tokens(op: str, logits: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """How often each token counts, in the dtype to compute in."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    if mask is None:
        return torch.ones(logits.shape[:-1], dtype=dtype, device=logits.device)
    check_device(op, "mask", mask, logits)
    check_shape(op, "mask", mask, logits.shape[:-1])
    return mask.to(dtype)
