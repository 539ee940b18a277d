"""Checks of what a user passes to the rotary ops."""

import torch

from ..reference.rotary import split_tables
from .core.arguments import check_float_tensor, refuse_nested


def check_form(op: str, cos: torch.Tensor, sin: torch.Tensor | None, full_width: bool) -> None:
    """The form in which angles come, as far as it is needed to tell cos from sin."""
    is_complex = isinstance(cos, torch.Tensor) and cos.is_complex()
    if is_complex != (sin is None):
        got = "None" if sin is None else "a second table"
        raise TypeError(f"{op}: sin must be None beside complex cos, and nowhere else, got {got}")
    if full_width:
        if is_complex:
            raise ValueError(
                f"{op}: full_width must be False for complex cos, which has R/2 columns"
            )
        for name, table in (("cos", cos), ("sin", sin)):
            check_float_tensor(op, name, table)
            if table.dim() == 0 or table.shape[-1] % 2:  # type: ignore[union-attr]
                raise ValueError(
                    f"{op}: {name} must have R columns, an even number, with full_width, "
                    f"got {tuple(table.shape)}"  # type: ignore[union-attr]
                )


def pair_tables(
    cos: torch.Tensor, sin: torch.Tensor | None, interleaved: bool, full_width: bool
) -> tuple[torch.Tensor, torch.Tensor | None, bool]:
    """The tables as the kernel reads them in place, and whether their rows are of pairs."""
    if sin is None:
        return torch.view_as_real(cos.resolve_conj()).flatten(-2), None, True
    if full_width and interleaved:
        return cos, sin, True
    return *split_tables(cos, sin, interleaved, full_width), False


def check_rotary(
    op: str,
    tensors: dict[str, torch.Tensor],
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | int | None,
    cu_seqlens: torch.Tensor | None,
) -> None:
    """All arguments; nothing is asked of numbers that lie on a GPU."""
    name, x = next(iter(tensors.items()))
    for other, tensor in tensors.items():
        check_float_tensor(op, other, tensor)
        if tensor.dim() not in (3, 4):
            raise ValueError(
                f"{op}: {other} must be (B, H, S, D) or (H, S, D), got {tuple(tensor.shape)}"
            )
        if tensor.dtype is not x.dtype or tensor.device != x.device:
            raise TypeError(
                f"{op}: {other} must be like {name}, {x.dtype} on {x.device}, "
                f"got {tensor.dtype} on {tensor.device}"
            )
        but_heads = (*tensor.shape[:-3], *tensor.shape[-2:])
        if but_heads != (*x.shape[:-3], *x.shape[-2:]):
            raise ValueError(
                f"{op}: {other} must have {name}'s shape {tuple(x.shape)} but for the heads, "
                f"got {tuple(tensor.shape)}"
            )
    for other, table in (("cos", cos), ("sin", sin)):
        check_float_tensor(op, other, table)
        if table.device != x.device:
            raise ValueError(f"{op}: {other} must be on {x.device}, got {table.device}")
        if table.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{op}: {other} requires a gradient, which rotary tables do not get; "
                f"pass {other}.detach(), or learn angles through fastattn.reference.apply_rotary"
            )
    if sin.shape != cos.shape:
        raise ValueError(
            f"{op}: sin must have cos's shape {tuple(cos.shape)}, got {tuple(sin.shape)}"
        )
    if positions is not None:
        _check_positions(op, x, positions)
    if cu_seqlens is not None:
        _check_cu_seqlens(op, x, cu_seqlens)
        if isinstance(positions, torch.Tensor):
            raise ValueError(f"{op}: positions must be an int or None where cu_seqlens is given")
    _check_tables(op, name, x, cos, positions, cu_seqlens)


def _check_tables(
    op: str,
    name: str,
    x: torch.Tensor,
    cos: torch.Tensor,
    positions: torch.Tensor | int | None,
    cu_seqlens: torch.Tensor | None,
) -> None:
    length, head_dim = x.shape[-2:]
    half = cos.shape[-1] if cos.dim() else 0
    if cos.dim() not in (2, 3) or half == 0 or 2 * half > head_dim:
        raise ValueError(
            f"{op}: cos must be (positions, R/2) or (B, S, R/2) with 0 < R <= {head_dim} columns "
            f"of {name} to turn, got {tuple(cos.shape)}; a table of R columns, which has every "
            "angle twice, needs full_width=True"
        )
    if cos.dim() == 3:
        batches = x.shape[0] if x.dim() == 4 else 1
        if cos.shape[0] not in (1, batches) or cos.shape[1] != length:
            raise ValueError(
                f"{op}: cos must be ({batches} or 1, {length}, R/2) for {name} of shape "
                f"{tuple(x.shape)}, got {tuple(cos.shape)}"
            )
        if positions is not None or cu_seqlens is not None:
            raise ValueError(
                f"{op}: cos has a row for each token already, so positions and cu_seqlens must be "
                "None"
            )
        return
    if isinstance(positions, torch.Tensor) or cu_seqlens is not None:
        if cos.shape[0] == 0:
            raise ValueError(f"{op}: cos must have at least one row")
        return
    needed = length + (positions or 0)
    if cos.shape[0] < needed:
        raise ValueError(
            f"{op}: cos must have a row for each of {needed} positions, got {tuple(cos.shape)}"
        )


def _check_positions(op: str, x: torch.Tensor, positions: torch.Tensor | int) -> None:
    if not isinstance(positions, torch.Tensor):
        if positions < 0:
            raise ValueError(f"{op}: positions must not be negative, got {positions}")
        return
    _check_integers(op, "positions", positions, x)
    length = x.shape[-2]
    batches = x.shape[0] if x.dim() == 4 else 1
    if positions.shape not in ((length,), (1, length), (batches, length)):
        raise ValueError(
            f"{op}: positions must be ({length},) or ({batches}, {length}), "
            f"got {tuple(positions.shape)}"
        )


def _check_cu_seqlens(op: str, x: torch.Tensor, cu_seqlens: torch.Tensor) -> None:
    _check_integers(op, "cu_seqlens", cu_seqlens, x)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(
            f"{op}: cu_seqlens must be (sequences + 1,), got {tuple(cu_seqlens.shape)}"
        )
    if x.dim() == 4 and x.shape[0] != 1:
        raise ValueError(
            f"{op}: with cu_seqlens all sequences lie in one batch entry, got {tuple(x.shape)}"
        )
    # Numbers are looked at where that costs no synchronisation.
    if type(cu_seqlens) is not torch.Tensor or cu_seqlens.device.type != "cpu":
        return
    if torch.compiler.is_compiling():
        return
    if cu_seqlens[0] != 0 or (cu_seqlens[1:] < cu_seqlens[:-1]).any():
        raise ValueError(f"{op}: cu_seqlens must rise from 0, got {cu_seqlens.tolist()}")


def _check_integers(op: str, name: str, tensor: object, x: torch.Tensor) -> None:
    if not isinstance(tensor, torch.Tensor) or tensor.dtype not in (torch.int32, torch.int64):
        got = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise TypeError(f"{op}: {name} must be a tensor of int32 or int64, got {got}")
    if tensor.device != x.device:
        raise ValueError(f"{op}: {name} must be on {x.device}, got {tensor.device}")
    if tensor.is_nested:
        refuse_nested(op, name)
