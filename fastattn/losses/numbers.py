"""Sums and means of the tokens that count, and rows without those that do not."""

import torch


def masked_sum(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The sum over the last dimension of what the mask keeps: (B, T) to (B,)."""
    return torch.where(mask.bool(), x, 0.0).sum(-1)


def masked_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mean over the last dimension of what the mask keeps, 0 of nothing: (B, T) to (B,)."""
    return masked_sum(x, mask) / mask.bool().sum(-1).clamp(min=1)


def whiten(x: torch.Tensor, mask: torch.Tensor, *, shift: bool = True) -> torch.Tensor:
    """x with the variance 1 over all tokens that count, and the mean 0 or, unshifted, its own.

    The others become 0. The variance is that of a sample, with n - 1 in its denominator, and 1e-8
    is added to it.

    Source: advantages as Ziegler et al., "Fine-Tuning Language Models from Human Preferences"
        (2019) whiten them.
    """
    mask = mask.bool()
    count = mask.sum()
    mean = torch.where(mask, x, 0.0).sum() / count.clamp(min=1)
    centred = torch.where(mask, x - mean, 0.0)
    variance = centred.square().sum() / (count - 1).clamp(min=1)
    white = centred * (variance + 1e-8).rsqrt()
    return white if shift else torch.where(mask, white + mean, 0.0)


def pack_rows(
    x: torch.Tensor, target: torch.Tensor, ignore_index: int = -100
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The rows of x whose target counts, so that no others are multiplied.

    How many there are is read from the device, for which the host waits.

    Args:
        x: (..., D).
        target: (...), int64, `ignore_index` where a row does not count.
        ignore_index: the target of rows that do not count.

    Returns:
        rows (W, D), targets (W,), and places (W,), where `unpack_rows` puts what comes of them.
    """
    targets = target.reshape(-1)
    (places,) = torch.nonzero(targets != ignore_index, as_tuple=True)
    return x.reshape(-1, x.shape[-1])[places], targets[places], places


def unpack_rows(
    numbers: torch.Tensor, places: torch.Tensor, shape: torch.Size | tuple[int, ...]
) -> torch.Tensor:
    """Numbers (W,) of packed rows in their places of a tensor of zeros: see `pack_rows`."""
    flat = numbers.new_zeros(torch.Size(shape).numel())
    return flat.index_put((places,), numbers).reshape(shape)
