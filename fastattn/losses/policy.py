"""Losses of policies: ratios, clipping, divergence from a reference, advantages, aggregation."""

import torch

from .numbers import masked_mean, masked_sum

LEVELS = ("token", "sequence")
ESTIMATES = ("k1", "k2", "k3")
AGGREGATIONS = ("token_mean", "sequence_mean", "sequence_sum", "fixed_length")


def importance_ratio(
    log_prob: torch.Tensor, old_log_prob: torch.Tensor, mask: torch.Tensor, level: str = "token"
) -> torch.Tensor:
    """How much likelier tokens are than when they were sampled: exp(log_prob - old_log_prob).

    Args:
        log_prob: (B, T), of the policy that learns.
        old_log_prob: (B, T), of the one that sampled; constant.
        mask: (B, T), the sampled tokens; the ratio of others is 1.
        level: "token", or "sequence": exp of the mean over tokens, the same for each (GSPO).

    Returns:
        (B, T).

    Source: Schulman et al., "Proximal Policy Optimization Algorithms" (2017); Zheng et al., "Group
        Sequence Policy Optimization" (2025).

    Example:
        >>> log_prob, mask = torch.zeros(1, 3), torch.ones(1, 3, dtype=torch.bool)
        >>> fastattn.losses.importance_ratio(log_prob, log_prob, mask).tolist()
        [[1.0, 1.0, 1.0]]
    """
    _check("importance_ratio", "level", level, LEVELS)
    difference = torch.where(mask.bool(), log_prob - old_log_prob, 0.0)
    if level == "sequence":
        of_sequences = masked_mean(difference, mask)[:, None]
        difference = torch.where(mask.bool(), of_sequences, 0.0)
    return difference.exp()


def ppo(
    ratio: torch.Tensor,
    advantage: torch.Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    most: float | None = None,
) -> torch.Tensor:
    """-min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A): PPO's, GRPO's, DAPO's and GSPO's.

    Args:
        ratio: (B, T), see `importance_ratio`.
        advantage: (B, T), or (B, 1) of whole sequences; constant.
        clip_low, clip_high: how far below and above 1 a ratio has a gradient; DAPO has more room
            above.
        dual_clip: more than 1: where the advantage is negative no loss is more than dual_clip |A|.
        most: more than 1 + clip_high: the largest ratio that counts outside of the clip, which
            bounds losses of negative advantages where the gradient of larger ones ends.

    Returns:
        (B, T), for `aggregate`.

    Source: Schulman et al. (2017); Shao et al., "DeepSeekMath" (2024) for GRPO; Yu et al., "DAPO"
        (2025) for both clips; Ye et al., "Mastering Complex Control in MOBA Games" (2020) for the
        dual one; Intellect-2 (2025) for `most`.

    Example:
        >>> ratio = torch.tensor([[1.0, 2.0]])
        >>> fastattn.losses.ppo(ratio, torch.ones(1, 1), clip_high=0.5).tolist()
        [[-1.0, -1.5]]
    """
    if dual_clip is not None and not dual_clip > 1.0:
        raise ValueError(f"ppo: dual_clip must be more than 1, got {dual_clip}")
    if most is not None and not most > 1.0 + clip_high:
        raise ValueError(f"ppo: most must be more than {1.0 + clip_high}, got {most}")
    clipped = -ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantage
    loss = torch.maximum(-(ratio if most is None else ratio.clamp(max=most)) * advantage, clipped)
    if dual_clip is None:
        return loss
    return torch.where(advantage < 0.0, torch.minimum(loss, -dual_clip * advantage), loss)


def cispo(
    log_prob: torch.Tensor,
    ratio: torch.Tensor,
    advantage: torch.Tensor,
    *,
    clip_low: float = 1.0,
    clip_high: float = 0.28,
) -> torch.Tensor:
    """-clip(ratio) A log_prob, where the clipped ratio is a constant: every token has a gradient.

    Args:
        log_prob: (B, T), of the policy that learns.
        ratio: (B, T), see `importance_ratio`.
        advantage: (B, T), or (B, 1) of whole sequences; constant.
        clip_low, clip_high: how far below and above 1 the ratio goes; 1 below is no bound.

    Returns:
        (B, T), for `aggregate`.

    Source: MiniMax, "MiniMax-M1: Scaling Test-Time Compute Efficiently" (2025).

    Example:
        >>> log_prob = torch.zeros(1, 2, requires_grad=True)
        >>> loss = fastattn.losses.cispo(log_prob, torch.ones(1, 2), torch.ones(1, 1))
        >>> loss.shape
        torch.Size([1, 2])
    """
    return -ratio.clamp(1.0 - clip_low, 1.0 + clip_high).detach() * advantage * log_prob


def kl_estimate(
    log_prob: torch.Tensor, ref_log_prob: torch.Tensor, kind: str = "k3"
) -> torch.Tensor:
    """KL(policy || reference) as tokens sampled by the policy show it.

    With d = log_prob - ref_log_prob: "k1" is d, unbiased; "k2" d^2 / 2, whose gradient is that of
    the divergence; "k3" exp(-d) + d - 1, unbiased and never negative, as in GRPO.

    Args:
        log_prob, ref_log_prob: (B, T); the second is usually constant.
        kind: one of the above.

    Returns:
        (B, T).

    Source: Schulman, "Approximating KL Divergence" (2020).

    Example:
        >>> fastattn.losses.kl_estimate(torch.zeros(1, 2), torch.zeros(1, 2)).tolist()
        [[0.0, 0.0]]
    """
    _check("kl_estimate", "kind", kind, ESTIMATES)
    d = log_prob - ref_log_prob
    if kind == "k1":
        return d
    return 0.5 * d.square() if kind == "k2" else torch.expm1(-d) + d


