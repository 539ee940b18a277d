"""A patched model beside itself unpatched with eager attention, by the accuracy rule."""

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

import fastattn
from against_eager import NEIGHBOURS, PADS, changed, rows
from against_eager import results_of as results_of_output
from families import LENGTH, Family, inputs_of, make_model
from fastattn.checking import Change, Measured, Results, compare_results, measure_reference
from fastattn.patching import Report

LOSS_NEIGHBOURS = 12
"""For the loss, a single number, which comes out right by luck more often than a tensor does."""


class Wide(TorchFunctionMode):
    """Computes float64 in float64 where a model asks for float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if args and isinstance(args[0], torch.Tensor) and args[0].dtype is torch.float64:
            if func is torch.Tensor.float:
                return args[0]
            args = tuple(torch.float64 if x is torch.float32 else x for x in args)
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def measure(
    model: Any, run: Callable[[Any], Results], neighbours: int = NEIGHBOURS
) -> list[Measured]:
    """What a model gives, and in float64, there and at neighbours of its parameters.

    Args:
        model: stays as it is.
        run: gives outputs and gradients of a model, which it may change.
        neighbours: how many.
    """

    def run_changed(change: Change) -> Results:
        with Wide() if change.wide else contextlib.nullcontext():
            return run(changed(model, change))

    return measure_reference(run_changed, neighbours)


def breaches(actual: Mapping[str, torch.Tensor], measured: list[Measured]) -> list[str]:
    """What of results breaks the accuracy rule, or has another dtype or another name, in words."""
    expected = measured[0].reference
    if actual.keys() != expected.keys():
        return [f"another name: {sorted(actual.keys() ^ expected.keys())}"]
    words = [f"{n} is {actual[n].dtype}" for n, x in expected.items() if actual[n].dtype != x.dtype]
    return words + [
        f"{found.name}: {found.error:.1e} of {found.allowed:.1e} allowed {found.note}"
        for found in compare_results(actual, measured)
        if not found.passed
    ]


def gradients_of(model: Any) -> dict[str, torch.Tensor]:
    """The gradients of a model by name, as results are named."""
    named = model.named_parameters()
    return {f"d{name}": p.grad.clone() for name, p in named if p.grad is not None}


def parts_of(report: Report) -> list[str]:
    """What of a model a patch has replaced, in the words of the table of families."""
    ours = [getattr(entry.ours, "body", entry.ours).__name__ for entry in report.replaced]
    parts = {
        "attention": any(change.setting == "attention" for change in report.changed),
        "norms": any("Norm" in name for name in ours),
        "sums": "PatchedLayer" in ours,
        "rotary": "PatchedAttention" in ours,
        "MLP": "PatchedMLP" in ours,
        "loss": "DeferringModel" in ours,
    }
    return [part for part, there in parts.items() if there]


def takes_labels(family: Family) -> bool:
    """Whether models of a family have a loss of tokens."""
    return family.kind in ("decoder", "encoder", "pair")


def call_with_labels(family: Family, scenario: str, model: Any) -> tuple[Any, torch.Tensor]:
    """What a model returns, and which of its tokens are none of padding."""
    inputs = inputs_of(family)
    targets = inputs.get("decoder_input_ids", inputs.get("input_ids"))
    assert targets is not None
    real = torch.ones_like(targets, dtype=torch.bool)
    labels = targets.clone()
    if scenario == "padded":
        places = torch.arange(LENGTH).expand(len(PADS), LENGTH)
        mask = places >= torch.tensor(PADS)[:, None]
        inputs["attention_mask"] = mask.long()
        if family.kind != "pair":
            # A first token after padding sees nothing that could tell it.
            real = mask
            labels = torch.where(mask & (places != torch.tensor(PADS)[:, None]), labels, -100)
    if family.kind == "decoder":
        inputs["use_cache"] = False  # type: ignore[assignment]
    labels[:, 3] = -100
    dtype = next(model.parameters()).dtype
    cast = {
        name: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in inputs.items()
    }
    return model(**cast, labels=labels), real


def loss_of(family: Family, scenario: str, model: Any) -> Results:
    """The loss of a training call alone."""
    return {"loss": call_with_labels(family, scenario, model)[0].loss.detach()}


def results_of(family: Family, scenario: str, model: Any) -> Results:
    """Logits and gradients of a training call; of a model without a loss what it returns."""
    if not takes_labels(family):
        return results_of_output(model, rows(family, scenario))
    model.zero_grad()
    output, real = call_with_labels(family, scenario, model)
    results = {"logits": output.logits[real].detach()}
    output.loss.backward()
    return {**results, **gradients_of(model)}


def faults(
    family: Family, scenario: str, dtype: torch.dtype, **wanted: bool
) -> tuple[list[str], Report]:
    """What of a patched model breaks the accuracy rule, in words, and the patch's report."""
    model = make_model(family).to(dtype)
    measurements = {results_of: NEIGHBOURS}
    if takes_labels(family):
        measurements[loss_of] = LOSS_NEIGHBOURS
    measured = {
        results: measure(model, functools.partial(results, family, scenario), neighbours)
        for results, neighbours in measurements.items()
    }
    report = fastattn.patch(model, **wanted)
    found = []
    for results, expected in measured.items():
        found += breaches(results(family, scenario, model), expected)
    return found, report
