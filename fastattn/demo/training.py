"""One training run of the demo: what it is asked to do, the loop, and what it reports."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastattn

from ..ops.core.backends import Backend
from . import DemoError
from .data import Corpus, Windows, load_splits
from .experts import balancing_loss, shares, watched_routers
from .model import Sizes, make_model, make_task
from .tasks import Batch

VALIDATION_BATCHES = 4
VALIDATIONS = 5
# At the least, so that a short run of interpreted kernels trains most of its time.
STEPS_BETWEEN_VALIDATIONS = 20

Event = dict[str, Any]
"""What a run reports, JSON-able: what is added to lists of its record, or set in it."""


@dataclass(frozen=True)
class Job:
    """Everything that determines a training run."""

    variant: str
    backend: Backend
    sizes: Sizes
    device: str
    seed: int
    threads: int | None
    """PyTorch's on a CPU, None for as many as it takes by itself."""
    corpus: Corpus
    sample_bytes: int
    checkpoint: str | None
    """The folder that a model of `fastattn.models` is left in, or None."""

    @property
    def interpreted(self) -> bool:
        """Whether the kernels that it runs are interpreted."""
        return self.backend == "triton" and self.device == "cpu"

    @property
    def computed_by(self) -> str:
        """What executes the model's exchangeable pieces."""
        if self.variant == "plain":
            return "plain PyTorch" if self.sizes.family == "llama" else "PyTorch (reference)"
        if self.backend == "reference":
            return "fastattn (reference)"
        return f"fastattn ({'interpreted' if self.interpreted else 'compiled'})"


@dataclass
class RunRecord:
    """What a run has reported so far."""

    job: Job
    steps: list[Event] = field(default_factory=list)
    validations: list[Event] = field(default_factory=list)
    parameters: int = 0
    peak_memory_bytes: int | None = None
    sample: str = ""
    interrupted: bool = False
    failure: str | None = None

    def add(self, event: Event) -> None:
        """Take in one event of the run."""
        for name, value in event.items():
            known = getattr(self, name)
            if isinstance(known, list):
                known.append(value)
            else:
                setattr(self, name, value)

    @property
    def losses(self) -> list[float]:
        return [step["loss"] for step in self.steps]

    @property
    def expert_loads(self) -> list[list[list[float]]]:
        """Of each validation, for each layer with experts, the shares that they got."""
        found = (validation.get("expert_load") for validation in self.validations)
        return [load for load in found if load]

    @property
    def tokens_per_second(self) -> float | None:
        """Training speed at the median step; the first step, which compiles, is left out."""
        seconds = [step["seconds"] for step in self.steps[1:]]
        tokens = self.job.sizes.batch * self.job.sizes.context
        return tokens / statistics.median(seconds) if seconds else None


def train(job: Job, emit: Callable[[Event], None], stopped: Callable[[], bool]) -> None:
    """Do the whole run, call `emit` with each event, and ask `stopped` before every step.

    Once that says True, the last validation, the sample and the checkpoint are made from what is
    there. A loss or gradient that is not finite is a DemoError.
    """
    device = torch.device(job.device)
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    torch.manual_seed(job.seed)
    model: Any = make_model(job.sizes, job.variant).to(device)
    train_tokens, validation_tokens = load_splits(job.corpus)
    steps, context, batch = job.sizes.steps, job.sizes.context, job.sizes.batch
    windows = Windows(train_tokens, context, batch, job.seed)
    highest = peak_learning_rate(job.sizes.width)
    optimizer = make_optimizer(model, highest)
    interval = max(STEPS_BETWEEN_VALIDATIONS, math.ceil(steps / VALIDATIONS))

    def validate(done: int) -> None:
        with watched_routers(model) as routers:
            loss = validation_loss(model, validation_tokens, job)
        load = {"expert_load": shares(routers)} if routers else {}
        emit({"validations": {"step": done, "loss": loss, **load}})

    emit({"parameters": sum(parameter.numel() for parameter in model.parameters())})
    with fastattn.backend(job.backend):
        done = 0
        while done < steps and not stopped():
            if done % interval == 0:
                validate(done)
            rate = highest * learning_rate_factor(done, steps)
            done += 1
            result = training_step(model, optimizer, next_batch(windows, job), rate, job)
            emit({"steps": {"step": done, **result}})
        if done > 0:
            validate(done)
            emit({"sample": sample_text(model, validation_tokens, job)})
    emit({"peak_memory_bytes": peak_memory_bytes(device)})
    if job.checkpoint is not None and done > 0:
        model.save_pretrained(job.checkpoint)


