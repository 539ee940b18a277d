"""What is to be gone on with: checked, and read by a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Prompts:
    """What new tokens come behind.

    Attributes:
        tokens: (B, S), padded on the right: the prompts, or what a decoder begins with that has an
            encoder.
        lengths: (B,) how many of them count.
        source: (B, N), what an encoder reads, or None.
        source_lengths: (B,) how many of its tokens count; all if None.
    """

    tokens: torch.Tensor
    lengths: torch.Tensor
    source: torch.Tensor | None = None
    source_lengths: torch.Tensor | None = None

    def with_room(self, new: int, pad: int) -> torch.Tensor:
        """(B, S + new): the prompts, and padding behind each."""
        whole = torch.cat((self.tokens, self.tokens.new_full((len(self.tokens), new), pad)), 1)
        beyond = torch.arange(whole.shape[1], device=whole.device) >= self.lengths[:, None]
        return whole.masked_fill(beyond, pad)


def find_prompts(
    model: Any,
    tokens: torch.Tensor,
    lengths: torch.Tensor | None,
    decoder_tokens: torch.Tensor | None,
) -> Prompts:
    """The prompts of a decoder, or of an encoder-decoder, for which `tokens` are the source.

    Raises:
        ValueError: a shape, dtype or length does not fit, or a decoder alone has decoder_tokens.
    """
    _check_tokens("tokens", tokens)
    _check_lengths(tokens, lengths)
    paired = getattr(model, "is_encoder_decoder", False)
    if not paired:
        if decoder_tokens is not None:
            raise ValueError(
                f"generate: decoder_tokens are for encoder-decoders, and {type(model).__name__} "
                "is none"
            )
        return Prompts(tokens, _all_of(tokens) if lengths is None else lengths)
    if decoder_tokens is None:
        decoder_tokens = tokens.new_full((len(tokens), 1), model.config.decoder_start_token_id)
    _check_tokens("decoder_tokens", decoder_tokens)
    if len(decoder_tokens) != len(tokens):
        raise ValueError(
            f"generate: tokens and decoder_tokens must have one batch, got {len(tokens)} and "
            f"{len(decoder_tokens)}"
        )
    return Prompts(decoder_tokens, _all_of(decoder_tokens), tokens, lengths)


def read_prompts(
    model: Any, prompts: Prompts, new: int, chunk: int | None, *, beyond: int = 0
) -> tuple[Any, torch.Tensor]:
    """A cache that has the prompts, and of the last token of each what `model.head` takes, (B, C).

    Args:
        new: how many tokens will come behind each.
        chunk: how many tokens of the prompts are read at once; all if None.
        beyond: how many more the cache has room for.

    Raises:
        ValueError: the model has too few positions, or the chunk is not positive.
    """
    tokens = prompts.tokens
    config = model.config
    most = getattr(config, "max_position_embeddings", getattr(config, "n_positions", None))
    # The last token is not read.
    needed = tokens.shape[1] + new - 1
    if most is not None and needed > most:
        raise ValueError(
            f"generate: prompts of {tokens.shape[1]} tokens and {new} new ones need {needed} "
            f"positions, and {type(model).__name__} has {most}"
        )
    if chunk is not None and chunk < 1:
        raise ValueError(f"generate: prefill_chunk must be positive, got {chunk}")
    chunk = tokens.shape[1] if chunk is None else chunk
    cache = model.make_cache(len(tokens), tokens.shape[1] + new + beyond)
    rows = torch.arange(len(tokens), device=tokens.device)
    source: dict[str, Any] = {}
    if prompts.source is not None:
        source = {"source": prompts.source, "source_lengths": prompts.source_lengths}
    last: Any = None
    for first in range(0, tokens.shape[1], chunk):
        part = tokens[:, first : first + chunk]
        features = model.read(part, cache, **source)
        place = (prompts.lengths - 1 - first).long()
        found = features[rows, place.clamp(0, part.shape[1] - 1)]
        last = found if last is None else torch.where((place >= 0)[:, None], found, last)
        source = {}
        # What comes next is written over the padding. A window's ring goes back one part, no more.
        cache.crop(prompts.lengths)
    return cache, last


def choose_padding(stop: Sequence[int], pad: int | None) -> int:
    """What stands behind the end of a sequence."""
    if pad is not None:
        return pad
    return stop[0] if len(stop) > 0 else 0


def _all_of(tokens: torch.Tensor) -> torch.Tensor:
    return torch.full(tokens.shape[:1], tokens.shape[1], device=tokens.device)


def _check_tokens(name: str, tokens: torch.Tensor) -> None:
    if tokens.dim() != 2 or tokens.shape[1] == 0 or tokens.is_floating_point():
        raise ValueError(
            f"generate: {name} must be integers (B, S) of one token at least, got {tokens.dtype} "
            f"of shape {tuple(tokens.shape)}"
        )


def _check_lengths(tokens: torch.Tensor, lengths: torch.Tensor | None) -> None:
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
