"""Sums and means of the tokens that count, and rows without those that do not."""

import torch


def masked_sum(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The sum over the last dimension of what the mask keeps: (B, T) to (B,).

    Example:
        >>> x, mask = torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[True, True, False]])
        >>> fastattn.losses.masked_sum(x, mask).tolist()
        [4.0]
    """
    return torch.where(mask.bool(), x, 0.0).sum(-1)


def masked_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mean over the last dimension of what the mask keeps, 0 of nothing: (B, T) to (B,).

    Example:
        >>> x, mask = torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[True, True, False]])
        >>> fastattn.losses.masked_mean(x, mask).tolist()
        [2.0]
    """
    return masked_sum(x, mask) / mask.bool().sum(-1).clamp(min=1)


def whiten(x: torch.Tensor, mask: torch.Tensor, *, shift: bool = True) -> torch.Tensor:
    """x with the variance 1 over all tokens that count, and the mean 0 or, unshifted, its own.

    The others become 0. The variance is that of a sample, with n - 1 in its denominator, and 1e-8
    is added to it.

    Source: advantages as Ziegler et al., "Fine-Tuning Language Models from Human Preferences"
        (2019) whiten them.

    Example:
        >>> x, mask = torch.randn(2, 8), torch.ones(2, 8, dtype=torch.bool)
        >>> torch.testing.assert_close(fastattn.losses.whiten(x, mask).mean(), torch.tensor(0.0))
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

    Example:
        >>> x, target = torch.randn(2, 3, 8), torch.tensor([[-100, 1, 2], [-100, -100, 3]])
        >>> rows, targets, places = fastattn.losses.pack_rows(x, target)
        >>> rows.shape, targets.tolist()
        (torch.Size([3, 8]), [1, 2, 3])
    """
    targets = target.reshape(-1)
    (places,) = torch.nonzero(targets != ignore_index, as_tuple=True)
    return x.reshape(-1, x.shape[-1])[places], targets[places], places


def unpack_rows(
    numbers: torch.Tensor, places: torch.Tensor, shape: torch.Size | tuple[int, ...]
) -> torch.Tensor:
    """Numbers (W,) of packed rows in their places of a tensor of zeros: see `pack_rows`.

    Example:
        >>> target = torch.tensor([[-100, 1], [-100, 3]])
        >>> rows, targets, places = fastattn.losses.pack_rows(torch.randn(2, 2, 8), target)
        >>> fastattn.losses.unpack_rows(targets.float(), places, target.shape).tolist()
        [[0.0, 1.0], [0.0, 3.0]]
    """
    flat = numbers.new_zeros(torch.Size(shape).numel())
    return flat.index_put((places,), numbers).reshape(shape)
