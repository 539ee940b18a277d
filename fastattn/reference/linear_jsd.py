"""The divergence of two heads in plain PyTorch."""

import math

import torch

from . import torch_functions as F


def linear_jsd(
    x: torch.Tensor,
    weight: torch.Tensor,
    teacher_x: torch.Tensor,
    teacher_weight: torch.Tensor,
    target_mask: torch.Tensor | None = None,
    *,
    bias: torch.Tensor | None = None,
    teacher_bias: torch.Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    chunk_rows: int | None = None,
) -> torch.Tensor:
    """The divergence of the logits of all rows at once, which chunk_rows does not change."""
    computed = torch.promote_types(x.dtype, torch.float32)
    if target_mask is not None:
        left_out = ~target_mask[..., None]
        x, teacher_x = x.masked_fill(left_out, 0.0), teacher_x.masked_fill(left_out, 0.0)
    with torch.no_grad():
        teacher = F.linear(teacher_x, teacher_weight, teacher_bias).to(computed)
    student = F.linear(x, weight, bias).to(computed)
    log_p, log_q = (F.log_softmax(z / temperature, -1) for z in (student, teacher))
    divergence = compare(log_p, log_q.detach(), beta)[1].sum(-1)
    return divergence if target_mask is None else divergence.masked_fill(~target_mask, 0.0)


def compare(
    log_p: torch.Tensor, log_q: torch.Tensor, beta: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """p, the terms of the sum, and s, by the names of kernels/jsd.py.

    What has no probability has no part in it, be its logarithm infinite.
    """
    p, q = log_p.exp(), log_q.exp()
    if beta == 0.0:
        return p, torch.where(q == 0.0, 0.0, q * (log_q - log_p)), torch.zeros_like(p)
    log_m = log_q
    if beta < 1.0:
        log_m = torch.logaddexp(log_q + math.log(beta), log_p + math.log1p(-beta))
    slope = torch.where(p == 0.0, 0.0, log_p - log_m)
    if beta == 1.0:
        return p, p * slope, slope
    slope = (1.0 - beta) * slope
    return p, p * slope + torch.where(q == 0.0, 0.0, beta * q * (log_q - log_m)), slope
