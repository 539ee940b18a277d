"""Taking the padding out of a batch, and putting it back: flash_attn.bert_padding."""

import torch
from torch.nn.functional import pad

Unpadded = tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, torch.Tensor]


def index_first_axis(input: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """The rows of a tensor with these indices.

    Args:
        input: (rows, ...), of two dimensions or more.
        indices: (Z,) int32 or int64.

    Returns:
        (Z, ...), differentiable in `input`.

    Raises:
        IndexError: an index is no row, on a CPU.

    Source: flash_attn/bert_padding.py of flash-attn 2.8.

    Example:
        >>> index_first_axis(torch.arange(6).view(3, 2), torch.tensor([2, 0])).tolist()
        [[4, 5], [0, 1]]
    """
    return input.index_select(0, indices)


def index_put_first_axis(
    values: torch.Tensor, indices: torch.Tensor, first_axis_dim: int
) -> torch.Tensor:
    """A tensor of `first_axis_dim` rows with `values` at these indices and 0 elsewhere.

    Args:
        values: (Z, ...), of two dimensions or more.
        indices: (Z,) int32 or int64, each at most once.
        first_axis_dim: the number of rows.

    Returns:
        (first_axis_dim, ...), differentiable in `values`.

    Raises:
        IndexError: an index is no row, on a CPU.

    Source: as `index_first_axis`.

    Example:
        >>> index_put_first_axis(torch.ones(1, 2), torch.tensor([1]), 3).tolist()
        [[0.0, 0.0], [1.0, 1.0], [0.0, 0.0]]
    """
    rows = values.new_zeros(first_axis_dim, *values.shape[1:])
    return rows.index_copy(0, indices.long(), values)


def unpad_input(
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor,
    unused_mask: torch.Tensor | None = None,
) -> Unpadded:
    """The tokens of a padded batch one after another, and where each row's tokens begin.

    Args:
        hidden_states: (B, S, ...).
        attention_mask: (B, S) booleans or integers, 1 where a token counts. A row may have none.
        unused_mask: (B, S), 1 where a token is kept that does not count, or None.

    Returns:
        Five, as flash-attn since 2.7 (before it were the first four): the tokens (Z, ...); their
        indices (Z,) int64 among all B S; cu_seqlens (B + 1,) int32; the length of the longest row,
        an integer, which waits for the device; and the number of tokens of each row that count,
        (B,) int32.

    Raises:
        ValueError: the mask has another shape.

    Source: as `index_first_axis`.

    Example:
        >>> x = torch.arange(4.0).view(2, 2, 1)
        >>> tokens, _, cu_seqlens, longest, _ = unpad_input(x, torch.tensor([[1, 1], [0, 1]]))
        >>> tokens.flatten().tolist(), cu_seqlens.tolist(), longest
        ([0.0, 1.0, 3.0], [0, 2, 3], 2)
    """
    for name, mask in (("attention_mask", attention_mask), ("unused_mask", unused_mask)):
        if mask is not None and mask.shape != hidden_states.shape[:2]:
            raise ValueError(
                f"unpad_input: {name} must have the shape {tuple(hidden_states.shape[:2])} of "
                f"hidden_states' first two dimensions, got {tuple(mask.shape)}"
            )
    kept = attention_mask if unused_mask is None else attention_mask + unused_mask
    lengths = kept.sum(dim=-1, dtype=torch.int32)
    indices = kept.flatten().nonzero().flatten()
    return (
        index_first_axis(hidden_states.flatten(0, 1), indices),
        indices,
        pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)),
        int(lengths.max().item()),
        attention_mask.sum(dim=-1, dtype=torch.int32),
    )


def pad_input(
    hidden_states: torch.Tensor, indices: torch.Tensor, batch: int, seqlen: int
) -> torch.Tensor:
    """The tokens of `unpad_input` in their places again, with 0 in the others.

    Args:
        hidden_states: (Z, ...).
        indices: (Z,), which `unpad_input` returned.
        batch: B.
        seqlen: S.

    Returns:
        (B, S, ...), differentiable in `hidden_states`.

    Raises:
        IndexError: an index is no token of B S, on a CPU.

    Source: as `index_first_axis`.

    Example:
        >>> pad_input(torch.ones(1, 2), torch.tensor([3]), 2, 2)[..., 0].tolist()
        [[0.0, 0.0], [0.0, 1.0]]
    """
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(
        0, (batch, seqlen)
    )
