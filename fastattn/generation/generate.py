"""The loop that generates tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .sampling import choose_tokens, penalize_repetition

STEPS_BETWEEN_LOOKS = 8
"""After how many tokens the host looks whether all sequences have ended, for which it waits."""


@dataclass(frozen=True)
class Generated:
    """What was generated.

    Attributes:
        tokens: (B, S + new), each prompt with its tokens right behind it, then padding.
        lengths: (B,) how many of them count, the last of which may be a stop token.
        log_probs: (B, new), float32: the log-probability of each generated token by the model's
            own logits, 0 behind the end of a sequence.
    """

    tokens: torch.Tensor
    lengths: torch.Tensor
    log_probs: torch.Tensor


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


def generate(
    model: Any,
    tokens: torch.Tensor,
    lengths: torch.Tensor | None = None,
    *,
    max_new_tokens: int,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop: Sequence[int] = (),
    pad: int | None = None,
    seed: int | None = None,
    prefill_chunk: int | None = None,
    on_token: Callable[[Step], Any] | None = None,
) -> Generated:
    """Tokens that a decoder of `fastattn.models` goes on with, each computed from a cache.

    Args:
        model: a model for causal language modelling, as `fastattn.models.LlamaForCausalLM`.
        tokens: (B, S) prompts, padded on the right where they differ in length.
        lengths: (B,) how many tokens of each prompt count, 1 at least; all if None.
        max_new_tokens: how many tokens are generated at most.
        do_sample, temperature, top_k, top_p, min_p: see `choose_tokens`.
        repetition_penalty: by what logits of tokens that a sequence has already are lessened; 1 for
            not at all.
        stop: tokens with which a sequence ends.
        pad: what stands behind its end; the first of `stop`, or 0, if None.
        seed: of the random numbers; PyTorch's own generator if None.
        prefill_chunk: how many tokens of the prompts are read at once; all if None.
        on_token: called with each `Step`; what it returns does not count.

    Returns:
        `Generated`.

    Raises:
        ValueError: a length or a number does not fit.

    Example:
        >>> config = fastattn.models.LlamaConfig(
        ...     vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        ...     num_attention_heads=4,
        ... )
        >>> model = fastattn.models.LlamaForCausalLM(config).eval()
        >>> prompts = torch.tensor([[5, 7, 9], [3, 0, 0]])
        >>> made = fastattn.generate(model, prompts, torch.tensor([3, 1]), max_new_tokens=4)
        >>> made.tokens.shape, made.lengths.tolist()
        (torch.Size([2, 7]), [7, 5])
    """
    _check_prompts(tokens, lengths, max_new_tokens)
    batch, longest = tokens.shape
    if lengths is None:
        lengths = torch.full((batch,), longest, device=tokens.device)
    pad = _choose_padding(stop, pad)
    whole = torch.cat((tokens, tokens.new_full((batch, max_new_tokens), pad)), 1)
    beyond = torch.arange(whole.shape[1], device=tokens.device) >= lengths[:, None]
    whole = whole.masked_fill(beyond, pad)
    ends = lengths.long().clone()
    log_probs = torch.zeros(batch, max_new_tokens, device=tokens.device)
    finished = torch.zeros(batch, dtype=torch.bool, device=tokens.device)
    steps = stream(
        model,
        tokens,
        lengths,
        max_new_tokens=max_new_tokens,
        do_sample=do_sample,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop=stop,
        pad=pad,
        seed=seed,
        prefill_chunk=prefill_chunk,
    )
    for number, step in enumerate(steps):
        place = ends.clamp(max=whole.shape[1] - 1)[:, None]
        kept = torch.where(finished[:, None], whole.gather(1, place), step.tokens[:, None])
        whole = whole.scatter(1, place, kept)
        ends = ends + ~finished
        log_probs[:, number] = step.log_probs
        finished = step.finished
        if on_token is not None:
            on_token(step)
    return Generated(whole, ends, log_probs)


@torch.no_grad()
def stream(
    model: Any,
    tokens: torch.Tensor,
    lengths: torch.Tensor | None = None,
    *,
    max_new_tokens: int,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop: Sequence[int] = (),
    pad: int | None = None,
    seed: int | None = None,
    prefill_chunk: int | None = None,
) -> Iterator[Step]:
    """The steps of `generate`, with its arguments, one by one as they come."""
    _check_prompts(tokens, lengths, max_new_tokens)
    batch, longest = tokens.shape
    device = tokens.device
    if lengths is None:
        lengths = torch.full((batch,), longest, device=device)
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    cache = model.make_cache(batch, longest + max_new_tokens)
    hidden = _read_prompts(model, tokens, lengths, cache, prefill_chunk)
    stops = torch.tensor(list(stop), dtype=tokens.dtype, device=device)
    padding = _choose_padding(stop, pad)
    finished = torch.zeros(batch, dtype=torch.bool, device=device)
    seen, counts = tokens, lengths
    for number in range(max_new_tokens):
        own = model.head(hidden)
        logits = own
        if repetition_penalty != 1.0:
            logits = penalize_repetition(logits, seen, counts, repetition_penalty)
        chosen = choose_tokens(
            logits,
            do_sample=do_sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            generator=generator,
        )
        log_prob = own.float().log_softmax(-1).gather(-1, chosen[:, None])[:, 0]
        log_prob = log_prob.masked_fill(finished, 0.0)
        chosen = chosen.masked_fill(finished, padding)
        finished = finished | torch.isin(chosen, stops)
        yield Step(chosen, log_prob, finished)
        last = number == max_new_tokens - 1
        looks = len(stop) > 0 and number % STEPS_BETWEEN_LOOKS == STEPS_BETWEEN_LOOKS - 1
        if last or (looks and bool(finished.all())):
            return
        if repetition_penalty != 1.0:
            place = torch.arange(seen.shape[1] + 1, device=device) == counts[:, None]
            seen = torch.cat((seen, seen[:, :1]), 1).masked_scatter(place, chosen)
            counts = counts + 1
        hidden = model.base(chosen[:, None], cache=cache).last_hidden_state[:, -1]


def _read_prompts(
    model: Any,
    tokens: torch.Tensor,
    lengths: torch.Tensor,
    cache: Any,
    chunk: int | None,
) -> torch.Tensor:
    """(B, C): the hidden state of each prompt's last token. The cache then has the prompts."""
    last = None
    for first in range(0, tokens.shape[1], chunk or tokens.shape[1]):
        part = tokens[:, first : first + (chunk or tokens.shape[1])]
        hidden = model.base(part, cache=cache).last_hidden_state
        place = (lengths - 1 - first).long()
        inside = ((place >= 0) & (place < part.shape[1]))[:, None]
        rows = torch.arange(len(tokens), device=tokens.device)
        found = hidden[rows, place.clamp(0, part.shape[1] - 1)]
        last = found if last is None else torch.where(inside, found, last)
        # What comes next is written over the padding. A window's ring goes back one part, no more.
        cache.crop(lengths)
    assert last is not None
    return last


def _choose_padding(stop: Sequence[int], pad: int | None) -> int:
    if pad is not None:
        return pad
    return stop[0] if len(stop) > 0 else 0


def _check_prompts(tokens: torch.Tensor, lengths: torch.Tensor | None, max_new_tokens: int) -> None:
    if tokens.dim() != 2 or tokens.shape[1] == 0 or tokens.is_floating_point():
        raise ValueError(
            f"generate: tokens must be integers (B, S) of one token at least, got {tokens.dtype} "
            f"of shape {tuple(tokens.shape)}"
        )
    if max_new_tokens < 1:
        raise ValueError(f"generate: max_new_tokens must be positive, got {max_new_tokens}")
    if lengths is None:
        return
    if lengths.shape != tokens.shape[:1] or lengths.is_floating_point():
        raise ValueError(
            f"generate: lengths must be integers ({len(tokens)},), got {lengths.dtype} of shape "
            f"{tuple(lengths.shape)}"
        )
    if lengths.device.type == "cpu" and ((lengths < 1) | (lengths > tokens.shape[1])).any():
        raise ValueError(
            f"generate: lengths must be in [1, {tokens.shape[1]}], got {lengths.tolist()}"
        )
