"""What models learn from windows of text: the next byte, masked bytes, or spans cut out of it."""

from __future__ import annotations

import itertools
from typing import Any, Protocol

import torch
from torch import Generator, Tensor

from ..generation import choose_tokens, generate

BYTES = 256
MASK = 256
PADDING, END, FIRST_SENTINEL = 256, 257, 258
UNLABELED = -100

HIDDEN_SHARE = 0.15
SPAN = 3

Batch = dict[str, Tensor]


class Task(Protocol):
    """What a batch of windows becomes, and how a trained model shows what it has learnt."""

    vocabulary: int
    """How many tokens there are: the bytes, and those that the task adds."""

    def batch(self, windows: Tensor, generator: Generator) -> Batch:
        """The model's keyword arguments for windows of bytes, (B, S) int64."""
        ...

    def sample(self, model: Any, prompt: bytes, held_out: Tensor, length: int, seed: int) -> bytes:
        """A title, and what the model makes of the prompt or of a held-out window (S,)."""
        ...


class NextByte:
    """Every byte from those before it."""

    vocabulary = BYTES

    def batch(self, windows: Tensor, generator: Generator) -> Batch:
        return {"input_ids": windows, "labels": windows}

    def sample(self, model: Any, prompt: bytes, held_out: Tensor, length: int, seed: int) -> bytes:
        text = continued(model, prompt, length, len(held_out), temperature=0.6, seed=seed)
        return f"Text made up by the model, after the prompt {prompt.decode()!r}:\n".encode() + text


class MaskedBytes:
    """Some bytes from all around them, as BERT learns.

    Of 15 % of the bytes, 80 % are masked, 10 % are another byte, and 10 % stay as they are.
    """

    vocabulary = BYTES + 1

    def batch(self, windows: Tensor, generator: Generator) -> Batch:
        chosen, kind = torch.rand((2, *windows.shape), generator=generator)
        hidden = chosen < HIDDEN_SHARE
        # A window without a label has no loss.
        hidden[:, 0] |= ~hidden.any(dim=1)
        other = torch.randint(BYTES, windows.shape, generator=generator)
        tokens = torch.where(hidden & (kind < 0.9), other, windows)
        tokens = torch.where(hidden & (kind < 0.8), MASK, tokens)
        return {"input_ids": tokens, "labels": torch.where(hidden, windows, UNLABELED)}

    def sample(self, model: Any, prompt: bytes, held_out: Tensor, length: int, seed: int) -> bytes:
        generator = Generator().manual_seed(seed)
        masked = torch.rand(held_out.shape, generator=generator) < HIDDEN_SHARE
        tokens = torch.where(masked, MASK, held_out)
        best = predicted(model, input_ids=tokens[None])[0].argmax(-1)
        filled = torch.where(masked, best, held_out)
        title = b"Held-out text with masked bytes, and as the model fills them in:\n"
        return title + printable(tokens) + b"\n\n" + printable(filled)


class SpanCorruption:
    """What was cut out of a text, span by span, as T5 learns.

    15 % of the bytes are cut out in spans of 3 on average. In their place the model reads a token
    that stands for the span, and writes each such token with the bytes behind it.
    """

    def __init__(self, context: int) -> None:
        self.cut = max(1, round(HIDDEN_SHARE * context))
        self.spans = max(1, min(round(self.cut / SPAN), context - self.cut))
        self.vocabulary = FIRST_SENTINEL + self.spans

    def batch(self, windows: Tensor, generator: Generator) -> Batch:
        pairs = [self._corrupted(window, generator) for window in windows]
        inputs, labels = (torch.stack(parts) for parts in zip(*pairs, strict=True))
        return {"input_ids": inputs, "labels": labels}

    def sample(self, model: Any, prompt: bytes, held_out: Tensor, length: int, seed: int) -> bytes:
        inputs, labels = self._corrupted(held_out, Generator().manual_seed(seed))
        device = next(model.parameters()).device
        made = generate(model, inputs[None].to(device), max_new_tokens=len(labels))
        title = b"Held-out text with spans cut out, and what the model writes for them in turn:\n"
        return title + printable(inputs) + b"\n\n" + printable(made.tokens[0, 1:].cpu())

    def _corrupted(self, window: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """What is left of a window, and what was cut out of it; always as long."""
        kept = _split(len(window) - self.cut, self.spans, generator)
        gone = _split(self.cut, self.spans, generator)
        pieces = window.split([size for pair in zip(kept, gone, strict=True) for size in pair])
        sentinels = (FIRST_SENTINEL + torch.arange(self.spans)).split(1)
        end = torch.tensor([END])
        inputs = itertools.chain.from_iterable(zip(pieces[::2], sentinels, strict=True))
        labels = itertools.chain.from_iterable(zip(sentinels, pieces[1::2], strict=True))
        return torch.cat((*inputs, end)), torch.cat((*labels, end))


def _split(total: int, parts: int, generator: Generator) -> list[int]:
    """`total` as a sum of so many numbers of at least 1, each way as likely."""
    ends = torch.randperm(total - 1, generator=generator)[: parts - 1].sort().values + 1
    ends = [0, *ends.tolist(), total]
    return [end - start for start, end in itertools.pairwise(ends)]


@torch.no_grad()
def predicted(model: Any, **batch: Tensor) -> Tensor:
    """The model's logits on a CPU, in float32."""
    device = next(model.parameters()).device
    return model(**{name: x.to(device) for name, x in batch.items()}).logits.float().cpu()


def continued(
    model: Any, prompt: bytes, length: int, context: int, *, temperature: float, seed: int
) -> bytes:
    """Continue `prompt` by `length` sampled bytes, the same ones for the same seed.

    The model never sees more than its context: where that is full, it goes on from half of it.
    """
    text = list(prompt)
    end = len(text) + length
    while len(text) < end:
        known = torch.tensor([text[-max(1, context // 2) :]])
        # The last one is not read.
        new = min(end - len(text), context + 1 - known.shape[1])
        options = {"do_sample": True, "temperature": temperature}
        text += _go_on(model, known, new, seed + len(text), **options)
    return bytes(text)


def _go_on(model: Any, known: Tensor, new: int, seed: int, **options: Any) -> list[int]:
    """So many tokens more of one sequence, (1, S): from a cache, if the model has one."""
    if hasattr(model, "make_cache"):
        known = known.to(next(model.parameters()).device)
        made = generate(model, known, max_new_tokens=new, seed=seed, **options)
        return made.tokens[0, known.shape[1] :].tolist()
    generator, first = Generator().manual_seed(seed), known.shape[1]
    for _ in range(new):
        logits = predicted(model, input_ids=known)[:, -1]
        known = torch.cat((known, choose_tokens(logits, generator=generator, **options)[None]), 1)
    return known[0, first:].tolist()


def printable(tokens: Tensor) -> bytes:
    """The bytes among tokens, with an underscore for each that is none."""
    return bytes(torch.where(tokens < BYTES, tokens, ord("_")).tolist())
