"""What generation gives: step by step, and in the end."""

from dataclasses import dataclass

import torch

STEPS_BETWEEN_LOOKS = 8
"""After how many tokens the host looks whether all sequences have ended, for which it waits."""


@dataclass(frozen=True)
class Generated:
    """What was generated.

    Attributes:
        tokens: (B, S + new), each prompt with its tokens right behind it, then padding. Of an
            encoder-decoder the prompt is what its decoder began with.
        lengths: (B,) how many of them count, the last of which may be a stop token.
        log_probs: (B, new), float32: the log-probability of each generated token by the model's
            own logits, 0 behind the end of a sequence.
        scores: (B,), float32, of beams: the sum of a sequence's log-probabilities, divided by the
            number of its tokens to the power of length_penalty. Otherwise None.
    """

    tokens: torch.Tensor
    lengths: torch.Tensor
    log_probs: torch.Tensor
    scores: torch.Tensor | None = None


@dataclass(frozen=True)
class Step:
    """One token of each sequence.

    Attributes:
        tokens: (B,), what was generated, the padding token where a sequence has ended.
        log_probs: (B,), float32, 0 where it has.
        finished: (B,), whether a sequence has ended with or before this token.
    """

    tokens: torch.Tensor
    log_probs: torch.Tensor
    finished: torch.Tensor
