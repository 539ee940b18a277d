"""Tokens a second: greedily with a cache, with a draft, and by reading all again; and by beams.

A Llama of random parameters goes on with a prompt of random tokens up to the whole context. All
greedy ways must choose the same tokens. The draft is the model's first layers, between its
embedding and its head. On a CPU that is the reference backend's speed. With --demo the model is as
large as the one that `make demo` trains on this device.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import fastattn
from fastattn.demo.model import make_config
from fastattn.demo.plan import GPU, USE
from fastattn.models import LlamaConfig, LlamaForCausalLM

from ..environment import default_device, describe
from ..output import print_table, write


@torch.no_grad()
def generate_again(model: Any, tokens: torch.Tensor, new: int) -> torch.Tensor:
    """Greedy tokens, each from a pass over all before it."""
    for _ in range(new):
        logits = model(tokens, logits_to_keep=1).logits
        tokens = torch.cat((tokens, logits[:, -1:].argmax(-1)), 1)
    return tokens


def generate_cached(model: Any, tokens: torch.Tensor, new: int) -> torch.Tensor:
    """Greedy tokens from a cache."""
    return fastattn.generate(model, tokens, max_new_tokens=new).tokens


def generate_by_beams(model: Any, tokens: torch.Tensor, new: int, *, beams: int) -> torch.Tensor:
    """The best of several sequences that are followed."""
    return fastattn.generate(model, tokens, max_new_tokens=new, num_beams=beams).tokens


def generate_drafted(
    model: Any, tokens: torch.Tensor, new: int, *, draft: Any, guesses: int
) -> torch.Tensor:
    """Greedy tokens that a smaller model guesses before."""
    options = {"draft": draft, "num_draft_tokens": guesses}
    return fastattn.generate(model, tokens, max_new_tokens=new, **options).tokens


def make_draft(model: LlamaForCausalLM, layers: int) -> LlamaForCausalLM:
    """The model's first layers, with its embedding and its head."""
    draft = LlamaForCausalLM(replace(model.config, num_hidden_layers=layers))
    kept = draft.state_dict().keys()
    draft.load_state_dict({name: x for name, x in model.state_dict().items() if name in kept})
    return draft.to(model.lm_head.weight.device).eval()


def choose_config(options: argparse.Namespace, device: torch.device) -> LlamaConfig:
    """The model's sizes: those that are given, or the demo's, which the options then have too."""
    if options.demo:
        sizes = (GPU if device.type == "cuda" else USE).sizes
        options.layers, options.width = sizes.layers, sizes.width
        options.context, options.new = sizes.context, sizes.context // 2
        config = make_config(sizes)
        assert isinstance(config, LlamaConfig)
        return config
    return LlamaConfig(
        vocab_size=8192,
        hidden_size=options.width,
        intermediate_size=4 * options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=options.width // 64,
        max_position_embeddings=options.context,
    )


def main() -> int:
    parser = argparse.ArgumentParser("python -m bench.generation", description=__doc__)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--context", type=int, default=1024, help="tokens in the end")
    parser.add_argument("--new", type=int, default=512, help="how many of them are generated")
    parser.add_argument("--beams", type=int, default=4)
    parser.add_argument("--draft-layers", type=int, default=1)
    parser.add_argument("--guesses", type=int, default=3, help="tokens that a draft guesses")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    parser.add_argument(
        "--demo", action="store_true", help="the demo's model of this device, half its context new"
    )
    options = parser.parse_args()

    device = default_device()
    torch.manual_seed(0)
    config = choose_config(options, device)
    model = LlamaForCausalLM(config).to(device).eval()
    shape = (1, options.context - options.new)
    prompt = torch.randint(config.vocab_size, shape, device=device)
    draft = make_draft(model, options.draft_layers)
    ways: dict[str, Callable[..., torch.Tensor]] = {
        "with a cache": generate_cached,
        "without": generate_again,
        "with a draft": partial(generate_drafted, draft=draft, guesses=options.guesses),
        f"by {options.beams} beams": partial(generate_by_beams, beams=options.beams),
    }
    for run in ways.values():
        run(model, prompt[:, :8], 2)
    seconds, made = {}, {}
    for name, run in ways.items():
        start = time.perf_counter()
        made[name] = run(model, prompt, options.new)
        # Reading a number waits for the device.
        int(made[name][0, -1])
        seconds[name] = time.perf_counter() - start
    first, *others = [tokens for name, tokens in made.items() if not name.startswith("by ")]
    same = all(torch.equal(first, tokens) for tokens in others)
    rows = [
        {"way": name, "seconds": taken, "tokens_per_second": options.new / taken}
        for name, taken in seconds.items()
    ]
    ratio = seconds["without"] / seconds["with a cache"]
    print_table(
        f"{options.layers} layers of width {options.width}, {options.new} tokens up to "
        f"{options.context}: {ratio:.1f} times as fast with a cache",
        ("way", "seconds", "tokens/s"),
        [(r["way"], f"{r['seconds']:.1f}", f"{r['tokens_per_second']:.1f}") for r in rows],
    )
    if not same:
        print("greedy ways chose different tokens")
    if options.json:
        names = ("layers", "width", "context", "new", "beams", "draft_layers", "guesses")
        sizes = {name: getattr(options, name) for name in names}
        write(
            options.json,
            {**describe(device), **sizes, "rows": rows, "ratio": ratio, "same_tokens": same},
        )
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
