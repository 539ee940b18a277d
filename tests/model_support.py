"""What tests of the model families share: comparisons with transformers' models, and training."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import fastattn
from fastattn import models
from fastattn.models import Model, Output
from fastattn.ops.core.backends import INTERPRETED
from support import DEVICE, count_launches

CLOSE = 1e-5
"""How far float32 numbers may be apart, relative to the largest of their tensor."""

VANISHING = r"(key|k_proj)\.bias$"
"""The biases of keys that no positions turn: they change all scores of a query by one number."""

BACKENDS = [
    pytest.param("reference", marks=pytest.mark.skipif(INTERPRETED, reason="has no kernels")),
    pytest.param("triton", marks=pytest.mark.kernels),
]
"""The backends that a family is compared on: each in the process that can run it."""


def device_of(backend: str) -> str:
    """Where a model is to be on a backend."""
    return "cpu" if backend == "reference" or DEVICE is None else DEVICE


class Result(NamedTuple):
    """What a model gives on a batch with labels."""

    loss: torch.Tensor
    logits: torch.Tensor
    gradients: dict[str, torch.Tensor | None]


def token_batches(classes: int | None = None, length: int = 13) -> list[dict[str, torch.Tensor]]:
    """A batch without padding, one padded at the right, and one padded at the left.

    Args:
        classes: the classes of each sequence's label, 1 for a number; None for a label a token.
        length: the tokens of each of the two sequences. They are below 64, and 0 is the padding.
    """
    ids = torch.randint(3, 64, (2, length), generator=torch.Generator().manual_seed(2))
    found = []
    for hidden in (slice(0, 0), slice(9, None), slice(None, 4)):
        mask = torch.ones_like(ids)
        mask[1, hidden] = 0
        tokens = ids.where(mask.bool(), 0)
        labels = ids.masked_fill(mask == 0, -100)
        # What padding predicts is not compared: it sees nothing.
        labels[:, 1:][mask[:, :-1] == 0] = -100
        if classes is not None:
            labels = torch.tensor([2, 0]) if classes > 1 else torch.tensor([0.5, -2.0])
        found.append({"input_ids": tokens, "attention_mask": mask, "labels": labels})
    del found[0]["attention_mask"]
    return found


def counting_batch(generator: torch.Generator) -> dict[str, torch.Tensor]:
    """A text that a tiny model learns in a few steps: every token is 3 more than the one before."""
    starts = torch.randint(64, (1, 1), generator=generator)
    ids = (starts + 3 * torch.arange(16)) % 64
    return {"input_ids": ids, "labels": ids}


def theirs_on(theirs: Any, batch: dict[str, torch.Tensor]) -> Result:
    """A model of transformers on a batch."""
    output = theirs(**batch)
    return _result(theirs, output.loss, output.logits)


def ours_on(model: Model, batch: dict[str, torch.Tensor], backend: str) -> Result:
    """A model of ours on the same batch."""
    device = device_of(backend)
    with fastattn.backend(backend):  # type: ignore[arg-type]
        with count_launches() as launches:
            output = model(**{name: tensor.to(device) for name, tensor in batch.items()})
            assert isinstance(output, Output)
            result = _result(model, output.loss, output.logits)
        assert bool(launches) == (backend == "triton")
        return result


def _result(model: Any, loss: Any, logits: torch.Tensor) -> Result:
    model.zero_grad()
    loss.backward()
    gradients = {
        name: None if parameter.grad is None else parameter.grad.detach().cpu().clone()
        for name, parameter in model.named_parameters()
    }
    return Result(loss.detach().cpu(), logits.detach().cpu(), gradients)


def made(make: Callable[[], Any]) -> Any:
    """A model of transformers in evaluation mode, none of whose parameters has a special value.

    Norms that are 1, biases that are 0 and weights so small that attention is uniform would hide
    mistakes.
    """
    torch.manual_seed(0)
    theirs = make().eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return theirs


def save(theirs: Any, folder: Path) -> Path:
    """Write a model of transformers into a folder, without its progress bars."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    theirs.save_pretrained(folder)
    return folder


Tensors = dict[str, Any]


def whole_parameters(model: Model, tensors: Tensors) -> Tensors:
    """A model's tensors by the names of its parameters, as they are."""
    return tensors


def single_experts(model: Model, tensors: Tensors) -> Tensors:
    """A model's tensors as its checkpoints have them, one for each expert."""
    assert model.expert_names is not None
    found = {}
    for name, tensor in model.expert_names.split(tensors).items():
        for pattern, written in model.written_as.items():
            name = re.sub(pattern, written, name)
        found[name] = tensor
    return found


