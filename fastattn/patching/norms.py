"""Norms of any library, known by what they compute.

There are some hundred classes of RMSNorm and LayerNorm, alike but for where they round and for the
dtype of the result. So a class is tried: a module of it with random numbers for its parameters is
called on random rows in each pair of dtypes of rows and weight, and where one of our norms gives
the same bits in the same dtype, it takes the class's place for these dtypes. Other dtypes, and
whatever else a call may bring, go to the class's own forward.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn as nn

from .. import ops
from ..ops.core.norm import Casting
from ..ops.core.tensor_kinds import is_foreign
from .rules import Rule
from .twins import make_twin

OURS = __name__.partition(".")[0]

NARROW, WIDE = torch.bfloat16, torch.float32

FEWEST_COLUMNS = 2
"""Of a single column there is little to tell norms apart by."""

OF_EVERY_MODULE = frozenset(vars(nn.Module()))
"""Attributes that say nothing of what a class computes."""

ELEMENTS = 2048
"""How many random numbers a class is tried on, at least."""

ALIKE = 0.99
"""The share of elements that must have the same bits. Where a statistic is summed in another order,
one in a thousand falls to the other side of a rounding; another casting changes one in five."""


@dataclass(frozen=True)
class NormForm:
    """Which of our norms a class is.

    Attributes:
        centered: whether it is a LayerNorm.
        eps: the name of the attribute that has it.
        casting: see `fastattn.rms_norm`.
        weight_offset: see there.
        promotes: whether the result has the wider dtype of rows and weight, and not that of rows.
        narrow_x: whether that holds of rows of 16 bits and a weight of 32.
        wide_x: the reverse.
    """

    centered: bool
    eps: str
    casting: Casting = "float32"
    weight_offset: float = 0.0
    promotes: bool = False
    narrow_x: bool = False
    wide_x: bool = False


class PatchedNorm(nn.Module):
    """A norm of another library, computed by `fastattn.rms_norm` or `fastattn.layer_norm`."""

    _fastattn_norm: NormForm

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the class computes, by ours where they have been found to agree."""
        if len(args) == 1 and not kwargs:
            x, form = args[0], self._fastattn_norm
            weight, bias = getattr(self, "weight", None), getattr(self, "bias", None)
            if takes(form, x, weight, bias):
                return _compute(form, x, weight, bias, getattr(self, form.eps))
        return super().forward(*args, **kwargs)


def find_norm(module: nn.Module, kind: type[nn.Module]) -> Rule | str | None:
    """The rule for a norm that no table has, or why it is left alone; None if it is no norm."""
    if not _is_named_norm(module, kind):
        return None
    parameters = dict(module.named_parameters())
    if not parameters.keys() <= {"weight", "bias"}:
        return f"a norm with the parameters {', '.join(sorted(parameters))}"
    if any(p.dim() != 1 for p in parameters.values()):
        return "a norm over more than the last dimension"
    if type(kind) is not type:
        return "its class has a metaclass"
    form = _form_of(module, kind)
    if form is None:
        return "a norm that computes otherwise than ours"

    def attributes(_: nn.Module) -> Mapping[str, Any]:
        return {"_fastattn_norm": form}

    return Rule(kind, make_twin(kind, PatchedNorm), attributes)


def _is_named_norm(module: nn.Module, kind: type[nn.Module]) -> bool:
    if kind.__module__.partition(".")[0] in ("torch", OURS) or any(module.children()):
        return False
    if any(True for _ in module.buffers()):
        return False
    return issubclass(kind, nn.LayerNorm | nn.RMSNorm) or "norm" in kind.__name__.lower()


def takes(form: NormForm, x: Any, weight: Any, bias: Any, dtype: torch.dtype | None = None) -> bool:
    """Whether a call is one of those in which ours and theirs agree.

    Args:
        form: of the norm.
        x: rows.
        weight, bias: of the norm, or None.
        dtype: that the rows will have; None for the one that they have.
    """
    if not isinstance(x, torch.Tensor) or x.dim() == 0 or is_foreign(x):
        return False
    dtype = dtype or x.dtype
    if dtype not in (torch.float16, NARROW, WIDE):
        return False
    for parameter in (weight, bias):
        if parameter is None:
            continue
        if is_foreign(parameter) or parameter.shape != x.shape[-1:]:
            return False
        if parameter.dtype is dtype:
            continue
        if dtype is WIDE:
            agreed = form.wide_x and parameter.dtype.itemsize == 2
        else:
            agreed = form.narrow_x and parameter.dtype is WIDE
        if not agreed:
            return False
    return True


def _compute(form: NormForm, x: Any, weight: Any, bias: Any, eps: Any) -> torch.Tensor:
    if form.centered:
        return ops.layer_norm(x, weight, bias, eps)
    out_dtype = None
    if form.promotes and weight is not None:
        out_dtype = torch.promote_types(x.dtype, weight.dtype)
    return ops.rms_norm(
        x,
        weight,
        eps,
        bias=bias,
        weight_offset=form.weight_offset,
        casting=form.casting,
        out_dtype=out_dtype,
    )


# By class, and there by what else may decide what its modules compute.
_known: WeakKeyDictionary[type, dict[Any, NormForm | None]] = WeakKeyDictionary()


def _form_of(module: nn.Module, kind: type[nn.Module]) -> NormForm | None:
    """What `_find_form` finds, looked for once for modules that are alike."""
    settings = _settings_of(module)
    shapes = tuple((name, p.shape) for name, p in module.named_parameters())
    key = (repr(sorted(settings.items())), shapes)
    known = _known.setdefault(kind, {})
    if key not in known:
        known[key] = _find_form(module, kind)
    return known[key]


