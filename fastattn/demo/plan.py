"""The parts that the demo consists of on each kind of device, and how large they are."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from typing import Any

import torch

from fastattn.demo.data import Corpus
from fastattn.demo.model import ModelSizes
from fastattn.demo.training import Job


@dataclass(frozen=True)
class Sizes:
    """How large a model is and how long it trains."""

    steps: int
    width: int
    layers: int
    heads: int
    context: int
    batch: int
    dtype: str


@dataclass(frozen=True)
class Part:
    """One part of the demo: which runs it has, how large they are, and what they show."""

    name: str
    title: str
    statement: str
    variants: tuple[str, ...]
    backend: str
    interpret: bool
    sizes: Sizes
    sample_bytes: int
    device: str = "cpu"

    def job(self, variant: str, corpus: Corpus, seed: int, checkpoint: str) -> Job:
        """The training run of one variant; the fused one leaves a sample and a checkpoint."""
        sizes = self.sizes
        keeps_model = variant == "fused"
        return Job(
            variant=variant,
            backend=self.backend,
            interpret=self.interpret and variant == "fused",
            sizes=ModelSizes(sizes.width, sizes.layers, sizes.heads, sizes.context),
            steps=sizes.steps,
            batch=sizes.batch,
            device=self.device,
            dtype=sizes.dtype,
            seed=seed,
            corpus=corpus,
            sample_bytes=self.sample_bytes if keeps_model else 0,
            checkpoint=checkpoint if keeps_model else None,
        )


EVIDENCE = Part(
    name="evidence",
    title="Evidence: interpreted kernels beside plain PyTorch",
    statement=(
        "The same model is trained twice from the same seed on the same batches: with PyTorch's "
        "modules, and with fastattn's kernels, run by Triton's interpreter."
    ),
    variants=("plain", "fused"),
    backend="triton",
    interpret=True,
    sizes=Sizes(steps=60, width=64, layers=2, heads=2, context=64, batch=8, dtype="float32"),
    sample_bytes=0,
)

USE = Part(
    name="use",
    title="Use: a larger model on the reference backend",
    statement=(
        "Without a GPU fastattn's modules compute with PyTorch itself (the reference backend). "
        "This part shows them in use. It proves nothing about the kernels: beside plain PyTorch "
        "it would compare PyTorch with itself, so there is no such comparison here."
    ),
    variants=("fused",),
    backend="reference",
    interpret=False,
    sizes=Sizes(steps=600, width=192, layers=4, heads=3, context=128, batch=16, dtype="float32"),
    sample_bytes=600,
)

GPU = Part(
    name="gpu",
    title="Compiled kernels beside plain PyTorch",
    statement=(
        "The same model is trained twice from the same seed on the same batches: with PyTorch's "
        "modules, and with fastattn's compiled kernels."
    ),
    variants=("plain", "fused"),
    backend="triton",
    interpret=False,
    sizes=Sizes(steps=1000, width=768, layers=14, heads=12, context=1024, batch=8, dtype="bfloat16"),
    sample_bytes=600,
)


def choose_parts(device: str, only: str | None, overrides: dict[str, Any]) -> list[Part]:
    """Return the parts to run.

    Args:
        device: "auto", or what torch.device understands, for a CPU or a GPU that is there.
        only: the name of the one part wanted on a CPU, or None for all that can run.
        overrides: sizes that replace those of the last part.

    Raises:
        ValueError: if the device is not there, cannot run the part, or the sizes make no model.
    """
    found = _find_device(device)
    if found.type == "cuda":
        if only is not None:
            raise ValueError("--part is for a CPU; a GPU does everything in one part")
        parts = [replace(GPU, device=str(found))]
    else:
        has_triton = importlib.util.find_spec("triton") is not None
        if only == "evidence" and not has_triton:
            raise ValueError("--part evidence needs triton, which is not installed here")
        candidates = [EVIDENCE, USE] if has_triton else [USE]
        parts = [part for part in candidates if only in (None, part.name)]
    parts[-1] = replace(parts[-1], sizes=_override(parts[-1].sizes, overrides))
    return parts


def _find_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name} is unknown; use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name} is not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name} is not there; torch sees {torch.cuda.device_count()} GPUs")
    return device


def _override(sizes: Sizes, overrides: dict[str, Any]) -> Sizes:
    if "width" in overrides and "heads" not in overrides:
        overrides = {**overrides, "heads": max(1, overrides["width"] // 64)}
    sizes = replace(sizes, **overrides)
    # Rotary positions turn pairs of a head's features.
    if sizes.width % (2 * sizes.heads) != 0:
        raise ValueError(
            f"--width {sizes.width} cannot be split into {sizes.heads} heads of an even width"
        )
    return sizes