def compare_with_transformers(
    theirs: Any,
    folder: Path,
    batches: list[dict[str, torch.Tensor]],
    backend: str,
    *,
    renamed: Callable[[str], str] = str,
    vanishing: str | None = None,
    parts: Callable[[Model, Tensors], Tensors] = whole_parameters,
) -> Model:
    """Ours, read from what theirs wrote, gives the same logits, loss and gradients on batches.

    Args:
        theirs: a model of transformers, see `made`.
        folder: an empty folder.
        batches: keyword arguments of both models, labels among them. Logits are compared where
            the attention_mask, or the decoder's, says that there are tokens.
        backend: what ours computes with.
        renamed: the name that a parameter of theirs has in checkpoints, and so in ours.
        vanishing: a regular expression for parameters without any effect, see `VANISHING`.
        parts: what takes our parameters apart where theirs are; see `single_experts`.

    Returns:
        Ours.
    """
    model = models.from_pretrained(save(theirs, folder), device=device_of(backend))
    assert type(model).__name__ == type(theirs).__name__
    assert parts(model, dict(model.named_parameters())).keys() == {
        renamed(name) for name, _ in theirs.named_parameters()
    }
    for batch in batches:
        wanted, found = theirs_on(theirs, batch), ours_on(model, batch, backend)
        assert_near(found.loss, wanted.loss, "loss")
        seen = _tokens(batch, wanted.logits)
        assert_near(found.logits[seen], wanted.logits[seen], "logits")
        gradients = parts(model, found.gradients)
        for name, gradient in wanted.gradients.items():
            ours = gradients[renamed(name)]
            if gradient is None:
                # As of an expert without tokens, which ours gives a gradient of zeros.
                assert ours is None or not ours.any(), name
                continue
            assert ours is not None, name
            if vanishing and re.search(vanishing, name):
                assert_vanishing(ours, found)
            else:
                assert_near(ours, gradient, name)
    return model


def _tokens(batch: dict[str, torch.Tensor], logits: torch.Tensor) -> Any:
    """Which logits are those of tokens."""
    decoder = "decoder_input_ids" in batch
    mask = batch.get("decoder_attention_mask" if decoder else "attention_mask")
    if mask is None or logits.dim() != 3 or mask.shape != logits.shape[:2]:
        return slice(None)
    return mask.bool()


