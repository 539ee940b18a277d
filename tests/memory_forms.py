"""Tensors that lie in memory as no kernel expects, and a sample for every tensor argument."""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from fastattn.ops.attention.samples import random_mask, slopes
from fastattn.ops.core.catalog import OPERATIONS, Normal, Operation, Sample, make_seed

Form = Callable[[torch.Tensor], torch.Tensor]


MARGIN = 2**15
"""More numbers than a tile has that goes beyond the end of a tensor."""


class Placed(Sample):
    """A sample whose tensors lie in memory in some form: one for all, or by the argument's name."""

    def __init__(self, sample: Sample, forms: Form | Mapping[str, Form]) -> None:
        super().__init__(sample.name, **sample.arguments)
        self.forms = forms

    def make(self, dtype: torch.dtype, device: str | torch.device, seed: int = 0) -> dict[str, Any]:
        """The arguments, see there."""
        made = super().make(dtype, device, seed)
        for name, value in made.items():
            form = self.forms.get(name) if isinstance(self.forms, Mapping) else self.forms
            if form is not None and isinstance(value, torch.Tensor) and value.numel():
                placed = form(value.detach()).detach()
                made[name] = placed.requires_grad_(value.requires_grad)
        return made


class _PlaceGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, form: Form) -> torch.Tensor:
        ctx.form = form
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return ctx.form(gradient) if gradient.numel() else gradient, None


def place_gradients(function: Callable[..., Any], form: Form) -> Callable[..., Any]:
    """A function whose outputs' gradients come in some form of memory."""

    def placed(**arguments: Any) -> tuple[torch.Tensor, ...]:
        outputs = function(**arguments)
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        return tuple(_PlaceGradient.apply(output, form) for output in outputs)

    return placed


class Subclassed(torch.Tensor):
    """A subclass without a behaviour of its own."""


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers in memory of their own, one after another."""
    made = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    return made.copy_(tensor.detach())


def _in(memory: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    return memory.copy_(tensor)


def filled(tensor: torch.Tensor, *shape: int) -> torch.Tensor:
    """Memory around a tensor, with numbers that nobody may read: times 0 they are NaN still."""
    value: Any = 1 if tensor.dtype is torch.bool else 97
    if tensor.is_floating_point():
        value = math.nan
    return torch.full(shape, value, dtype=tensor.dtype, device=tensor.device)


def _at_an_offset(tensor: torch.Tensor) -> torch.Tensor:
    memory = filled(tensor, tensor.numel() + 3)
    return _in(memory[1 : tensor.numel() + 1].view(tensor.shape), tensor)


def _column(tensor: torch.Tensor) -> torch.Tensor:
    """Of a matrix of all layers' parameters, say, or every third number."""
    return _in(filled(tensor, *tensor.shape, 3)[..., 1], tensor)