def autocast(job: Job) -> AbstractContextManager[object]:
    """A narrower dtype where autocast finds it safe; parameters stay in float32.

    While it lasts, torch keeps the parameters that it has cast: it must end before they change, and
    what needs gradients does not share it with what does not.
    """
    device, dtype = torch.device(job.device), getattr(torch, job.sizes.dtype)
    return nullcontext() if dtype is torch.float32 else torch.autocast(device.type, dtype)


def next_batch(windows: Windows, job: Job) -> Batch:
    """What the model is called with for the next windows of text."""
    batch = make_task(job.sizes).batch(windows.draw(), windows.generator)
    return {name: tensor.to(job.device) for name, tensor in batch.items()}


def make_optimizer(model: nn.Module, learning_rate: float) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves the norms' weights alone."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95))


def peak_learning_rate(width: int) -> float:
    """The wider the model, the smaller the steps that it bears."""
    return min(4e-3, 0.5 / width)


def learning_rate_factor(step: int, steps: int) -> float:
    """Rise linearly for a tenth of the steps, at most 100, then fall to 0.1 by a cosine."""
    warm_up = min(100, max(1, steps // 10))
    if step < warm_up:
        return (step + 1) / warm_up
    progress = (step - warm_up) / max(1, steps - warm_up)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def training_step(
    model: nn.Module,
    optimizer: torch.optim.AdamW,
    batch: Batch,
    learning_rate: float,
    job: Job,
) -> Event:
    """Do one step of the optimizer and return what is worth knowing about it."""
    started = time.perf_counter()
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    with watched_routers(model) as routers, autocast(job):
        loss = model(**batch).loss
    (loss + balancing_loss(routers)).backward()
    gradient_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
    optimizer.step()
    optimizer.zero_grad()
    # Reading the number waits for the device, so the time covers the whole step.
    value, norm = loss.item(), gradient_norm.item()
    if not math.isfinite(value) or not math.isfinite(norm):
        raise DemoError(f"training broke down: loss {value}, norm of its gradient {norm}")
    return {
        "loss": value,
        "learning_rate": learning_rate,
        "gradient_norm": norm,
        "seconds": time.perf_counter() - started,
    }


@torch.no_grad()
def validation_loss(model: nn.Module, tokens: Tensor, job: Job) -> float:
    """The mean loss over a few batches of held-out text, the same ones every time."""
    windows = Windows(tokens, job.sizes.context, job.sizes.batch, seed=0)
    with autocast(job):
        losses = [model(**next_batch(windows, job)).loss.item() for _ in range(VALIDATION_BATCHES)]
    return statistics.fmean(losses)


def sample_text(model: nn.Module, held_out: Tensor, job: Job) -> str:
    """What the model makes up to follow the corpus's prompt, or of some held-out text."""
    if job.sample_bytes == 0:
        return ""
    prompt, window = job.corpus.prompt.encode(), held_out[: job.sizes.context].long()
    with autocast(job):
        generated = make_task(job.sizes).sample(model, prompt, window, job.sample_bytes, job.seed)
    text = generated.decode("utf-8", errors="replace").strip("\n")
    # A model that has learnt little makes up control characters, which a terminal would obey.
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def peak_memory_bytes(device: torch.device) -> int | None:
    """The most memory in use at any time so far: of tensors on a GPU, of the process on a CPU.

    The latter is known from Linux alone: `getrusage`, which other systems have too, starts a new
    program at the size of the one that launched it.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    peak = next((line for line in lines if line.startswith("VmHWM:")), None)
    return None if peak is None else int(peak.split()[1]) * 1024
