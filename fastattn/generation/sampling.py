"""Choosing the next token of each sequence from its logits."""

import torch


def choose_tokens(
    logits: torch.Tensor,
    *,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """(B,) the next tokens, of logits (B, V).

    Without do_sample those of the largest logits, the first where several are. With it they are
    drawn from the softmax of what these leave, in this order, as in transformers: logits are
    divided by `temperature`; the `top_k` largest stay; the fewest whose probabilities add up to
    `top_p` stay; those stay whose probability is `min_p` times the largest one at least.

    Args:
        generator: what random numbers come from, on the device of the logits.

    Raises:
        ValueError: temperature, top_k, top_p or min_p is out of its range.

    Sources: Fan et al. (2018) for top_k, Holtzman et al. (2020) for top_p, Nguyen et al. (2024) for
    min_p. What is drawn is the largest of p / e with exponential e, which no sum has to wait for.

    Example:
        >>> fastattn.generation.choose_tokens(torch.tensor([[0.0, 3.0, 1.0]])).tolist()
        [1]
    """
    if not do_sample:
        return logits.argmax(-1)
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    return draw_tokens(token_probabilities(logits, do_sample=True, **options), generator)


def token_probabilities(
    logits: torch.Tensor,
    *,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> torch.Tensor:
    """(..., V) float32: how probable each token is to be chosen by `choose_tokens`."""
    if not do_sample:
        return torch.zeros_like(logits.float()).scatter(-1, logits.argmax(-1, keepdim=True), 1.0)
    _check_range("temperature", temperature, temperature > 0.0, "positive")
    logits = logits.float() / temperature
    if top_k is not None:
        _check_range("top_k", top_k, top_k >= 1, "positive")
        least = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    if top_p is not None:
        _check_range("top_p", top_p, 0.0 < top_p <= 1.0, "in (0, 1]")
        ascending, order = logits.sort(-1)
        dropped = ascending.softmax(-1).cumsum(-1) <= 1.0 - top_p
        # One always stays.
        dropped[..., -1] = False
        logits = logits.masked_fill(dropped.gather(-1, order.argsort(-1)), float("-inf"))
    if min_p is not None:
        _check_range("min_p", min_p, 0.0 <= min_p <= 1.0, "in [0, 1]")
        probabilities = logits.softmax(-1)
        rare = probabilities < min_p * probabilities.amax(-1, keepdim=True)
        logits = logits.masked_fill(rare, float("-inf"))
    return logits.softmax(-1)


def draw_tokens(weights: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """(...) one token each, as often as its share of the weights, (..., V), is."""
    return (weights / torch.empty_like(weights).exponential_(generator=generator)).argmax(-1)


def penalize_repetition(
    logits: torch.Tensor, tokens: torch.Tensor, counts: torch.Tensor, penalty: float
) -> torch.Tensor:
    """Logits (B, V) with those of the first `counts` of tokens (B, S) made less by `penalty`.

    Positive ones are divided by it and negative ones multiplied (Keskar et al., "CTRL", 2019).
    """
    _check_range("repetition_penalty", penalty, penalty > 0.0, "positive")
    lessened = torch.where(logits > 0, logits / penalty, logits * penalty)
    inside = torch.arange(tokens.shape[1], device=tokens.device) < counts[:, None]
    # What is beyond a sequence's end counts as one of its own tokens.
    seen = torch.where(inside, tokens, tokens[:, :1])
    return logits.scatter(-1, seen, lessened.gather(-1, seen))


def _check_range(name: str, value: float, fits: bool, range_: str) -> None:
    if not fits:
        raise ValueError(f"generate: {name} must be {range_}, got {value}")
