"""Speculative decoding: a small model guesses several tokens, and a large one verifies them.

In a round the draft guesses n tokens x_1 ... x_n one by one, drawn from its distributions q_i. The
model reads them together, which gives its own distributions p_1 ... p_(n+1). Guess i is kept with
probability min(1, p_i(x_i) / q_i(x_i)), if those before it were; in the place of the first one that
is not comes a token drawn from max(p_i - q_i, 0), and behind n kept ones a token drawn from
p_(n+1). What comes out is distributed as if the model had drawn each token from its p, whatever the
draft is. Both distributions are what temperature, top_k and the others leave. Without sampling they
have one token each, so that a guess is kept where it is the model's own most likely token.

A round gives each sequence a number of tokens of its own, after which both caches are cut to what
was kept. The host waits once a round, to see whether all sequences have ended.

Source: Leviathan, Kalman and Matias, "Fast Inference from Transformers via Speculative Decoding"
(2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..nn.ring_cache import SLACK
from .prompts import Prompts, read_prompts
from .results import Generated
from .sampling import draw_tokens, penalize_repetition, token_probabilities


@torch.no_grad()
def speculate(
    model: Any,
    draft: Any,
    prompts: Prompts,
    max_new_tokens: int,
    num_draft_tokens: int,
    choice: dict[str, Any],
    *,
    repetition_penalty: float,
    stop: Sequence[int],
    pad: int,
    seed: int | None,
    prefill_chunk: int | None,
) -> Generated:
    """Tokens of the model that a draft guesses, see the module.

    Args:
        draft: a model of the same kind and vocabulary.
        num_draft_tokens: how many tokens it guesses in a round.
        choice: the other arguments of `token_probabilities`.

    Raises:
        ValueError: the draft is of another kind or vocabulary, or there are no guesses.
    """
    _check_draft(model, draft, num_draft_tokens)
    guessed = num_draft_tokens
    device, lengths = prompts.tokens.device, prompts.lengths.long()
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    stops = torch.tensor(list(stop), dtype=prompts.tokens.dtype, device=device)
    readers = [
        Reader(reader, prompts, max_new_tokens, guessed, prefill_chunk) for reader in (model, draft)
    ]
    # Each has room for a round beyond the last token.
    whole = prompts.with_room(max_new_tokens + guessed + 1, pad)
    log_probs = torch.zeros(len(whole), max_new_tokens + guessed + 1, device=device)
    ends, most = lengths, lengths + max_new_tokens
    finished = torch.zeros(len(whole), dtype=torch.bool, device=device)
    round_ = torch.arange(guessed + 1, device=device)

    def choose(logits: torch.Tensor, tokens: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """(B, M, V): the probabilities, by logits (B, M, V) of tokens behind so many, (B, M)."""
        if repetition_penalty != 1.0:
            known = tokens[:, None].expand(-1, logits.shape[1], -1).flatten(0, 1)
            flat = logits.flatten(0, 1)
            flat = penalize_repetition(flat, known, counts.flatten(), repetition_penalty)
            logits = flat.view_as(logits)
        return token_probabilities(logits, **choice)

    while True:
        places = ends[:, None] + round_
        known, chances = whole, []
        fed = whole.gather(1, places[:, :1] - 1)
        for place in range(guessed):
            logits = readers[1].read(fed)
            chances.append(choose(logits, known, places[:, place, None]))
            fed = draw_tokens(chances[-1], generator)
            known = known.scatter(1, places[:, place, None], fed)
        # Its last guess may be kept, and has to be in its cache then.
        readers[1].read(fed, with_logits=False)
        guesses = known.gather(1, places[:, :-1])
        logits = readers[0].read(known.gather(1, places - 1))
        wanted = choose(logits, known, places)
        kept, token = accept(wanted, torch.cat(chances, 1), guesses, generator)
        new = torch.cat((guesses, token[:, None]), 1).scatter(1, kept[:, None], token[:, None])

        stopping = torch.isin(new, stops)
        until_stop = torch.where(stopping.any(1), stopping.int().argmax(1) + 1, guessed + 2)
        made = torch.minimum(torch.minimum(kept + 1, until_stop), most - ends)
        made = made.masked_fill(finished, 0)
        counts = round_ < made[:, None]
        own = logits.float().log_softmax(-1).gather(-1, new[..., None])[..., 0]
        whole = whole.scatter(1, places, new.masked_fill(~counts, pad))
        log_probs.scatter_(1, places - lengths[:, None], own.masked_fill(~counts, 0.0))
        ends = ends + made
        finished = finished | (made == until_stop) | (ends == most)
        done, longest = torch.stack((finished.all().long(), ends.max())).tolist()
        if done:
            break
        for reader in readers:
            # Who has ended goes on alongside without being read.
            reader.crop((ends - 1).masked_fill(finished, 0), longest - 1)
    columns = prompts.tokens.shape[1] + max_new_tokens
    return Generated(whole[:, :columns], ends, log_probs[:, :max_new_tokens])


class Reader:
    """A model that has read all tokens but the last, with room for `guessed` beyond the end."""

    def __init__(
        self, model: Any, prompts: Prompts, new: int, guessed: int, chunk: int | None
    ) -> None:
        self.model = model
        self.cache, _ = read_prompts(model, prompts, new, chunk, beyond=guessed)
        # Guesses beyond the last token must not ask for positions that a model may not have.
        self.last = prompts.lengths[:, None] + new - 2
        self.crop(prompts.lengths - 1, prompts.tokens.shape[1] - 1)

    def read(self, tokens: torch.Tensor, *, with_logits: bool = True) -> torch.Tensor:
        """The logits (B, M, V) of the tokens behind each of (B, M), or what they are made of."""
        positions = torch.minimum(self.cache.positions(tokens.shape[1]), self.last)
        features = self.model.read(tokens, self.cache, positions)
        return self.model.head(features) if with_logits else features

    def crop(self, lengths: torch.Tensor, longest: int) -> None:
        """Keep the first tokens of each sequence, (B,), none of which has more than `longest`."""
        self.cache.crop(longest)
        self.cache.crop(lengths)


def accept(
    wanted: torch.Tensor,
    chances: torch.Tensor,
    guesses: torch.Tensor,
    generator: torch.Generator | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """How many guesses of each sequence are kept, (B,), and the token that comes then, (B,).

    Args:
        wanted: (B, n + 1, V), the model's probabilities.
        chances: (B, n, V), the draft's, from which the guesses were drawn.
        guesses: (B, n) tokens.
    """
    p = wanted[:, :-1].gather(-1, guesses[..., None])[..., 0]
    q = chances.gather(-1, guesses[..., None])[..., 0]
    drawn = torch.empty_like(p).uniform_(generator=generator)
    kept = (drawn * q < p).long().cumprod(1).sum(1)
    rows = torch.arange(len(kept), device=kept.device)
    target = wanted[rows, kept]
    # Behind the last guess nothing was drawn before.
    known = torch.cat((chances, torch.zeros_like(wanted[:, :1])), 1)[rows, kept]
    rest = (target - known).clamp(min=0.0)
    # Where rounding leaves nothing the two are the same.
    rest = torch.where(rest.amax(-1, keepdim=True) > 0.0, rest, target)
    return kept, draw_tokens(rest, generator)


def _check_draft(model: Any, draft: Any, num_draft_tokens: int) -> None:
    # A draft takes back what it guessed one step at a time, for which rings have so much room.
    if not 1 <= num_draft_tokens <= SLACK:
        raise ValueError(
            f"generate: num_draft_tokens must be in [1, {SLACK}], got {num_draft_tokens}"
        )
    kinds = [getattr(one, "is_encoder_decoder", False) for one in (model, draft)]
    if kinds[0] != kinds[1]:
        raise ValueError(
            "generate: a draft must be a decoder for a decoder, and an encoder-decoder for an "
            f"encoder-decoder, got {type(draft).__name__} for {type(model).__name__}"
        )
    vocabularies = [one.config.vocab_size for one in (model, draft)]
    if vocabularies[0] != vocabularies[1]:
        raise ValueError(
            f"generate: a draft must have the model's vocabulary of {vocabularies[0]} tokens, got "
            f"{vocabularies[1]}"
        )
