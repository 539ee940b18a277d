"""Log-probabilities of classes in plain PyTorch, of logits and of those of a linear layer."""

import torch

from . import torch_functions as F
from .softcap import softcapped

Outputs = torch.Tensor | tuple[torch.Tensor, ...]


def log_prob(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    return_entropy: bool = False,
    return_correct: bool = False,
) -> Outputs:
    """torch's log_softmax of scaled, capped and tempered logits, gathered at the target.

    A row that is ignored is blanked, and one whose target is no class has a log-probability of NaN.
    """
    ignored = target == ignore_index
    exists = (target >= 0) & (target < logits.shape[-1])
    computed = torch.promote_types(logits.dtype, torch.float32)
    x = logits.to(computed).masked_fill(ignored[..., None], 0.0)
    z = x if logit_scale == 1.0 else x * logit_scale
    z = z if softcap is None else softcapped(z, softcap)
    z = z if temperature == 1.0 else z / temperature
    log_p = F.log_softmax(z, -1)
    chosen = log_p.gather(-1, torch.where(exists, target, 0)[..., None])[..., 0]
    chosen = torch.where(exists, 1.0, float("nan")) * chosen
    outputs = [chosen.masked_fill(ignored, 0.0)]
    if return_entropy:
        p = log_p.exp()
        # What has no probability has no part in it, be its logarithm infinite.
        entropy = -(p * torch.where(p == 0.0, 0.0, log_p)).sum(-1)
        outputs.append(entropy.masked_fill(ignored, 0.0))
    if return_correct:
        outputs.append((x.argmax(-1) == target) & ~ignored & ~x.amax(-1).isnan())
    return tuple(outputs) if len(outputs) > 1 else outputs[0]


def linear_log_prob(
    x: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    return_entropy: bool = False,
    return_correct: bool = False,
    chunk_rows: int | None = None,
) -> Outputs:
    """log_prob of the logits of all rows at once, which chunk_rows does not change."""
    # Not even NaN in an ignored row gets anywhere: with 0 for a gradient it makes the weight's.
    x = x.masked_fill((target == ignore_index)[..., None], 0.0)
    return log_prob(
        F.linear(x, weight, bias),
        target,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        ignore_index=ignore_index,
        return_entropy=return_entropy,
        return_correct=return_correct,
    )
