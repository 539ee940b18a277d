"""Cross entropy of logits with class indices: the launchers, see cross_entropy_kernels.py.

logits are (..., V), target and everything a row has are (...).
"""

import functools
from collections.abc import Callable

import torch

from .config import cdiv, device_target
from .cross_entropy_config import cross_entropy_backward_config, cross_entropy_forward_config
from .cross_entropy_kernels import cross_entropy_backward_kernel, cross_entropy_forward_kernel
from .cross_entropy_terms import Coefficients, Layout, Loss
from .launch import MOST_BOUND, common_divisor, empty_rows, flatten_rows
from .row_tiles import Blocks
from .structures import Rows


def cross_entropy_forward(
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    logit_scale: float,
    softcap: float | None,
    loss_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch the forward: (loss, lse, lse_error, weight) of every row."""
    cols = logits.shape[-1]
    computed = torch.float64 if logits.dtype is torch.float64 else torch.float32
    leading = logits.shape[:-1]
    loss = torch.empty(leading, dtype=loss_dtype, device=logits.device)
    lse = torch.empty(leading, dtype=computed, device=logits.device)
    lse_error = torch.empty_like(lse)
    row_weight = torch.empty_like(lse)
    if logits.numel() == 0:
        return loss, lse, lse_error, row_weight

    logits, stride_xm = flatten_rows(logits, cols)
    rows = lse.numel()
    launch, block_m = _bind_forward(
        cols, stride_xm, label_smoothing, z_loss, logit_scale, softcap, loss_dtype, logits.device
    )
    launch(
        (cdiv(rows, block_m), 1, 1),
        logits_ptr=logits,
        target_ptr=target.contiguous(),
        weight_ptr=None if weight is None else weight.contiguous(),
        weight_sum_ptr=_smoothed_weight(weight, label_smoothing, computed),
        loss_ptr=loss,
        lse_ptr=lse,
        lse_error_ptr=lse_error,
        row_weight_ptr=row_weight,
        entropy_ptr=None,
        correct_ptr=None,
        rows=rows,
        ignore_index=ignore_index,
    )
    return loss, lse, lse_error, row_weight


@functools.lru_cache(MOST_BOUND)
def _bind_forward(
    cols: int,
    stride_xm: int,
    label_smoothing: float,
    z_loss: float,
    logit_scale: float,
    softcap: float | None,
    loss_dtype: torch.dtype,
    device: torch.device,
) -> tuple[Callable[..., None], int]:
    """The launch with all that a model repeats, and its rows of a tile."""
    config = cross_entropy_forward_config(cols, device_target(device.index))
    launch = cross_entropy_forward_kernel.bind(
        config.num_warps,
        # loss_dtype is an argument for the sake of this.
        fresh=("loss_ptr", "lse_ptr", "lse_error_ptr", "row_weight_ptr"),
        layout=Layout(stride_xm, cols),
        coefficients=Coefficients(label_smoothing, label_smoothing / cols, z_loss, logit_scale),
        LOSS=Loss(label_smoothing > 0.0, logit_scale != 1.0, softcap),
        BLOCKS=Blocks(config.block_m, config.block_n, common_divisor(cols, stride_xm)),
    )
    return launch, config.block_m


def cross_entropy_backward(
    dloss: torch.Tensor,
    dlse: torch.Tensor | None,
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    lse: torch.Tensor,
    lse_error: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    logit_scale: float,
    softcap: float | None,
    overwrite: bool = False,
) -> torch.Tensor:
    """Launch the backward of the rows' losses: dlogits.

    With `overwrite` it takes the memory of the logits, which have to be contiguous.
    """
    cols = logits.shape[-1]
    dlogits = logits.detach() if overwrite else empty_rows(logits, logits.dtype)
    if logits.numel() == 0:
        return dlogits

    logits, stride_xm = flatten_rows(logits, cols)
    launch, block_m, block_n = _bind_backward(
        cols, stride_xm, label_smoothing, z_loss, logit_scale, softcap, logits.device
    )
    rows = lse.numel()
    launch(
        (cdiv(rows, block_m) * cdiv(cols, block_n), 1, 1),
        dloss_view=view_numbers(dloss),
        dlse_view=None if dlse is None else view_numbers(dlse),
        dentropy_view=None,
        logits_ptr=logits,
        target_ptr=target.contiguous(),
        weight_ptr=None if weight is None else weight.contiguous(),
        weight_sum_ptr=_smoothed_weight(weight, label_smoothing, lse.dtype),
        lse_ptr=lse,
        lse_error_ptr=lse_error,
        entropy_ptr=None,
        dlogits_ptr=dlogits,
        rows=rows,
        ignore_index=ignore_index,
    )
    return dlogits


@functools.lru_cache(MOST_BOUND)
def _bind_backward(
    cols: int,
    stride_xm: int,
    label_smoothing: float,
    z_loss: float,
    logit_scale: float,
    softcap: float | None,
    device: torch.device,
) -> tuple[Callable[..., None], int, int]:
    """The launch with all that a model repeats, and the rows and columns of its tiles."""
    config = cross_entropy_backward_config(cols, device_target(device.index))
    launch = cross_entropy_backward_kernel.bind(
        config.num_warps,
        layout=Layout(stride_xm, cols),
        coefficients=Coefficients(label_smoothing, label_smoothing / cols, z_loss, logit_scale),
        LOSS=Loss(label_smoothing > 0.0, logit_scale != 1.0, softcap),
        BLOCKS=Blocks(config.block_m, config.block_n, common_divisor(cols, stride_xm)),
    )
    return launch, config.block_m, config.block_n


def view_numbers(x: torch.Tensor) -> Rows:
    """One number of each row."""
    x = x.reshape(-1)
    return Rows(x, 2 * x.stride(0) + 3)


def _smoothed_weight(
    weight: torch.Tensor | None, label_smoothing: float, dtype: torch.dtype
) -> torch.Tensor | None:
    """The sum of the class weights, which label smoothing asks for."""
    if weight is None or label_smoothing == 0.0:
        return None
    return weight.sum(dtype=dtype)