def assert_near(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Agreement of two computations in float32."""
    assert actual.shape == expected.shape, what
    assert actual.dtype == expected.dtype == torch.float32, what
    scale = expected.abs().max().item()
    error = (actual - expected).abs().max().item()
    assert error <= CLOSE * scale, f"{what}: error {error:.1e}, largest {scale:.1e}"


def assert_vanishing(gradient: torch.Tensor | None, of: Result) -> None:
    """A gradient is 0 but for rounding, beside the others of a model."""
    largest = max(g.abs().max().item() for g in of.gradients.values() if g is not None)
    assert gradient is not None
    assert gradient.abs().max().item() <= 1e-6 * largest


def compare_way_back(
    model: Model, theirs: Any, folder: Path, batch: dict[str, torch.Tensor]
) -> None:
    """What ours writes, transformers reads: every parameter is there, and the logits are theirs."""
    model.save_pretrained(folder)
    again, report = type(theirs).from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    batch = {name: tensor for name, tensor in batch.items() if name != "labels"}
    with torch.no_grad():
        # The last bits of a product depend on where in memory its operands are.
        assert_near(again.eval()(**batch).logits, theirs(**batch).logits, "logits")


def losses_of_training(
    make: Callable[[], Model],
    batch: Callable[[torch.Generator], dict[str, torch.Tensor]],
    backend: str,
    steps: int,
) -> list[float]:
    """The loss of every step of a small training run, the same one on every backend.

    Args:
        make: makes the model.
        batch: draws keyword arguments of the model, labels among them.
        backend: what it computes with.
        steps: how many there are.
    """
    torch.manual_seed(0)
    device = device_of(backend)
    model = make().to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(1)
    losses = []
    with fastattn.backend(backend):  # type: ignore[arg-type]
        for _ in range(steps):
            drawn = {name: tensor.to(device) for name, tensor in batch(generator).items()}
            loss = model(**drawn).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


def compare_training(
    make: Callable[[], Model],
    batch: Callable[[torch.Generator], dict[str, torch.Tensor]],
    steps: int = 12,
) -> None:
    """Training through the kernels follows training through the reference, step by step."""
    with count_launches() as none:
        plain = losses_of_training(make, batch, "reference", steps)
    with count_launches() as launches:
        fused = losses_of_training(make, batch, "triton", steps)
    assert launches
    assert not none
    assert plain[-1] < plain[0], "nothing was learnt, so nothing was compared"
    for step, (expected, found) in enumerate(zip(plain, fused, strict=True)):
        assert abs(found - expected) <= 1e-5 * expected, f"step {step}: {found} and {expected}"


def check_checkpointing(model: Model, batch: dict[str, torch.Tensor]) -> None:
    """Blocks that are computed again give the same loss and gradients, and drop the same."""
    model.train()
    torch.manual_seed(0)
    kept = ours_on(model, batch, "reference")
    model.gradient_checkpointing = True
    blocks = _count_checkpoints(model, batch)
    torch.manual_seed(0)
    again = ours_on(model, batch, "reference")
    model.gradient_checkpointing = False
    assert blocks > 0
    assert torch.equal(kept.loss, again.loss)
    for name, gradient in kept.gradients.items():
        ours = again.gradients[name]
        assert (ours is None) == (gradient is None), name
        assert ours is None or torch.equal(ours, gradient), name  # type: ignore[arg-type]


def _count_checkpoints(model: Model, batch: dict[str, torch.Tensor]) -> int:
    from fastattn.models import _base

    calls = 0
    original = _base.checkpoint

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        return original(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_base, "checkpoint", counted)
        model(**batch)
    return calls


def check_compiled(
    model: Model, batch: dict[str, torch.Tensor], vanishing: str | None = None
) -> None:
    """A whole model compiles as one graph, and gives the same loss and gradients."""
    plain = ours_on(model, batch, "reference")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.zero_grad()
    output = compiled(**batch)
    output.loss.backward()
    assert_near(output.loss.detach(), plain.loss, "loss")
    for name, parameter in model.named_parameters():
        gradient = plain.gradients[name]
        assert (parameter.grad is None) == (gradient is None), name
        if vanishing and re.search(vanishing, name):
            assert_vanishing(parameter.grad, plain)
        elif parameter.grad is not None and gradient is not None:
            assert_near(parameter.grad, gradient, name)
    without = {name: tensor for name, tensor in batch.items() if name != "labels"}
    with torch.no_grad():
        assert_near(compiled(**without).logits, plain.logits, "logits")


def check_autocast(
    model: Model, batch: dict[str, torch.Tensor], vanishing: str | None = None
) -> None:
    """Under bfloat16 autocast loss and gradients are float32 ones near the exact."""
    plain = ours_on(model, batch, "reference")
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**batch)
        logits = output.logits
    assert output.loss.dtype is torch.float32
    assert logits.dtype is torch.bfloat16
    assert abs(output.loss.item() - plain.loss.item()) < 0.05 * plain.loss.item()
    model.zero_grad()
    output.loss.backward()
    for name, parameter in model.named_parameters():
        gradient = plain.gradients[name]
        if parameter.grad is None or gradient is None:
            assert parameter.grad is gradient, name
            continue
        assert parameter.grad.dtype is torch.float32
        if vanishing and re.search(vanishing, name):
            continue
        error = (parameter.grad - gradient).norm() / gradient.norm()
        assert error < 0.1, f"{name}: {error:.2f}"


def check_dropouts(
    make: Callable[..., Model], batch: dict[str, torch.Tensor], names: tuple[str, ...]
) -> None:
    """Each probability by itself drops something in training, and nothing in evaluation.

    Args:
        make: makes the model, the same at every call, from probabilities by their names.
        names: the fields that are probabilities.
    """
    none = dict.fromkeys(names, 0.0)

    def logits(rates: dict[str, float], training: bool) -> torch.Tensor:
        return make(**rates).train(training)(**batch).logits

    expected = logits(none, training=False)
    assert torch.equal(logits(none, training=True), expected)
    for name in names:
        rates = {**none, name: 0.5}
        assert torch.equal(logits(rates, training=False), expected), name
        assert not torch.allclose(logits(rates, training=True), expected), name


def check_initial_values(
    model: Model,
    theirs: Any,
    *,
    renamed: Callable[[str], str] = str,
    enough: int = 500,
    parts: Callable[[Model, Tensors], Tensors] = whole_parameters,
) -> None:
    """A new model's parameters are drawn as those of a new model of transformers.

    Those with enough elements have the same standard deviation, and constants the same value.
    """
    found = parts(model, dict(model.named_parameters()))
    compared = 0
    for name, parameter in theirs.named_parameters():
        ours, wanted = found[renamed(name)].detach(), parameter.detach()
        if wanted.numel() > 1 and wanted.min() == wanted.max():
            assert torch.equal(ours, wanted), name
        elif wanted.numel() >= enough:
            compared += 1
            assert 0.85 < ours.std() / wanted.std() < 1.15, name
    assert compared > 0
