"""The ops whose compiled code and host cost are checked, at representative shapes and dtypes.

A new op adds one entry to OPS and gets all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

import fastattn

from .op import Op


def torch_layer_norm(x: torch.Tensor, **parameters: Any) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], **parameters)


def torch_rms_norm(x: torch.Tensor, **parameters: Any) -> torch.Tensor:
    return F.rms_norm(x, x.shape[-1:], **parameters)


def torch_add(
    norm: Callable[..., torch.Tensor],
    x: torch.Tensor,
    residual: torch.Tensor,
    dropout_p: float = 0.0,
    **parameters: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    hidden = F.dropout(x, dropout_p) + residual
    return norm(hidden, **parameters), hidden


def norm_arguments(rows: int, columns: int, *extra: str, **options: Any) -> dict[str, Any]:
    shapes = {"residual": (rows, columns), "bias": (columns,)}
    chosen = {name: shapes[name] for name in extra}
    return {"x": (rows, columns), "weight": (columns,)} | chosen | options


def norm(
    name: str,
    call: Callable[..., Any],
    torch: Callable[..., Any],
    *extra: str,
    quick_widths: Sequence[int] = (1024, 8192, 65536),
    **options: Any,
) -> Op:
    """An entry for a norm over the last dimension."""
    rows = 4096
    # Rows of a quarter of a warp up to rows that no register file holds. 1000 is divisible by 8 and
    # not by 16, 1023 by no power of two.
    widths = (64, 128, 1000, 1023, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 262144)
    return Op(
        name,
        call,
        lambda rows, columns: norm_arguments(rows, columns, *extra, **options),
        shapes=[(rows, width) for width in widths],
        quick_shapes=[(rows, width) for width in quick_widths],
        small=(8, 256),
        torch=torch,
    )


OPS = (
    norm(
        "rms_norm",
        fastattn.rms_norm,
        torch_rms_norm,
        quick_widths=(64, 1000, 1024, 4096, 8192, 16384, 65536),
    ),
    norm("layer_norm", fastattn.layer_norm, torch_layer_norm, "bias"),
    norm(
        "add_rms_norm",
        fastattn.add_rms_norm,
        partial(torch_add, torch_rms_norm),
        "residual",
        quick_widths=(),
    ),
    norm(
        "add_layer_norm+dropout",
        fastattn.add_layer_norm,
        partial(torch_add, torch_layer_norm),
        "residual",
        "bias",
        dropout_p=0.1,
    ),
    Op(
        "dropout",
        fastattn.dropout,
        lambda rows, columns: {"x": (rows, columns), "p": 0.1},
        shapes=[(4096, 4096)],
        quick_shapes=[(4096, 4096)],
        small=(8, 256),
        torch=lambda x, p: F.dropout(x, p),
    ),
)
