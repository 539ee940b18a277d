"""The loop that generates tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from .beams import EarlyStopping, search_beams
from .prompts import choose_padding, find_prompts, read_prompts
from .results import STEPS_BETWEEN_LOOKS, Generated, Step
from .sampling import choose_tokens, penalize_repetition
from .speculative import speculate


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
    num_beams: int = 1,
    length_penalty: float = 1.0,
    early_stopping: EarlyStopping = False,
    draft: Any = None,
    num_draft_tokens: int = 4,
    prefill_chunk: int | None = None,
    decoder_tokens: torch.Tensor | None = None,
    on_token: Callable[[Step], Any] | None = None,
) -> Generated:
    """Tokens that a model of `fastattn.models` goes on with, each computed from a cache.

    Args:
        model: a model with logits of the next token: a decoder, as
            `fastattn.models.LlamaForCausalLM`, or an encoder-decoder, as
            `fastattn.models.T5ForConditionalGeneration`.
        tokens: (B, S) prompts, padded on the right where they differ in length; what an encoder
            reads, once.
        lengths: (B,) how many tokens of each prompt count, 1 at least; all if None.
        max_new_tokens: how many tokens are generated at most.
        do_sample, temperature, top_k, top_p, min_p: see `choose_tokens`.
        repetition_penalty: by what logits of tokens that a sequence has already are lessened; 1 for
            not at all.
        stop: tokens with which a sequence ends.
        pad: what stands behind its end; the first of `stop`, or 0, if None.
        seed: of the random numbers; PyTorch's own generator if None.
        num_beams, length_penalty, early_stopping: with several beams the best of so many sequences
            that are followed at once, see `fastattn.generation.beams`.
        draft: a smaller model with the same vocabulary, which guesses tokens that `model` verifies
            together, see `fastattn.generation.speculative`. What is generated has the distribution
            that it has without.
        num_draft_tokens: how many it guesses at once, at most 32.
        prefill_chunk: how many tokens of the prompts are read at once; all if None. An encoder
            reads all at once.
        decoder_tokens: (B, S), what the decoder of an encoder-decoder begins with; its
            configuration's decoder_start_token_id if None.
        on_token: called with each `Step`; what it returns does not count.

    Returns:
        `Generated`.

    Raises:
        ValueError: a length or a number does not fit, or two ways of choosing tokens exclude each
            other.

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
    _check_numbers(max_new_tokens, num_beams, draft, do_sample, on_token)
    prompts = find_prompts(model, tokens, lengths, decoder_tokens)
    pad = choose_padding(stop, pad)
    if num_beams > 1:
        return search_beams(
            model,
            prompts,
            max_new_tokens,
            num_beams=num_beams,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            repetition_penalty=repetition_penalty,
            stop=stop,
            pad=pad,
            prefill_chunk=prefill_chunk,
        )
    choice: dict[str, Any] = {
        "do_sample": do_sample,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
    }
    rest: dict[str, Any] = {
        "repetition_penalty": repetition_penalty,
        "stop": stop,
        "pad": pad,
        "seed": seed,
        "prefill_chunk": prefill_chunk,
    }
    if draft is not None:
        return speculate(model, draft, prompts, max_new_tokens, num_draft_tokens, choice, **rest)
    whole = prompts.with_room(max_new_tokens, pad)
    batch = len(whole)
    ends = prompts.lengths.long().clone()
    log_probs = torch.zeros(batch, max_new_tokens, device=whole.device)
    finished = torch.zeros(batch, dtype=torch.bool, device=whole.device)
    steps = stream(
        model,
        tokens,
        lengths,
        max_new_tokens=max_new_tokens,
        decoder_tokens=decoder_tokens,
        **choice,
        **rest,
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
    decoder_tokens: torch.Tensor | None = None,
) -> Iterator[Step]:
    """The steps of `generate`, with its arguments, one by one as they come.

    Example:
        >>> config = fastattn.models.LlamaConfig(
        ...     vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        ...     num_attention_heads=4,
        ... )
        >>> model = fastattn.models.LlamaForCausalLM(config).eval()
        >>> steps = fastattn.stream(model, torch.tensor([[5, 7]]), max_new_tokens=3)
        >>> [step.tokens.shape for step in steps]
        [torch.Size([1]), torch.Size([1]), torch.Size([1])]
    """
    _check_numbers(max_new_tokens)
    prompts = find_prompts(model, tokens, lengths, decoder_tokens)
    seen, counts = prompts.tokens, prompts.lengths
    device = seen.device
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    cache, features = read_prompts(model, prompts, max_new_tokens, prefill_chunk)
    stops = torch.tensor(list(stop), dtype=seen.dtype, device=device)
    padding = choose_padding(stop, pad)
    finished = torch.zeros(len(seen), dtype=torch.bool, device=device)
    for number in range(max_new_tokens):
        own = model.head(features)
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
        features = model.read(chosen[:, None], cache)[:, -1]


def _check_numbers(
    max_new_tokens: int,
    num_beams: int = 1,
    draft: Any = None,
    do_sample: bool = False,
    on_token: Any = None,
) -> None:
    """Numbers are in their ranges, and ways to choose tokens do not exclude each other."""
    if max_new_tokens < 1:
        raise ValueError(f"generate: max_new_tokens must be positive, got {max_new_tokens}")
    if num_beams < 1:
        raise ValueError(f"generate: num_beams must be positive, got {num_beams}")
    if num_beams > 1 and (do_sample or draft is not None):
        raise ValueError("generate: several beams are neither sampled nor drafted; leave one out")
    if on_token is not None and (num_beams > 1 or draft is not None):
        raise ValueError(
            "generate: on_token hears of one token of each sequence at a time, which neither beams "
            "nor a draft give"
        )
