"""What flash-attn's arguments mean in ours, and the errors of those that mean nothing here."""

import torch

BHSD = ("batch", "length", "heads", "head dimension")
THD = ("tokens", "heads", "head dimension")


def check_layout(op: str, layout: tuple[str, ...], **tensors: torch.Tensor) -> None:
    """Each tensor has the dimensions of `layout`, of which flash-attn has the heads last but one.

    Raises:
        TypeError: an argument is no tensor.
        ValueError: one has other dimensions.
    """
    for name, x in tensors.items():
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}")
        if x.ndim != len(layout):
            raise ValueError(
                f"{op}: {name} must be ({', '.join(layout)}), got the shape {tuple(x.shape)}"
            )


def part_packed(
    op: str, name: str, packed: torch.Tensor, parts: int, dim: int
) -> tuple[torch.Tensor, ...]:
    """The `parts` tensors that lie in dimension `dim` of one, as views.

    Raises:
        TypeError: it is no tensor.
        ValueError: that dimension is of another size.
    """
    if not isinstance(packed, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(packed).__name__}")
    if packed.ndim != dim + 3 or packed.shape[dim] != parts:
        layout = [*(BHSD if dim == 2 else THD)]
        layout.insert(dim, str(parts))
        raise ValueError(
            f"{op}: {name} must be ({', '.join(layout)}), got the shape {tuple(packed.shape)}"
        )
    return packed.unbind(dim)


def read_window(op: str, window_size: tuple[int, int]) -> tuple[int | None, int | None] | None:
    """`window` of `fastattn.attention`: a negative number, as -1, is no limit on its side.

    Raises:
        TypeError: it is no pair of integers.
    """
    try:
        left, right = (int(reach) for reach in window_size)
    except (TypeError, ValueError):
        raise TypeError(
            f"{op}: window_size must be a pair of integers (left, right), -1 for no limit, "
            f"got {window_size!r}"
        ) from None
    sides = (None if left < 0 else left, None if right < 0 else right)
    return None if sides == (None, None) else sides


def read_softcap(softcap: float | None) -> float | None:
    """`softcap` of `fastattn.attention`: 0 and what is negative are none."""
    return softcap if softcap is not None and softcap > 0.0 else None


def read_length(op: str, name: str, length: int | torch.Tensor) -> int:
    """A length as an integer, of a tensor of one element too, which waits for its device.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(length, torch.Tensor) and length.numel() == 1:
        return int(length.item())
    if isinstance(length, torch.Tensor) or not hasattr(length, "__index__"):
        raise TypeError(f"{op}: {name} must be an integer or a tensor of one, got {length!r}")
    return length


def refuse(op: str, **arguments: object) -> None:
    """The error for an argument of flash-attn's that has no counterpart here, if it is given.

    None and False say that it is not.

    Raises:
        NotImplementedError: one is given; its name is in the message.
    """
    for name, value in arguments.items():
        if value is not None and value is not False:
            raise NotImplementedError(f"{op}: {name} is not supported by fastattn; leave it out")