def _settings_of(module: nn.Module) -> dict[str, Any]:
    """The attributes that a module's author gave it, but for those that cannot be compared.

    Private ones too, which may decide what is computed, as timm's `_fast_norm` does.
    """
    plain = (bool, float, int, str, tuple, torch.Size, type(None))
    return {
        name: value
        for name, value in vars(module).items()
        if name not in OF_EVERY_MODULE and isinstance(value, plain)
    }


def _find_form(module: nn.Module, kind: type[nn.Module]) -> NormForm | None:
    """The form that agrees in most pairs of dtypes, and in both of one dtype, if there is one."""
    tried = (_agreement(module, kind, candidate) for candidate in _candidates(module))
    found = [form for form in tried if form is not None]
    return max(found, key=lambda form: form.narrow_x + form.wide_x, default=None)


def _candidates(module: nn.Module) -> Iterator[NormForm]:
    for name, value in _settings_of(module).items():
        if (type(value) is float and 0.0 < value < 0.1) or (name, value) == ("eps", None):
            castings: tuple[Casting, ...] = ("float32", "llama", "t5")
            for promotes in (False, True):
                for casting in castings:
                    yield NormForm(False, name, casting, promotes=promotes)
                yield NormForm(False, name, weight_offset=1.0, promotes=promotes)
            if value is not None:
                yield NormForm(True, name)


def _agreement(module: nn.Module, kind: type[nn.Module], form: NormForm) -> NormForm | None:
    """The form with what is found of mixed dtypes, or None where it is not this one."""
    agreed = {}
    for pair in ((NARROW, NARROW), (WIDE, WIDE), (NARROW, WIDE), (WIDE, NARROW)):
        try:
            agreed[pair] = _agrees(module, kind, form, *pair)
        except Exception:  # Whatever a class of another library raises, it does not take this.
            agreed[pair] = False
        if pair[0] is pair[1] and not agreed[pair]:
            return None
    return replace(form, narrow_x=agreed[NARROW, WIDE], wide_x=agreed[WIDE, NARROW])


def _agrees(
    module: nn.Module,
    kind: type[nn.Module],
    form: NormForm,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
) -> bool:
    """Whether theirs and ours give the same bits, and in float32 the same gradients."""
    generator = torch.Generator().manual_seed(0)
    probe = _probe(module, kind, weight_dtype, generator)
    weight, bias = (getattr(probe, name, None) for name in ("weight", "bias"))
    parameters = [p for p in (weight, bias) if p is not None]
    columns = parameters[0].numel() if parameters else _columns_of(probe)
    if columns < FEWEST_COLUMNS:
        return False
    rows = 3 * -(-ELEMENTS // (3 * columns))
    # Of some rows eps is a part, and some are large.
    scale = torch.tensor([1.0, 2e-3, 30.0]).repeat(rows // 3)[:, None]
    x = (torch.randn(rows, columns, generator=generator) + 0.3) * scale
    x = x.to(dtype).requires_grad_()
    leaves = [x, *parameters]
    device_type = x.device.type
    with (
        torch.random.fork_rng(devices=[]),
        torch.autocast(device_type, enabled=False),
        torch.enable_grad(),
        ops.backend("reference"),
    ):
        for shape in ((1, rows, columns), (1, 3, rows // 3, columns)):
            given = x.view(shape)
            theirs = probe(given)
            if type(theirs) is not torch.Tensor or theirs.shape != given.shape:
                return False
            actual = _compute(form, given, weight, bias, getattr(probe, form.eps))
            if not _alike(actual, theirs):
                return False
        if dtype is WIDE and weight_dtype is WIDE:
            incoming = torch.randn(theirs.shape, generator=generator)
            found, expected = (torch.autograd.grad(y, leaves, incoming) for y in (actual, theirs))
            for a, b in zip(found, expected, strict=True):
                if (a - b).abs().max() > 1e-4 * b.abs().max():
                    return False
    return True


def _probe(
    module: nn.Module, kind: type[nn.Module], dtype: torch.dtype, generator: torch.Generator
) -> nn.Module:
    """A module like another one, with random parameters on the CPU."""
    probe = kind.__new__(kind)
    nn.Module.__init__(probe)
    for name, value in _settings_of(module).items():
        setattr(probe, name, value)
    for name in ("weight", "bias"):
        parameter = getattr(module, name, None)
        if parameter is not None:
            random = 1.0 + 0.3 * torch.randn(parameter.shape, generator=generator)
            parameter = nn.Parameter(random.to(dtype))
        if parameter is not None or hasattr(module, name):
            probe.register_parameter(name, parameter)
    return probe


def _columns_of(norm: nn.Module) -> int:
    shape = getattr(norm, "normalized_shape", (64,))
    return shape[0] if len(shape) == 1 else 0


def _alike(actual: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether nearly all elements have the same bits, in float32 within the order of a sum."""
    if actual.dtype is not theirs.dtype:
        return False
    difference = (actual.double() - theirs.double()).abs()
    size = theirs.double().abs()
    allowed = 2.0**-20 * size.amax(-1, keepdim=True) if actual.dtype is WIDE else 0.0
    same = (difference <= allowed).double().mean()
    return bool(same >= ALIKE) and bool((difference <= 2.0**-6 * size + 1e-6).all())
