"""Scores by relative positions, as Transformer-XL and conformers have them."""

from collections.abc import Sequence

import torch

from ..core.arguments import check_device, check_float_tensor
from .bias_terms import AdditiveBias
from .terms import Sizes


class RelativeShift(AdditiveBias):
    """Scores of queries and relative positions, added to those of queries and keys.

    Transformer-XL computes for each query its product with the embeddings of all distances, and
    shifts row by row so that what belongs to a key's distance stands at the key. Here the shift is
    one of strides: nothing is moved. For `score_mods` of `fastattn.attention`, where it is added
    after the scale, so that the scores need it already:

        scores = (q + v_bias) @ embeddings.mT * scale      # embeddings (H, M + N - 1, D)
        fastattn.attention(q + u_bias, k, v, score_mods=[fastattn.RelativeShift(scores)])

    Args:
        scores: (B or 1, H or 1, M, M + N - 1) of a float dtype: column c has the distance
            N - 1 - c of a key from the query's place, N - 1 being the furthest back. It gets a
            gradient.

    Raises:
        ValueError: it has not 4 dimensions. A call says whether they fit.

    Source: Dai et al., "Transformer-XL: Attentive Language Models Beyond a Fixed-Length Context"
    (2019); Gulati et al., "Conformer: Convolution-augmented Transformer for Speech Recognition"
    (2020).
    """

    def __init__(self, scores: torch.Tensor) -> None:
        if not isinstance(scores, torch.Tensor) or scores.dim() != 4:
            raise ValueError("RelativeShift: scores must be a tensor (B, H, M, M + N - 1)")
        self.scores = scores
        self._shifted: Sequence[torch.Tensor] | None = None

    @property
    def tensors(self) -> Sequence[torch.Tensor]:  # type: ignore[override]
        """The scores of queries and keys, (B, H, M, N): a view."""
        if self._shifted is None:
            return (_shift(self.scores),)
        return self._shifted

    @tensors.setter
    def tensors(self, tensors: Sequence[torch.Tensor]) -> None:  # type: ignore[override]
        self._shifted = tensors

    def check(self, op: str, name: str, q: torch.Tensor, sizes: Sizes) -> None:
        check_float_tensor(op, name, self.scores)
        check_device(op, name, self.scores, q)
        batch, heads, queries, keys = sizes
        own = tuple(self.scores.shape)
        width = max(queries + keys - 1, 0)
        if own[0] not in (1, batch) or own[1] not in (1, heads) or own[2:] != (queries, width):
            raise ValueError(
                f"{op}: {name} must have scores ({batch} or 1, {heads} or 1, {queries}, {width}), "
                f"got {own}"
            )

    def prepared(self, sizes: Sizes) -> "RelativeShift":
        return self.with_tensors(self.tensors)


def _shift(scores: torch.Tensor) -> torch.Tensor:
    """Row i from column M - 1 - i on, as many columns as there are keys."""
    batch, heads, queries, columns = scores.shape
    if scores.numel() == 0:
        return scores[..., : max(columns - queries + 1, 0)]
    of_batch, of_head, of_row, of_column = scores.stride()
    return scores.as_strided(
        (batch, heads, queries, columns - queries + 1),
        (of_batch, of_head, of_row - of_column, of_column),
        scores.storage_offset() + (queries - 1) * of_column,
    )
