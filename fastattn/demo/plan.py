"""The parts that the demo consists of on each kind of device, and how large they are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from ..ops.core.backends import HAS_TRITON, Backend, device_obstacle
from . import DemoError
from .data import Corpus
from .model import Sizes
from .training import Job


@dataclass(frozen=True)
class Part:
    """One part of the demo: on what its runs compute, how large they are, and what they show."""

    name: str
    title: str
    statement: str
    backend: Backend
    sizes: Sizes
    sample_bytes: int
    device: str = "cpu"
    threads: int | None = None

    @property
    def variants(self) -> tuple[str, ...]:
        """Kernels run beside plain PyTorch; the reference backend is PyTorch itself."""
        return ("plain", "fused") if self.backend == "triton" else ("fused",)

    def job(self, variant: str, corpus: Corpus, seed: int, checkpoint: str) -> Job:
        """The training run of one variant; the fused one leaves a sample and a checkpoint."""
        fused = variant == "fused"
        return Job(
            variant=variant,
            backend=self.backend if fused else "reference",
            sizes=self.sizes,
            device=self.device,
            seed=seed,
            threads=self.threads,
            corpus=corpus,
            sample_bytes=self.sample_bytes if fused else 0,
            checkpoint=checkpoint if fused else None,
        )


EVIDENCE = Part(
    name="evidence",
    title="Evidence: interpreted kernels beside plain PyTorch",
    statement="Same model, seed and batches, by PyTorch and by kernels in Triton's interpreter.",
    backend="triton",
    # An interpreted kernel takes some 20 milliseconds for every tile, whatever the tile holds.
    # These sizes give each product several, and each row of attention two tiles of keys.
    sizes=Sizes(steps=30, width=32, layers=1, heads=2, context=64, batch=1, dtype="float32"),
    sample_bytes=0,
    # PyTorch's steps take so little that several threads would mostly wait for each other, and on
    # a busy machine for their turn on a core: then waiting is what is timed.
    threads=1,
)

USE = Part(
    name="use",
    title="Use: a larger model on the reference backend",
    statement=(
        "Without a GPU fastattn computes with PyTorch itself. This shows its modules in use; it "
        "proves nothing about the kernels, so no plain PyTorch runs beside it."
    ),
    backend="reference",
    sizes=Sizes(steps=1000, width=128, layers=3, heads=2, context=128, batch=8, dtype="float32"),
    sample_bytes=400,
)

GPU = Part(
    name="gpu",
    title="Compiled kernels beside plain PyTorch",
    statement=(
        "Same model, seed and batches, by PyTorch and by compiled kernels, all products included. "
        "In bfloat16 rounding alone drives such runs apart in time; `python -m fastattn check` "
        "compares number by number."
    ),
    backend="triton",
    sizes=Sizes(
        steps=1000, width=768, layers=14, heads=12, context=1024, batch=8, dtype="bfloat16"
    ),
    sample_bytes=400,
)


def choose_parts(
    device: str, only: str | None, overrides: dict[str, Any], family: str = "llama"
) -> list[Part]:
    """The parts to run on a device, `only` one of them on a CPU; overrides are for the last."""
    chosen = choose_device(device)
    if chosen.type == "cuda":
        if only is not None:
            raise DemoError("--part is for a CPU; a GPU does everything in one part")
        parts = [replace(GPU, device=str(chosen))]
    else:
        if only == "evidence" and not HAS_TRITON:
            raise DemoError("--part evidence needs triton, which is not installed here")
        candidates = [EVIDENCE, USE] if HAS_TRITON else [USE]
        parts = [part for part in candidates if only in (None, part.name)]
    parts[-1] = replace(parts[-1], sizes=override(parts[-1].sizes, overrides))
    return [replace(part, sizes=replace(part.sizes, family=family)) for part in parts]


def choose_device(name: str) -> torch.device:
    """The device that was asked for; for "auto" a GPU if the kernels run on it, else the CPU."""
    if name == "auto":
        usable = torch.cuda.is_available() and device_obstacle("cuda", 0) is None
        return torch.device("cuda:0" if usable else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DemoError(f"--device {name} is unknown; use auto, cpu, cuda or cuda:N") from None
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise DemoError(f"--device {name} is not supported; use auto, cpu, cuda or cuda:N")
    index, count = device.index or 0, torch.cuda.device_count()
    if index >= count:
        raise DemoError(f"--device {name} is not there; PyTorch sees {count} GPUs")
    if reason := device_obstacle("cuda", index):
        raise DemoError(f"--device {name} cannot run the kernels: {reason}")
    return torch.device("cuda", index)


def override(sizes: Sizes, overrides: dict[str, Any]) -> Sizes:
    """The sizes with others in their place, if these make a model."""
    if "width" in overrides:
        overrides = {"heads": max(1, overrides["width"] // 64), **overrides}
    sizes = replace(sizes, **overrides)
    if sizes.context < 2:
        raise DemoError(f"--context {sizes.context} has no byte behind another to predict")
    # Rotary positions turn pairs of a head's features.
    if sizes.width % (2 * sizes.heads) != 0:
        raise DemoError(
            f"--width {sizes.width} cannot be split into {sizes.heads} heads of an even width"
        )
    return sizes
