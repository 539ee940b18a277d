"""Log-probabilities of classes, entropies and hits: launchers of the kernels of cross entropy.

The formulas are in cross_entropy_kernels.py. logits are (..., V), target and everything a row has
are (...), computed in float32 (float64 for float64 logits). Saved are the logits, lse, its error
and, where it is wanted, the entropy. Logits are multiplied by a scale, capped, and divided by a
temperature; without a cap scale and temperature are one factor.
"""

import functools
from collections.abc import Callable

import torch

from .config import cdiv, device_target
from .cross_entropy import view_numbers
from .cross_entropy_config import cross_entropy_backward_config, cross_entropy_forward_config
from .cross_entropy_kernels import cross_entropy_backward_kernel, cross_entropy_forward_kernel
from .cross_entropy_terms import Coefficients, Layout, Loss
from .launch import MOST_BOUND, common_divisor, empty_rows, flatten_rows
from .row_tiles import Blocks


def log_prob_forward(
    logits: torch.Tensor,
    target: torch.Tensor,
    ignore_index: int,
    with_entropy: int,
    with_correct: int,
    logit_scale: float,
    temperature: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """Launch the forward: (log_prob, entropy, correct, lse, lse_error) of every row."""
    cols = logits.shape[-1]
    computed = torch.float64 if logits.dtype is torch.float64 else torch.float32
    log_prob = torch.empty(logits.shape[:-1], dtype=computed, device=logits.device)
    lse, lse_error = torch.empty_like(log_prob), torch.empty_like(log_prob)
    entropy = torch.empty_like(log_prob) if with_entropy else None
    correct = torch.empty_like(log_prob, dtype=torch.bool) if with_correct else None
    if logits.numel() == 0:
        return log_prob, entropy, correct, lse, lse_error

    logits, stride_xm = flatten_rows(logits, cols)
    rows = lse.numel()
    wanted = bool(with_entropy), bool(with_correct)
    launch, block_m = _bind_forward(
        cols, stride_xm, wanted, logit_scale, temperature, softcap, logits.device
    )
    launch(
        (cdiv(rows, block_m), 1, 1),
        logits_ptr=logits,
        target_ptr=target.contiguous(),
        weight_ptr=None,
        weight_sum_ptr=None,
        loss_ptr=log_prob,
        lse_ptr=lse,
        lse_error_ptr=lse_error,
        row_weight_ptr=None,
        entropy_ptr=entropy,
        correct_ptr=correct,
        rows=rows,
        ignore_index=ignore_index,
    )
    return log_prob, entropy, correct, lse, lse_error


@functools.lru_cache(MOST_BOUND)
def _bind_forward(
    cols: int,
    stride_xm: int,
    wanted: tuple[bool, bool],
    logit_scale: float,
    temperature: float,
    softcap: float | None,
    device: torch.device,
) -> tuple[Callable[..., None], int]:
    """The launch with all that a model repeats, and its rows of a tile."""
    config = cross_entropy_forward_config(cols, device_target(device.index))
    coefficients, loss = _describe(logit_scale, temperature, softcap)
    launch = cross_entropy_forward_kernel.bind(
        config.num_warps,
        # Which of them are None is in `wanted`, an argument for the sake of this.
        fresh=("loss_ptr", "lse_ptr", "lse_error_ptr", "entropy_ptr", "correct_ptr"),
        layout=Layout(stride_xm, cols),
        coefficients=coefficients,
        LOSS=loss,
        BLOCKS=Blocks(config.block_m, config.block_n, common_divisor(cols, stride_xm)),
    )
    return launch, config.block_m


def log_prob_backward(
    dlog_prob: torch.Tensor,
    dentropy: torch.Tensor | None,
    logits: torch.Tensor,
    target: torch.Tensor,
    lse: torch.Tensor,
    lse_error: torch.Tensor,
    entropy: torch.Tensor | None,
    ignore_index: int,
    logit_scale: float,
    temperature: float,
    softcap: float | None,
    overwrite: bool = False,
) -> torch.Tensor:
    """Launch the backward: dlogits.

    With `overwrite` it takes the memory of the logits, which have to be contiguous.
    """
    cols = logits.shape[-1]
    dlogits = logits.detach() if overwrite else empty_rows(logits, logits.dtype)
    if logits.numel() == 0:
        return dlogits

    logits, stride_xm = flatten_rows(logits, cols)
    launch, block_m, block_n = _bind_backward(
        cols, stride_xm, logit_scale, temperature, softcap, logits.device
    )
    rows = lse.numel()
    launch(
        (cdiv(rows, block_m) * cdiv(cols, block_n), 1, 1),
        dloss_view=view_numbers(dlog_prob),
        dlse_view=None,
        dentropy_view=None if dentropy is None else view_numbers(dentropy),
        logits_ptr=logits,
        target_ptr=target.contiguous(),
        weight_ptr=None,
        weight_sum_ptr=None,
        lse_ptr=lse,
        lse_error_ptr=lse_error,
        entropy_ptr=None if dentropy is None else entropy,
        dlogits_ptr=dlogits,
        rows=rows,
        ignore_index=ignore_index,
    )
    return dlogits


@functools.lru_cache(MOST_BOUND)
def _bind_backward(
    cols: int,
    stride_xm: int,
    logit_scale: float,
    temperature: float,
    softcap: float | None,
    device: torch.device,
) -> tuple[Callable[..., None], int, int]:
    """The launch with all that a model repeats, and the rows and columns of its tiles."""
    config = cross_entropy_backward_config(cols, device_target(device.index))
    coefficients, loss = _describe(logit_scale, temperature, softcap)
    launch = cross_entropy_backward_kernel.bind(
        config.num_warps,
        layout=Layout(stride_xm, cols),
        coefficients=coefficients,
        LOSS=loss,
        BLOCKS=Blocks(config.block_m, config.block_n, common_divisor(cols, stride_xm)),
    )
    return launch, config.block_m, config.block_n


def _describe(
    logit_scale: float, temperature: float, softcap: float | None
) -> tuple[Coefficients, Loss]:
    """What a log-probability is to the kernels: the negative of a loss without other terms."""
    sharpness = 1.0 / temperature
    if softcap is None:
        logit_scale, sharpness = logit_scale / temperature, 1.0
    coefficients = Coefficients(0.0, 0.0, 0.0, logit_scale, sharpness)
    loss = Loss(False, logit_scale != 1.0, softcap, sharpness != 1.0, negated=True)
    return coefficients, loss
