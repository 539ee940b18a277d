"""A model beside itself with eager attention: outputs and gradients by the accuracy rule."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch

from families import LENGTH, Family, inputs_of, make_model, output_of
from fastattn.checking import (
    Change,
    Results,
    compare_results,
    measure_reference,
)

PADS = (4, 0)
"""How many tokens at the left of each row are padding."""

DOCUMENTS = ((5, 6, 3), (2, 12))
"""The lengths of the documents packed into each row."""

NEIGHBOURS = 2
"""At how many neighbours eager attention's own error is measured as well."""

SCENARIOS = ("plain", "padded", "packed")

Run = Callable[[Any], torch.Tensor]


def takes(family: Family, scenario: str) -> bool:
    """Whether a scenario makes sense for a family."""
    if scenario == "padded":
        return family.pads and family.kind in ("decoder", "encoder", "pair")
    return scenario == "plain" or (family.packs and family.kind == "decoder")


def rows(family: Family, scenario: str) -> Run:
    """Calls a model as users do; what comes out are the real tokens alone, (tokens, columns)."""
    inputs = inputs_of(family)
    if scenario == "plain":
        return lambda model: output_of(model, **inputs).flatten(0, 1)
    if scenario == "packed":
        positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in DOCUMENTS])
        return lambda model: output_of(model, **inputs, position_ids=positions).flatten(0, 1)
    places = torch.arange(LENGTH).expand(len(PADS), LENGTH)
    real = places >= torch.tensor(PADS)[:, None]
    padded: dict[str, torch.Tensor] = {**inputs, "attention_mask": real.long()}
    if family.kind == "decoder" and family.model != "OPTForCausalLM":
        padded["position_ids"] = (places - torch.tensor(PADS)[:, None]).clamp(min=0)
    if family.kind == "pair":
        return lambda model: output_of(model, **padded).flatten(0, 1)
    return lambda model: output_of(model, **padded)[real]


def rows_of_documents(family: Family) -> Run:
    """The same tokens as `rows` gives packed, each document by itself."""
    inputs = inputs_of(family)["input_ids"]
    parts = [
        part for row, lengths in zip(inputs, DOCUMENTS, strict=True) for part in row.split(lengths)
    ]
    return lambda model: torch.cat([output_of(model, input_ids=part[None])[0] for part in parts])


def results_of(model: Any, run: Run) -> Results:
    """Output, loss and gradients of a call; the loss treats every number otherwise."""
    model.zero_grad()
    output = run(model)
    generator = torch.Generator().manual_seed(4)
    weights = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)
    loss = (output + weights).double().square().mean()
    loss.backward()
    results = {"output": output.detach(), "loss": loss.detach().to(output.dtype)}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            results[f"d{name}"] = parameter.grad.clone()
    return results


def faults(
    family: Family,
    scenario: str,
    dtype: torch.dtype,
    implementation: str = "fastattn",
    prepare: Callable[[Any], Any] = lambda model: None,
    experts: str = "eager",
) -> list[str]:
    """What of a model breaks the accuracy rule, in words; the reference is eager attention.

    Packed documents are held against each by itself.

    Args:
        family: which.
        scenario: of `SCENARIOS`.
        dtype: of the model.
        implementation: the name of its attention.
        prepare: changes the model in place before it is called with that.
        experts: the name of its experts.
    """
    model = make_model(family).to(dtype)
    model.config._experts_implementation = experts
    run = rows(family, scenario)
    alone = rows_of_documents(family) if scenario == "packed" else run
    with softmax_in_its_dtype():
        measured = measure_reference(
            lambda change: results_of(changed(model, change), alone), NEIGHBOURS
        )
    model.set_attn_implementation(implementation)
    prepare(model)
    actual = results_of(model, run)
    missing = set(measured[0].truth) ^ set(actual)
    assert not missing, f"a gradient is missing: {sorted(missing)}"
    return [
        f"{found.name}: {found.error:.1e} of {found.allowed:.1e} allowed {found.note}"
        for found in compare_results(actual, measured)
        if not found.passed
    ]


def changed(model: Any, change: Change) -> Any:
    """A copy of a model with changed parameters, which computes in their dtype."""
    copied = copy.deepcopy(model)
    for parameter in copied.parameters():
        parameter.data = change(parameter.data)
    return copied.double() if change.wide else copied


@contextlib.contextmanager
def softmax_in_its_dtype() -> Iterator[None]:
    """Have eager attention compute float64 in float64, where it asks for softmax in float32.

    There the largest number of float64, by which it masks, would be infinite.
    """
    softmax = torch.nn.functional.softmax

    def wide(input: torch.Tensor, *args: Any, dtype: Any = None, **kwargs: Any) -> torch.Tensor:
        return softmax(input, *args, dtype=None if input.dtype.itemsize == 8 else dtype, **kwargs)

    torch.nn.functional.softmax = wide
    try:
        yield
    finally:
        torch.nn.functional.softmax = softmax