def _slice(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.dim():
        return _in(filled(tensor, 3)[1], tensor)
    *leading, last = tensor.shape
    return _in(filled(tensor, *leading, last + 3)[..., 1 : last + 1], tensor)


def _every_second_row(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.dim():
        return _column(tensor)
    return _in(filled(tensor, 2 * tensor.shape[0], *tensor.shape[1:])[::2], tensor)


def _reversed(tensor: torch.Tensor) -> torch.Tensor:
    """The first dimension innermost."""
    order = tuple(reversed(range(tensor.dim())))
    return _in(filled(tensor, *reversed(tensor.shape)).permute(order), tensor)


def _second_innermost(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dim() < 3:
        return _reversed(tensor)
    return _in(filled(tensor, *tensor.transpose(1, 2).shape).transpose(1, 2), tensor)


def _odd_strides_of_one(tensor: torch.Tensor) -> torch.Tensor:
    """Strides of dimensions with one element, which are never used, are anything."""
    strides = [
        7 if size == 1 else stride
        for size, stride in zip(tensor.shape, plain(tensor).stride(), strict=True)
    ]
    return plain(tensor).as_strided(tensor.shape, strides)


def _one_number(tensor: torch.Tensor) -> torch.Tensor:
    return plain(tensor).flatten()[0].expand(tensor.shape)


def _one_row(tensor: torch.Tensor) -> torch.Tensor:
    return plain(tensor)[:1].expand(tensor.shape) if tensor.dim() else tensor


def amid_garbage(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers, rows and columns of a larger matrix that is itself amid larger memory."""
    if not tensor.dim():
        return _column(tensor)
    rows = tensor.unsqueeze(0) if tensor.dim() == 1 else tensor
    around = (*rows.shape[:-2], rows.shape[-2] + 3, rows.shape[-1] + 5)
    size = math.prod(around)
    memory = filled(tensor, size + 2 * MARGIN)[MARGIN : MARGIN + size].view(around)
    return _in(memory[..., 1:-2, 2:-3], rows).view(tensor.shape if tensor.dim() > 1 else -1)


def apart(tensor: torch.Tensor) -> torch.Tensor:
    """Rows apart from each other and from all else, as aligned as rows of their length are."""
    if not tensor.dim():
        return _column(tensor)
    *leading, last = tensor.shape
    rows = filled(tensor, *(size + 1 for size in leading), last + 32)
    return _in(rows[(*(slice(size) for size in leading), slice(16, last + 16))], tensor)


def _negated(tensor: torch.Tensor) -> torch.Tensor:
    return torch._neg_view(plain(-tensor))  # type: ignore[attr-defined]


def _imaginary(tensor: torch.Tensor) -> torch.Tensor:
    """The imaginary part of a conjugate, whose sign is not in memory, and every second number."""
    if tensor.dtype not in (torch.float32, torch.float64):
        return _negated(tensor)
    return torch.complex(torch.full_like(tensor, 97.0), plain(-tensor)).conj().imag


def _subclassed(tensor: torch.Tensor) -> torch.Tensor:
    return plain(tensor).as_subclass(Subclassed)


FORMS: dict[str, Form] = {
    "at an offset": _at_an_offset,
    "column": _column,
    "slice of wider rows": _slice,
    "every second row": _every_second_row,
    "reversed order": _reversed,
    "second dimension innermost": _second_innermost,
    "odd strides of dimensions of one": _odd_strides_of_one,
    "expanded from one number": _one_number,
    "expanded from one row": _one_row,
    "negated view": _negated,
    "imaginary part of a conjugate": _imaginary,
    "subclass": _subclassed,
}
"""Each makes a tensor that means the same as one whose numbers lie one after another."""


def forms_of(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """A tensor in every form that it can have, but for those that come to the same."""
    kinds = {_kind(plain(tensor))}
    made = {}
    for name, form in FORMS.items():
        if tensor.dtype is torch.bool and form in (_negated, _imaginary):
            continue
        other = form(tensor.detach())
        if _kind(other) not in kinds:
            kinds.add(_kind(other))
            made[name] = other
    return made


def _kind(tensor: torch.Tensor) -> tuple:
    offset = tensor.data_ptr() % 16 != 0
    return type(tensor), tensor.is_neg(), tensor.stride(), offset


def _nested(layout: torch.layout) -> Form:
    def make(tensor: torch.Tensor) -> torch.Tensor:
        rows = [tensor.new_zeros(length, 8) for length in (3, 5)]
        return torch.nested.nested_tensor(rows, layout=layout)

    return make


NESTED: dict[str, Form] = {"jagged": _nested(torch.jagged), "strided": _nested(torch.strided)}
"""Each makes a nested tensor of a tensor's dtype on its device."""


def _integers(*numbers: int) -> Callable[[str | torch.device], torch.Tensor]:
    return lambda device: torch.tensor(numbers, device=device)


def _documents(*numbers: int) -> Callable[[str | torch.device], torch.Tensor]:
    return lambda device: torch.tensor([numbers, numbers[::-1]], device=device)


def _cumulative(*numbers: int) -> Callable[[str | torch.device], torch.Tensor]:
    return lambda device: torch.tensor(numbers, device=device, dtype=torch.int32)


TERMS: dict[str, Any] = {
    "mask": random_mask(2, 1, 5, 6),
    "bias": (2, 5, 6),
    "alibi_slopes": slopes(2),
    "kv_lengths": _integers(6, 4),
}

DROPOUT: dict[str, Any] = {"sinks": (2,), "dropout_p": 0.3, "dropout_seed": make_seed(7)}

SQUARE = {"q": (2, 2, 6, 8), "k": (2, 1, 6, 8), "v": (2, 1, 6, 8)}
CROSS = {"q": (2, 2, 5, 8), "k": (2, 1, 6, 8), "v": (2, 1, 6, 8)}
PACKED = {
    "q": (9, 2, 8),
    "k": (8, 1, 8),
    "v": (8, 1, 8),
    "cu_seqlens_q": _cumulative(0, 5, 9),
    "cu_seqlens_k": _cumulative(0, 6, 8),
    "max_seqlen_q": 5,
    "max_seqlen_k": 6,
}
LSE = Normal((2, 2, 5), torch.float32, mean=2.0)

# Attention's terms are tensors of few of its samples, and these of many numbers.
MORE: dict[str, tuple[Sample, ...]] = {
    "attention": (
        Sample("terms", **CROSS, **TERMS, **DROPOUT, return_lse=True),
        Sample("documents", **SQUARE, document_ids=_documents(0, 0, 0, 1, 1, 1)),
    ),
    "attention_varlen": (
        Sample("terms", **PACKED, **TERMS, **DROPOUT, return_lse=True),
        Sample(
            "documents",
            **{**PACKED, "max_seqlen_k": 5, "cu_seqlens_k": _cumulative(0, 5, 8)},
            document_ids=_documents(0, 0, 1, 1, 1),
        ),
    ),
    "attention_weights": (
        Sample("terms", q=CROSS["q"], k=CROSS["k"], lse=LSE, **TERMS),
        Sample(
            "documents",
            q=SQUARE["q"],
            k=SQUARE["k"],
            lse=Normal((2, 2, 6), torch.float32, mean=2.0),
            document_ids=_documents(0, 0, 0, 1, 1, 1),
        ),
    ),
    "apply_rotary_qk": (
        Sample(
            "positions",
            q=(2, 4, 3, 4),
            k=(2, 2, 3, 4),
            cos=lambda device: torch.linspace(0, 1, 14, device=device).view(7, 2),
            sin=lambda device: torch.linspace(1, 0, 14, device=device).view(7, 2),
            positions=lambda device: torch.tensor([[6, 0, 2], [1, 1, 5]], device=device),
        ),
    ),
}


def tensor_arguments(operation: Operation) -> list[str]:
    """The arguments of an op that are tensors, or may be."""
    parameters = inspect.signature(operation.function).parameters
    return [name for name, parameter in parameters.items() if "Tensor" in str(parameter.annotation)]


def sample_with(operation: Operation, argument: str) -> Sample:
    """The op's first sample if it has a tensor for the argument, else the smallest that does.

    Raises:
        LookupError: none does; then a small sample has to be added, to the op's or above.
    """
    found: list[tuple[int, Sample]] = []
    for sample in (*operation.samples, *MORE.get(operation.name, ())):
        made = sample.make(torch.float64, "cpu")
        tensors = [value for value in made.values() if isinstance(value, torch.Tensor)]
        if isinstance(made.get(argument), torch.Tensor) and all(t.numel() for t in tensors):
            if sample is operation.samples[0]:
                return sample
            found.append((sum(tensor.numel() for tensor in tensors), sample))
    if not found:
        raise LookupError(f"no sample of {operation.name} has a tensor for {argument}")
    return min(found, key=lambda pair: pair[0])[1]


CASES: list[tuple[Operation, str]] = [
    (operation, argument)
    for operation in OPERATIONS.values()
    for argument in tensor_arguments(operation)
]
