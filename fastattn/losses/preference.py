"""Losses of preferences: of two answers the better one, or of one answer whether it is good."""

from collections.abc import Callable, Mapping

import torch
from torch.nn.functional import logsigmoid

from .numbers import masked_mean, masked_sum

Pairs = Callable[[torch.Tensor, torch.Tensor, float, float], torch.Tensor]
"""Log-ratios of chosen and rejected answers (B,), beta and label smoothing, to losses (B,)."""


def _sigmoid(c: torch.Tensor, r: torch.Tensor, beta: float, smoothing: float) -> torch.Tensor:
    d = beta * (c - r)
    return -(1.0 - smoothing) * logsigmoid(d) - smoothing * logsigmoid(-d)


def _robust(c: torch.Tensor, r: torch.Tensor, beta: float, smoothing: float) -> torch.Tensor:
    d = beta * (c - r)
    unbiased = -(1.0 - smoothing) * logsigmoid(d) + smoothing * logsigmoid(-d)
    return unbiased / (1.0 - 2.0 * smoothing)


def _bco(c: torch.Tensor, r: torch.Tensor, beta: float, _: float) -> torch.Tensor:
    shift = beta * torch.cat((c, r)).mean().detach()
    return -logsigmoid(beta * c - shift) - logsigmoid(shift - beta * r)


def _apo_zero(c: torch.Tensor, r: torch.Tensor, beta: float, _: float) -> torch.Tensor:
    return torch.sigmoid(-beta * c) + torch.sigmoid(beta * r)


def _apo_down(c: torch.Tensor, r: torch.Tensor, beta: float, _: float) -> torch.Tensor:
    return torch.sigmoid(beta * c) + torch.sigmoid(-beta * (c - r))


def _nca(c: torch.Tensor, r: torch.Tensor, beta: float, _: float) -> torch.Tensor:
    c, r = beta * c, beta * r
    return -logsigmoid(c) - 0.5 * (logsigmoid(-c) + logsigmoid(-r))


PREFERENCES: Mapping[str, Pairs] = {
    "sigmoid": _sigmoid,
    "ipo": lambda c, r, beta, _: (c - r - 0.5 / beta).square(),
    "hinge": lambda c, r, beta, _: torch.relu(1.0 - beta * (c - r)),
    "robust": _robust,
    "bco": _bco,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "sppo_hard": lambda c, r, beta, _: (c - 0.5 / beta).square() + (r + 0.5 / beta).square(),
    "nca": _nca,
}
"""What `dpo` makes of log-ratios, by its kind."""

SMOOTHED = ("sigmoid", "robust")


