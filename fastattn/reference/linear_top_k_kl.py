"""The divergence of a head from the few classes that a teacher kept, in plain PyTorch."""

import torch

from . import torch_functions as F


def linear_top_k_kl(
    x: torch.Tensor,
    weight: torch.Tensor,
    teacher_ids: torch.Tensor,
    teacher_log_probs: torch.Tensor,
    target_mask: torch.Tensor | None = None,
    *,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    chunk_rows: int | None = None,
) -> torch.Tensor:
    """The divergence of the logits of all rows at once, which chunk_rows does not change."""
    computed = torch.promote_types(x.dtype, torch.float32)
    if target_mask is not None:
        x = x.masked_fill(~target_mask[..., None], 0.0)
    logits = F.linear(x, weight, bias).to(computed)
    ids, log_q = read_teacher(
        teacher_ids, teacher_log_probs, target_mask, weight.shape[0], computed
    )
    log_p = F.log_softmax(logits / temperature, -1).gather(-1, ids)
    divergence = compare(log_p, log_q).sum(-1)
    return divergence if target_mask is None else divergence.masked_fill(~target_mask, 0.0)


def read_teacher(
    ids: torch.Tensor,
    log_probs: torch.Tensor,
    mask: torch.Tensor | None,
    classes: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids that can all be read, and log q: -inf of absent entries, NaN of what is no class."""
    log_q = log_probs.detach().to(dtype)
    if mask is not None:
        log_q = log_q.masked_fill(~mask[..., None], float("-inf"))
    absent = log_q == float("-inf")
    unknown = (ids < 0) | (ids >= classes)
    log_q = log_q.masked_fill(unknown & ~absent, float("nan"))
    return ids.to(torch.int64).masked_fill(unknown | absent, 0), log_q


def compare(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """The terms of the sum. What has no probability has no part in it."""
    q = log_q.exp()
    return torch.where(q == 0.0, 0.0, q * (log_q - log_p))
