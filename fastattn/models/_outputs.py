"""What models return."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Output:
    """The result of a model, with the names of transformers' outputs.

    Attributes:
        loss: a float32 scalar where labels were given, else None. It comes from the last hidden
            states without the logits of all tokens ever existing.
        last_hidden_state: (B, S, C), of the decoder where there are an encoder and a decoder.
        encoder_last_hidden_state: (B, S, C) of the encoder where there is one, else None.
        pooled: what a head pools of the hidden states, as BERT's `pooler_output`, or None.
        computed: the logits if the model computed them; read `logits`.
        head: the model whose `head(features)` maps `features` to logits, or None.
        features: what the head is applied to; last_hidden_state if None.
    """

    loss: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    encoder_last_hidden_state: torch.Tensor | None = None
    pooled: torch.Tensor | None = None
    computed: torch.Tensor | None = field(default=None, repr=False)
    head: Any = field(default=None, repr=False)
    features: torch.Tensor | None = field(default=None, repr=False)

    @property
    def logits(self) -> torch.Tensor:
        """The logits: of the model's call without labels, else computed when first asked for.

        Asked for after a call with labels, they are (B, S, V) numbers that the loss did without,
        are computed with the weights and under the autocast of that moment, and have gradients if
        the hidden states have.
        """
        if self.computed is None:
            if self.head is None:
                raise AttributeError("this model has no head, and so no logits")
            features = self.last_hidden_state if self.features is None else self.features
            self.computed = self.head.head(features)
        assert self.computed is not None
        return self.computed

    @property
    def pooler_output(self) -> torch.Tensor | None:
        """`pooled` under transformers' name."""
        return self.pooled
