"""Tokens a second of greedy generation, with a cache and by reading all tokens again for each.

A Llama of random parameters goes on with a prompt of random tokens up to the whole context; both
ways must choose the same tokens. On a CPU that is the reference backend's speed.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

import fastattn
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


def main() -> int:
    parser = argparse.ArgumentParser("python -m bench.generation", description=__doc__)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--context", type=int, default=1024, help="tokens in the end")
    parser.add_argument("--new", type=int, default=512, help="how many of them are generated")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    options = parser.parse_args()

    device = default_device()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=options.width,
        intermediate_size=4 * options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=options.width // 64,
        max_position_embeddings=options.context,
    )
    model = LlamaForCausalLM(config).to(device).eval()
    prompt = torch.randint(8192, (1, options.context - options.new), device=device)
    ways = {"with a cache": generate_cached, "without": generate_again}
    for run in ways.values():
        run(model, prompt[:, :8], 2)
    seconds, made = {}, {}
    for name, run in ways.items():
        start = time.perf_counter()
        made[name] = run(model, prompt, options.new)
        # Reading a number waits for the device.
        int(made[name][0, -1])
        seconds[name] = time.perf_counter() - start
    same = torch.equal(*made.values())
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
        print("the two ways chose different tokens")
    if options.json:
        sizes = {name: getattr(options, name) for name in ("layers", "width", "context", "new")}
        write(
            options.json,
            {**describe(device), **sizes, "rows": rows, "ratio": ratio, "same_tokens": same},
        )
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
