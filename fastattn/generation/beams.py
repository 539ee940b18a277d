"""Beam search: several continuations of each prompt at once, of which the best is kept.

At each step the 2 n best of all continuations of n beams by one token are looked at (more where
there are several stop tokens). Of those that end with a stop token the ones among the n best are
finished, with the sum of their log-probabilities divided by (number of new tokens)^length_penalty
as their score, and the n best finished ones are kept; the n best others are the next beams. What
the last step gives is finished whatever its token.

A prompt's search ends when none of its beams is thought able to do better than its worst finished
sequence. `early_stopping` says how that is thought:

- False: by a beam's score as if it ended now.
- "never": by its score as if it had all tokens at once without losing any probability, where
  length_penalty is positive; then nothing better is missed.
- True: not at all; it ends with its n-th finished sequence.

These are the rules of transformers' `generate`, in its order and in float32, so that sequences and
scores are the same. Beams are not sampled, and one sequence is returned for each prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch

from .prompts import Prompts, read_prompts
from .results import STEPS_BETWEEN_LOOKS, Generated
from .sampling import penalize_repetition

EarlyStopping = bool | Literal["never"]

LOW = -1e9
"""The score of what does not count."""


@dataclass(frozen=True)
class Beams:
    """Continuations of each prompt, n of them.

    Attributes:
        scores: (B, n), float32: the sum of log-probabilities, of finished ones with the penalty.
        tokens: (B, n, T), the new ones, then padding.
        log_probs: (B, n, T), float32, the tokens', then 0.
        lengths: (B, n), how many tokens there are.
        finished: (B, n), whether nothing comes behind them.
    """

    scores: torch.Tensor
    tokens: torch.Tensor
    log_probs: torch.Tensor
    lengths: torch.Tensor
    finished: torch.Tensor

    def pick(self, places: torch.Tensor) -> Beams:
        """Those at these places, (B, m)."""
        return Beams(*(_pick(tensor, places) for tensor in self.tensors()))

    def join(self, others: Beams) -> Beams:
        """These, and then others."""
        pairs = zip(self.tensors(), others.tensors(), strict=True)
        return Beams(*(torch.cat(pair, 1) for pair in pairs))

    def tensors(self) -> list[torch.Tensor]:
        """All that there is of them."""
        return [getattr(self, field.name) for field in fields(self)]


@torch.no_grad()
def search_beams(
    model: Any,
    prompts: Prompts,
    max_new_tokens: int,
    *,
    num_beams: int,
    length_penalty: float,
    early_stopping: EarlyStopping,
    repetition_penalty: float,
    stop: Sequence[int],
    pad: int,
    prefill_chunk: int | None,
) -> Generated:
    """The best continuation of each prompt that a search by beams finds, see the module.

    Raises:
        ValueError: early_stopping is none of the three, or the vocabulary has too few tokens beside
            those that stop.
    """
    if early_stopping not in (True, False, "never"):
        raise ValueError(
            f"generate: early_stopping must be True, False or 'never', got {early_stopping!r}"
        )
    batch, device = len(prompts.tokens), prompts.tokens.device
    stops = torch.tensor(list(stop), dtype=prompts.tokens.dtype, device=device)
    looked_at = max(2, 1 + len(stop)) * num_beams
    among_best = torch.arange(looked_at, device=device) < num_beams
    first = torch.arange(batch, device=device)[:, None] * num_beams
    cache, features = read_prompts(model, prompts, max_new_tokens, prefill_chunk)
    cache.repeat(num_beams)
    features = features.repeat_interleave(num_beams, 0)
    beams = _make_beams(prompts.tokens, num_beams, max_new_tokens, pad)
    best = replace(beams, scores=torch.full_like(beams.scores, LOW))
    # The beams of a prompt are the same at first, and one of them counts.
    beams.scores[:, 1:] = LOW
    searching = torch.ones(batch, 1, dtype=torch.bool, device=device)
    for number in range(max_new_tokens):
        own = model.head(features).float().log_softmax(-1)
        vocabulary = own.shape[-1]
        if vocabulary * num_beams < looked_at:
            raise ValueError(
                f"generate: {num_beams} beams need {looked_at} continuations each step, and the "
                f"vocabulary has {vocabulary} tokens"
            )
        log_probs = own
        if repetition_penalty != 1.0:
            log_probs = _penalize(own, prompts, beams.tokens[..., :number], repetition_penalty)
        totals = log_probs.view(batch, num_beams, -1) + beams.scores[..., None]
        scores, places = totals.flatten(1).topk(looked_at)
        origins, chosen = places // vocabulary, places % vocabulary
        found = beams.pick(origins)
        found.tokens[..., number] = chosen
        found.log_probs[..., number] = own.view(batch, -1).gather(1, places)
        found.lengths.fill_(number + 1)
        ended = torch.isin(chosen, stops) | (number == max_new_tokens - 1)

        going, kept = (scores + ended * LOW).topk(num_beams)
        beams = replace(found.pick(kept), scores=going)

        final = scores / (number + 1) ** length_penalty
        if early_stopping is True:
            final = final + best.finished.all(1, keepdim=True) * LOW
        final = final + ~searching * LOW
        final = final + ~(ended & among_best) * LOW
        both = best.join(replace(found, scores=final, finished=ended & among_best))
        best = both.pick(both.scores.topk(num_beams).indices)

        never = early_stopping == "never" and length_penalty > 0.0
        hoped = beams.scores[:, :1] / (max_new_tokens if never else number + 1) ** length_penalty
        worst = best.scores.amin(1, keepdim=True).where(best.finished, LOW)
        searching = searching & (hoped > worst).any(1, keepdim=True)
        if number == max_new_tokens - 1:
            break
        if number % STEPS_BETWEEN_LOOKS == STEPS_BETWEEN_LOOKS - 1:
            # What went on since a search has ended changed nothing of its best.
            full = best.finished.all() if early_stopping is True else torch.zeros_like(searching)
            if not bool((searching & ~full).any()):
                break
        cache.reorder((_pick(origins, kept) + first).flatten())
        features = model.read(beams.tokens[..., number].reshape(-1, 1), cache)[:, -1]
    return _take_best(prompts, best, pad)


def _make_beams(prompts: torch.Tensor, num_beams: int, most: int, pad: int) -> Beams:
    """Beams without tokens, for prompts of this dtype."""
    shape = len(prompts), num_beams
    numbers = torch.zeros(*shape, most, device=prompts.device)
    return Beams(
        scores=numbers[..., 0].clone(),
        tokens=prompts.new_full(numbers.shape, pad),
        log_probs=numbers,
        lengths=prompts.new_zeros(shape, dtype=torch.long),
        finished=prompts.new_zeros(shape, dtype=torch.bool),
    )


def _penalize(
    log_probs: torch.Tensor, prompts: Prompts, tokens: torch.Tensor, penalty: float
) -> torch.Tensor:
    """(B * n, V) log-probabilities, less those of the prompts and of tokens (B, n, T)."""
    inside = torch.arange(prompts.tokens.shape[1], device=tokens.device) < prompts.lengths[:, None]
    known = torch.where(inside, prompts.tokens, prompts.tokens[:, :1])
    known = known[:, None].expand(-1, tokens.shape[1], -1)
    seen = torch.cat((known, tokens), -1).flatten(0, 1)
    counts = torch.full_like(seen[:, 0], seen.shape[1])
    return penalize_repetition(log_probs, seen, counts, penalty)


def _pick(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """(B, n, ...) to (B, m, ...): those at (B, m) places."""
    return x[torch.arange(len(x), device=x.device)[:, None], places]


def _take_best(prompts: Prompts, best: Beams, pad: int) -> Generated:
    """The first of the beams, behind their prompts."""
    scores, tokens, log_probs, lengths, _ = (tensor[:, 0] for tensor in best.tensors())
    room = torch.arange(tokens.shape[1], device=tokens.device)
    whole = prompts.with_room(tokens.shape[1], pad)
    whole = whole.scatter(1, prompts.lengths[:, None].long() + room, tokens)
    return Generated(whole, prompts.lengths.long() + lengths, log_probs, scores)