def aggregate(
    losses: torch.Tensor,
    mask: torch.Tensor,
    how: str = "token_mean",
    *,
    num_items: torch.Tensor | float | None = None,
    length: int | None = None,
) -> torch.Tensor:
    """One number of losses of tokens.

        token_mean     their sum over num_items tokens (DAPO, and BNPO of one batch)
        sequence_mean  the sum of every sequence's mean over num_items sequences (GRPO)
        sequence_sum   the sum of every sequence's sum over num_items sequences
        fixed_length   their sum over num_items sequences of `length` tokens (Dr. GRPO)

    Args:
        losses: (B, T).
        mask: (B, T), the tokens that count.
        how: one of the above.
        num_items: what to divide by where the batch is a part of a step's: the tokens or sequences
            of all parts, over the ranks if those average gradients. None for those at hand.
        length: the most tokens that a sequence could have had.

    Source: Shao et al., "DeepSeekMath" (2024); Yu et al., "DAPO" (2025); Liu et al., "Understanding
        R1-Zero-Like Training" (2025).

    Example:
        >>> numbers = torch.tensor([[1.0, 3.0], [4.0, 0.0]])
        >>> mask = torch.tensor([[True, True], [True, False]])
        >>> fastattn.losses.aggregate(numbers, mask, "sequence_mean").item()
        3.0
    """
    _check("aggregate", "how", how, AGGREGATIONS)
    if (length is None) == (how == "fixed_length"):
        raise ValueError(f"aggregate: length belongs to 'fixed_length', got {length} for {how!r}")
    of_sequences = (masked_mean if how == "sequence_mean" else masked_sum)(losses, mask)
    if num_items is None:
        num_items = mask.bool().sum().clamp(min=1) if how == "token_mean" else losses.shape[0]
    return of_sequences.sum() / (num_items * (length or 1))


def group_advantages(
    rewards: torch.Tensor, group_size: int, *, scaled: bool = True, eps: float = 1e-4
) -> torch.Tensor:
    """Rewards less the mean of their group, over its standard deviation unless that is left out.

    Args:
        rewards: (B,), groups of `group_size` answers to one prompt after the other.
        group_size: at least 2.
        scaled: divide by the standard deviation (of a sample) and eps; Dr. GRPO does not.
        eps: what is added to it.

    Returns:
        (B,), constant.

    Source: Shao et al., "DeepSeekMath" (2024); Liu et al., "Understanding R1-Zero-Like Training"
        (2025).

    Example:
        >>> rewards = torch.tensor([1.0, 0.0, 3.0, 5.0])  # Two groups of two answers.
        >>> fastattn.losses.group_advantages(rewards, 2, scaled=False).tolist()
        [0.5, -0.5, -1.0, 1.0]
    """
    if group_size < 2 or rewards.dim() != 1 or rewards.shape[0] % group_size:
        raise ValueError(
            f"group_advantages: rewards must be (B,), B a multiple of group_size, at least 2, got "
            f"{tuple(rewards.shape)} and {group_size}"
        )
    groups = rewards.detach().view(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    return (centred / (groups.std(1, keepdim=True) + eps) if scaled else centred).view(-1)


def gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimates, and the returns that values are to learn.

    A_t = r_t + gamma V_u - V_t + gamma lam A_u, with u the next token that counts: behind the last
    one of a sequence both are 0, and what does not count between, as a tool's, is passed over.

    Args:
        rewards, values: (B, T).
        mask: (B, T), the tokens that count.
        gamma: the discount.
        lam: what trades bias for variance.

    Returns:
        (advantages, returns), both (B, T), constant, and 0 where a token does not count.

    Source: Schulman et al., "High-Dimensional Continuous Control Using Generalized Advantage
        Estimation" (2015).

    Example:
        >>> mask = torch.ones(1, 3, dtype=torch.bool)
        >>> rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.zeros(1, 3)
        >>> advantages, returns = fastattn.losses.gae(rewards, values, mask, lam=1.0)
        >>> returns.tolist()
        [[1.0, 1.0, 1.0]]
    """
    rewards, values, mask = rewards.detach(), values.detach(), mask.bool()
    advantage = next_value = torch.zeros_like(values[:, 0])
    found = []
    for t in reversed(range(values.shape[1])):
        here = rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * advantage
        advantage = torch.where(mask[:, t], here, advantage)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        found.append(advantage)
    advantages = torch.where(mask, torch.stack(found[::-1], 1), 0.0)
    return advantages, torch.where(mask, advantages + values, 0.0)


def value_loss(
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    *,
    clip: float | None = 0.2,
) -> torch.Tensor:
    """Half the squared distance from returns, the larger of values as they are and near the old.

    Args:
        values: (B, T), of the model that learns.
        old_values: (B, T), of when the tokens were sampled.
        returns: (B, T), see `gae`.
        clip: how far from the old ones values have a gradient; None for any distance.

    Returns:
        (B, T), for `aggregate`.

    Source: the implementation of Schulman et al., "Proximal Policy Optimization Algorithms" (2017).

    Example:
        >>> values, old = torch.zeros(1, 2), torch.zeros(1, 2)
        >>> fastattn.losses.value_loss(values, old, torch.ones(1, 2)).shape
        torch.Size([1, 2])
    """
    loss = 0.5 * (values - returns).square()
    if clip is None:
        return loss
    near = old_values + (values - old_values).clamp(-clip, clip)
    return torch.maximum(loss, 0.5 * (near - returns).square())


def _check(op: str, name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{op}: {name} must be one of {', '.join(choices)}, got {value!r}")
