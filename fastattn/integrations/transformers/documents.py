"""Which packed document each token belongs to, by what models hand to their attention."""

import torch
from torch.utils.weak import WeakIdKeyDictionary
from transformers.utils.import_utils import is_tracing

from ...kernels.private import version_of

# Of positions that all layers of a forward pass get, each asked about once: whether anything is
# packed waits for the device.
_known = WeakIdKeyDictionary()


def documents_of_positions(position_ids: torch.Tensor) -> torch.Tensor | None:
    """The document of each token, from positions that begin again with each; None if it is one.

    As in transformers, a document begins where a position is not the one before plus one. What
    traces cannot ask whether that is anywhere, and gets documents always.

    Args:
        position_ids: (B, S) integers.

    Returns:
        (B, S) integers, or None.
    """
    if is_tracing(position_ids):
        return _documents(position_ids)
    if position_ids.is_inference():
        # Writes to it are not counted.
        return _if_several(_documents(position_ids))
    version = version_of(position_ids)
    known = _known.get(position_ids)
    if known is None or known[0] != version:
        known = (version, _if_several(_documents(position_ids)))
        _known[position_ids] = known
    return known[1]


def documents_of_lengths(cumulative: torch.Tensor, length: int) -> torch.Tensor:
    """The document of each of `length` tokens, (1, length), from the places where they end.

    Args:
        cumulative: (documents + 1,), rising from 0; equal neighbours are documents without tokens.
        length: the number of tokens; those beyond the last end are of a document of their own.
    """
    places = torch.arange(length, device=cumulative.device, dtype=cumulative.dtype)
    return torch.searchsorted(cumulative[1:].contiguous(), places, right=True)[None]


def _documents(position_ids: torch.Tensor) -> torch.Tensor:
    begins = position_ids.diff(dim=-1) != 1
    return torch.nn.functional.pad(begins.cumsum(-1), (1, 0))


def _if_several(documents: torch.Tensor) -> torch.Tensor | None:
    return documents if bool(documents[:, -1].any()) else None
