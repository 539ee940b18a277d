"""A training step and a prefill of models of transformers, beside each other.

A Llama- and a Gemma-shaped model of random parameters: with eager attention, with sdpa, patched by
Liger and patched by fastattn. Liger's kernels do not run on a CPU; where they cannot, the table and
the result file say that it was not run, and why. Each contender has a process of its own. Tokens a
second are by the median of the rounds; the peak is that of memory during a step beyond parameters
and gradients: of the process on a CPU, of PyTorch's allocator on a GPU. Another process that keeps
the processor busy disturbs a clock: the seconds of processor time stand beside it.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..environment import ROOT, default_device, describe
from ..memory.__main__ import RESET_PEAK, resident
from ..output import print_table, write

MODELS = {"llama": "Llama", "gemma": "Gemma3Text"}
CONTENDERS = ("eager", "sdpa", "liger", "fastattn")
SIZES = {
    "cpu": {"layers": 2, "width": 256, "vocabulary": 32768, "batch": 1, "length": 256},
    "cuda": {"layers": 16, "width": 2048, "vocabulary": 131072, "batch": 2, "length": 4096},
}


def make_model(name: str, contender: str, options: argparse.Namespace) -> Any:
    """A model as a contender has it."""
    import transformers

    sizes: dict[str, Any] = {
        "vocab_size": options.vocabulary,
        "hidden_size": options.width,
        "intermediate_size": 4 * options.width,
        "num_hidden_layers": options.layers,
        "num_attention_heads": max(options.width // 64, 1),
        "num_key_value_heads": max(options.width // 256, 1),
        "head_dim": 64,
        "max_position_embeddings": options.length,
    }
    if contender == "liger":
        import liger_kernel.transformers as liger  # type: ignore[import-not-found]

        family = {"llama": "llama", "gemma": "gemma3_text"}[name]
        getattr(liger, f"apply_liger_kernel_to_{family}")()
    config = getattr(transformers, f"{MODELS[name]}Config")(**sizes)
    device = default_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager" if contender == "eager" else "sdpa", dtype=dtype
    ).to(device)
    if contender == "fastattn":
        import fastattn

        fastattn.patch(model)
    return model


def calls_of(model: Any, options: argparse.Namespace) -> dict[str, Callable[[], torch.Tensor]]:
    """What is measured, each giving a number that tells whether contenders compute the same."""
    device = model.device
    generator = torch.Generator().manual_seed(0)
    shape = (options.batch, options.length)
    ids = torch.randint(options.vocabulary, shape, generator=generator).to(device)

    def train() -> torch.Tensor:
        model.train()
        model.zero_grad(set_to_none=False)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        return loss.detach()

    @torch.no_grad()
    def prefill() -> torch.Tensor:
        model.eval()
        logits = model(input_ids=ids, use_cache=True, logits_to_keep=1).logits
        return logits.float().logsumexp(-1).mean()

    return {"training step": train, "prefill": prefill}


def measure(call: Callable[[], torch.Tensor], rounds: int) -> dict[str, Any]:
    """Seconds, the peak of memory, and the number that a call gives."""
    # The first calls load everything, compile kernels and make gradients.
    call()
    number = float(call())
    gc.collect()
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text(RESET_PEAK)
        before = resident("VmRSS")
    seconds, processor = [], []
    for _ in range(rounds):
        start, busy = time.perf_counter(), time.process_time()
        # Reading a number waits for the device.
        number = float(call())
        seconds.append(time.perf_counter() - start)
        processor.append(time.process_time() - busy)
    peak = torch.cuda.max_memory_allocated() if on_gpu else resident("VmHWM")
    return {
        "seconds": statistics.median(seconds),
        "processor_seconds": statistics.median(processor),
        "peak_bytes": peak - before,
        "number": number,
        "every_call": seconds,
    }


def rows_of(options: argparse.Namespace) -> list[dict[str, Any]]:
    """What this process measures of one contender of one model."""
    name, contender = options.only
    calls = calls_of(make_model(name, contender, options), options)
    tokens = options.batch * options.length
    rows = []
    for what, call in calls.items():
        found = measure(call, options.rounds)
        speed = tokens / found["seconds"]
        row = {"model": name, "what": what, "contender": contender, "tokens_per_second": speed}
        rows.append({**row, **found})
    return rows


def in_a_process(name: str, contender: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The same in a new process: its last line of output, as JSON."""
    command = [sys.executable, "-m", "bench.hugging_face", "--only", name, contender]
    for size in (*SIZES["cpu"], "rounds", "threads"):
        command += [f"--{size}", str(getattr(options, size))]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def liger_obstacle() -> str | None:
    """Why Liger cannot be run here, or None."""
    if not torch.cuda.is_available():
        return "its kernels need a GPU"
    if find_spec("liger_kernel") is None:
        return "liger-kernel is not installed"
    return None


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m bench.hugging_face", description=__doc__)
    for size, usual in SIZES[default_device().type].items():
        parser.add_argument(f"--{size}", type=int, default=usual)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--contender", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="the result file")
    parser.add_argument("--only", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    options = arguments()
    torch.set_num_threads(options.threads)
    if options.only:
        print(json.dumps(rows_of(options)))
        return 0
    device = default_device()
    obstacle = liger_obstacle() if "liger" in options.contender else None
    not_run = {} if obstacle is None else {"liger": obstacle}
    rows = [
        row
        for name in options.model
        for contender in options.contender
        if contender not in not_run
        for row in in_a_process(name, contender, options)
    ]
    rows.sort(key=lambda row: (row["model"], row["what"]))
    print_table(
        f"{options.layers} layers of width {options.width}, {options.batch} x {options.length} "
        f"tokens of {options.vocabulary}",
        ("model", "", "contender", "tokens/s", "processor s", "peak MB", "number"),
        [
            (
                row["model"],
                row["what"],
                row["contender"],
                f"{row['tokens_per_second']:.0f}",
                f"{row['processor_seconds']:.2f}",
                f"{row['peak_bytes'] / 1e6:.0f}",
                f"{row['number']:.4f}",
            )
            for row in rows
        ],
    )
    for contender, why in not_run.items():
        print(f"{contender}: not run here, for {why}")
    if options.out is not None:
        sizes = {name: getattr(options, name) for name in (*SIZES["cpu"], "threads")}
        write(options.out, {**describe(device), **sizes, "results": rows, "not_run": not_run})
        print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