def dpo(
    log_prob: torch.Tensor,
    ref_log_prob: torch.Tensor,
    mask: torch.Tensor,
    *,
    beta: float = 0.1,
    kind: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Direct preference optimisation, and its kin.

    The first half of the batch are the chosen answers, the second the rejected ones, in their
    order. With c and r the sums over tokens of log_prob - ref_log_prob, of "ipo" their means:

        sigmoid    -log s(beta (c - r)), with the smoothing e: (1 - e) of it, e of it turned around
        ipo        (c - r - 1 / (2 beta))^2
        hinge      max(0, 1 - beta (c - r))
        robust     what is unbiased where a share e of the pairs is labelled the wrong way around
        bco        -log s(beta c - m) - log s(m - beta r), m the mean of beta c and beta r
        apo_zero   1 - s(beta c) + s(beta r)
        apo_down   s(beta c) + 1 - s(beta (c - r))
        sppo_hard  (c - 1 / (2 beta))^2 + (r + 1 / (2 beta))^2
        nca        -log s(beta c) - (log s(-beta c) + log s(-beta r)) / 2

    Args:
        log_prob: (2 B, T), of the model that learns.
        ref_log_prob: (2 B, T), of the model that it begins from; usually without a gradient.
        mask: (2 B, T), the tokens of answers.
        beta: how dear it is to leave the reference: positive.
        kind: one of the above.
        label_smoothing: e, in [0, 0.5), of the two kinds that have it.

    Returns:
        (B,), a loss for each pair.

    Raises:
        ValueError: the batch is odd, shapes differ, or a value is none of the above.

    Source: Rafailov et al., "Direct Preference Optimization" (2023); IPO of Azar et al. (2023), the
        hinge of Zhao et al., "SLiC-HF" (2023), robust of Chowdhury et al. (2024), BCO of Jung et
        al. (2024), APO of D'Oosterlinck et al. (2024), SPPO of Wu et al. (2024), NCA of Chen et al.
        (2024).

    Example:
        >>> log_prob = torch.zeros(4, 5, requires_grad=True)  # Two chosen answers, two rejected.
        >>> mask = torch.ones(4, 5, dtype=torch.bool)
        >>> loss = fastattn.losses.dpo(log_prob, torch.zeros(4, 5), mask, beta=0.1)
        >>> torch.testing.assert_close(loss, torch.full((2,), 2.0).log())
    """
    if kind not in PREFERENCES:
        raise ValueError(f"dpo: kind must be one of {', '.join(PREFERENCES)}, got {kind!r}")
    if not beta > 0.0:
        raise ValueError(f"dpo: beta must be positive, got {beta}")
    if not 0.0 <= label_smoothing < 0.5 or (label_smoothing and kind not in SMOOTHED):
        raise ValueError(
            f"dpo: label_smoothing must be in [0, 0.5), and 0 but for {' and '.join(SMOOTHED)}, "
            f"got {label_smoothing} for {kind!r}"
        )
    of_answers = masked_mean if kind == "ipo" else masked_sum
    chosen, rejected = _halves("dpo", of_answers(log_prob - ref_log_prob, mask))
    return PREFERENCES[kind](chosen, rejected, beta, label_smoothing)


def simpo(
    log_prob: torch.Tensor, mask: torch.Tensor, *, beta: float = 2.0, margin: float = 1.0
) -> torch.Tensor:
    """-log s(beta (c - r) - margin), c and r the mean log-probabilities: no reference is needed.

    Args:
        log_prob: (2 B, T), the chosen answers first, as in `dpo`.
        mask: (2 B, T), the tokens of answers.
        beta: the scale of rewards.
        margin: by how much the chosen reward is to be the larger: the paper's gamma.

    Returns:
        (B,), a loss for each pair.

    Source: Meng et al., "SimPO: Simple Preference Optimization with a Reference-Free Reward"
        (2024).

    Example:
        >>> log_prob, mask = torch.full((4, 5), -1.0), torch.ones(4, 5, dtype=torch.bool)
        >>> fastattn.losses.simpo(log_prob, mask).shape
        torch.Size([2])
    """
    chosen, rejected = _halves("simpo", masked_mean(log_prob, mask))
    return -logsigmoid(beta * (chosen - rejected) - margin)


def orpo(log_prob: torch.Tensor, mask: torch.Tensor, *, weight: float = 0.1) -> torch.Tensor:
    """The chosen answers' cross entropy, and weight times -log s of the logarithm of odds' ratio.

    Odds are p / (1 - p) of the geometric mean p of the tokens' probabilities.

    Args:
        log_prob: (2 B, T), the chosen answers first, as in `dpo`.
        mask: (2 B, T), the tokens of answers.
        weight: of the second term: the paper's lambda.

    Returns:
        (B,), a loss for each pair.

    Source: Hong et al., "ORPO: Monolithic Preference Optimization without Reference Model" (2024).

    Example:
        >>> log_prob, mask = torch.full((4, 5), -1.0), torch.ones(4, 5, dtype=torch.bool)
        >>> fastattn.losses.orpo(log_prob, mask).shape
        torch.Size([2])
    """
    mean = masked_mean(log_prob, mask)
    # log(1 - p): of p near 1, too, not a digit is lost.
    log_odds = mean - torch.log(-torch.expm1(mean))
    (chosen, _), (of_chosen, of_rejected) = _halves("orpo", mean), _halves("orpo", log_odds)
    return -chosen - weight * logsigmoid(of_chosen - of_rejected)


def kto(
    log_prob: torch.Tensor,
    ref_log_prob: torch.Tensor,
    mask: torch.Tensor,
    desirable: torch.Tensor,
    baseline: torch.Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> torch.Tensor:
    """Kahneman-Tversky optimisation: w (1 - s(beta (r - baseline))), of bad answers turned around.

    Args:
        log_prob: (B, T), of the model that learns.
        ref_log_prob: (B, T), of the model that it begins from.
        mask: (B, T), the tokens of answers.
        desirable: (B,) bools: whether an answer is good.
        baseline: what `kto_baseline` gives, the same for all.
        beta: how dear it is to leave the reference.
        desirable_weight, undesirable_weight: w of good and of bad answers.

    Returns:
        (B,), a loss for each answer.

    Source: Ethayarajh et al., "KTO: Model Alignment as Prospect Theoretic Optimization" (2024).

    Example:
        >>> log_prob, mask = torch.zeros(4, 5), torch.ones(4, 5, dtype=torch.bool)
        >>> good = torch.tensor([True, True, False, False])
        >>> fastattn.losses.kto(log_prob, log_prob, mask, good, torch.tensor(0.0)).tolist()
        [0.5, 0.5, 0.5, 0.5]
    """
    distance = beta * (masked_sum(log_prob - ref_log_prob, mask) - baseline)
    good = desirable_weight * torch.sigmoid(-distance)
    bad = undesirable_weight * torch.sigmoid(distance)
    return torch.where(desirable.bool(), good, bad)


def kto_baseline(
    log_prob: torch.Tensor, ref_log_prob: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """The divergence from the reference that `kto` measures from: a mean, at least 0, constant.

    Args:
        log_prob, ref_log_prob, mask: (B, T), of answers to other prompts than those they stand
            behind. Ranks that are to agree average it before they use it.

    Example:
        >>> log_prob, mask = torch.zeros(4, 5), torch.ones(4, 5, dtype=torch.bool)
        >>> fastattn.losses.kto_baseline(log_prob, log_prob, mask).item()
        0.0
    """
    return masked_sum(log_prob - ref_log_prob, mask).mean().clamp(min=0.0).detach()


def bradley_terry(
    chosen: torch.Tensor, rejected: torch.Tensor, margin: torch.Tensor | float = 0.0
) -> torch.Tensor:
    """-log s(chosen - rejected - margin), of rewards of any one shape: what a reward model learns.

    Source: Bradley and Terry (1952); Ouyang et al., "Training Language Models to Follow
        Instructions with Human Feedback" (2022); the margin of Touvron et al., "Llama 2" (2023).

    Example:
        >>> loss = fastattn.losses.bradley_terry(torch.zeros(3), torch.zeros(3))
        >>> torch.testing.assert_close(loss, torch.full((3,), 2.0).log())
    """
    return -logsigmoid(chosen - rejected - margin)


def _halves(name: str, of_sequences: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The chosen and the rejected half of a batch."""
    if of_sequences.shape[0] % 2:
        raise ValueError(
            f"{name}: log_prob must have chosen answers and as many rejected ones, got a batch of "
            f"{of_sequences.shape[0]}"
        )
    chosen, rejected = of_sequences.chunk(2)
    return chosen, rejected
