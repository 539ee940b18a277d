"""Rotary positions of Hugging Face's models, computed by `fastattn.apply_rotary_qk`.

A model's attention calls a function of its module, `apply_rotary_pos_emb(q, k, cos, sin)` mostly,
of which there are some forty texts. So such a function is tried: it is called on random heads and
tables, and where one of our forms gives the same, in the same dtype and with an error that is no
larger, a forward made anew calls that. Calls of another form, with other dtypes or shapes, go to
the model's own function. The module that has it is not touched.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn as nn

from ... import ops
from ...ops.core.tensor_kinds import is_foreign
from ...patching import Rule, make_twin
from ...patching.texts import Forward, called_names, read_text, write_forward

NARROW, WIDE = torch.bfloat16, torch.float32
DTYPES = (torch.float16, NARROW, WIDE)

SHAPE = {"batch": 2, "heads": 4, "key heads": 2, "tokens": 5, "columns": 16}
"""What a function is tried on."""

CANDIDATES = [
    (False, "halves", False),
    (True, "pairs", False),
    (True, "halves", False),
    (False, "half", False),
    (True, "half", False),
    (False, "halves", True),
]
"""What may be interleaved, of which tables, and regrouped."""

Rotation = Callable[..., Any]


@dataclass(frozen=True)
class RotaryForm:
    """Which rotation a function of a model is.

    Attributes:
        with_keys: whether it takes queries and keys, and not one tensor.
        layouts: how its heads and tables may lie: "heads" is (B, H, S, D) with tables (B, S, R),
            "tokens" (B, S, H, D) with the same, and "packed" (S, H, D) with (S, R).
        chosen: whether the argument `unsqueeze_dim` says which.
        interleaved: see `fastattn.apply_rotary`.
        tables: "half" of R/2 columns, or of R, "halves" that are equal or equal "pairs".
        regrouped: whether pairs of columns are made halves before they are turned, as DeepSeek's.
        partial: whether tables may have fewer columns than heads.
        mixed: pairs of different dtypes, of heads and of tables, with that of the result.
    """

    with_keys: bool
    layouts: frozenset[str]
    chosen: bool
    interleaved: bool
    tables: str
    regrouped: bool = False
    partial: bool = False
    mixed: tuple[tuple[torch.dtype, torch.dtype, torch.dtype], ...] = ()


class PatchedAttention(nn.Module):
    """Attention of another library, which turns queries and keys by our kernel."""

    @staticmethod
    def rewrite(theirs: type[nn.Module]) -> Forward:
        """The class's forward, which calls our rotations."""
        definition = read_text(theirs.forward)
        assert definition is not None
        return write_forward(theirs.forward, definition, _rotations(theirs.forward))


def find_rotary(module: nn.Module, kind: type[nn.Module]) -> Rule | str | None:
    """The rule for a module that turns queries or keys, or why it is left alone."""
    if type(kind) is not type or kind.__module__.startswith("torch."):
        return None
    definition = read_text(kind.forward)
    names = _rotary_names(kind.forward)
    if definition is None or not names:
        return None
    if len(_rotations(kind.forward)) < len(names):
        return "rotary positions of a form that is not known"
    try:
        return Rule(kind, make_twin(kind, PatchedAttention))
    except ValueError as error:
        return f"its forward cannot be made anew: {error}"


def make_rotation(theirs: Rotation, form: RotaryForm) -> Rotation:
    """A function that computes what `theirs` does, by ours wherever the form says so."""

    @functools.wraps(theirs)
    def rotate(*args: Any, **kwargs: Any) -> Any:
        count = 4 if form.with_keys else 3
        if len(args) == count and set(kwargs) <= {"unsqueeze_dim"}:
            *heads, cos, sin = args
            layout = _layout(form, heads[0], kwargs.get("unsqueeze_dim", 1))
            if layout is not None and _takes(form, layout, heads, cos, sin):
                dtype = _result_dtype(form, heads[0].dtype, cos.dtype)
                turned = _turn(form, layout, [x.to(dtype) for x in heads], cos, sin)
                return turned if form.with_keys else turned[0]
        return theirs(*args, **kwargs)

    return rotate


@functools.cache
def find_form(function: Rotation) -> RotaryForm | None:
    """The form of a function that turns heads, found by trying it; None if it has none of ours."""
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return None
    with_keys = names[2:4] == ["cos", "sin"]
    if not with_keys and names[1:3] != ["cos", "sin"]:
        return None
    chosen = "unsqueeze_dim" in names
    if chosen and inspect.signature(function).parameters["unsqueeze_dim"].default != 1:
        return None
    for interleaved, tables, regrouped in CANDIDATES:
        form = RotaryForm(with_keys, frozenset(), chosen, interleaved, tables, regrouped)
        layouts = [
            layout
            for layout in ("heads", "tokens", "packed")
            if all(_agrees(function, form, layout, dtype, dtype) for dtype in (WIDE, NARROW))
        ]
        if layouts:
            form = replace(form, layouts=frozenset(layouts))
            partial = _agrees(function, form, layouts[0], WIDE, WIDE, partial=True)
            mixed = tuple(_mixed(function, form, layouts[0]))
            return replace(form, partial=partial, mixed=mixed)
    return None


def _rotary_names(forward: Forward) -> list[str]:
    """Names of functions that a forward calls and that are rotations by their names."""
    definition = read_text(forward)
    names = () if definition is None else called_names(definition)
    known = inspect.unwrap(forward).__globals__
    return sorted(name for name in names if "rotary" in name and callable(known.get(name)))


def _rotations(forward: Forward) -> dict[str, Rotation]:
    """Ours for those of them whose form is known."""
    known = inspect.unwrap(forward).__globals__
    forms = {name: find_form(known[name]) for name in _rotary_names(forward)}
    return {n: make_rotation(known[n], form) for n, form in forms.items() if form is not None}


def _layout(form: RotaryForm, x: Any, unsqueeze_dim: Any) -> str | None:
    """How heads lie in a call, None where it is not known."""
    if not isinstance(x, torch.Tensor):
        return None
    if x.dim() == 3:
        found = "packed"
    elif form.chosen:
        found = {1: "heads", 2: "tokens"}.get(unsqueeze_dim)
    else:
        found = next((name for name in ("heads", "tokens") if name in form.layouts), None)
    return found if found in form.layouts else None


def _takes(form: RotaryForm, layout: str, heads: list[Any], cos: Any, sin: Any) -> bool:
    """Whether a call is one that ours and theirs compute alike."""
    tensors = (*heads, cos, sin)
    if any(not isinstance(x, torch.Tensor) or is_foreign(x) for x in tensors):
        return False
    x = heads[0]
    width = cos.shape[-1] * (2 if form.tables == "half" else 1)
    fits = 0 < width <= x.shape[-1] and width % 2 == 0
    if not fits or (width < x.shape[-1] and not form.partial):
        return False
    if x.dim() != (3 if layout == "packed" else 4) or cos.shape != sin.shape:
        return False
    batch, tokens = (x.shape[0], x.shape[2 if layout == "heads" else 1])
    rows = ((x.shape[0],),) if layout == "packed" else ((batch, tokens), (1, tokens))
    if cos.shape[:-1] not in rows or cos.requires_grad or sin.requires_grad:
        return False
    places = [n for n in range(x.dim()) if n != (2 if layout == "tokens" else 1)]
    if any(other.dtype is not x.dtype or other.dim() != x.dim() for other in heads):
        return False
    if any(other.shape[n] != x.shape[n] for other in heads for n in places):
        return False
    return cos.dtype is sin.dtype and _result_dtype(form, x.dtype, cos.dtype) is not None


def _result_dtype(form: RotaryForm, x: torch.dtype, table: torch.dtype) -> torch.dtype | None:
    """What theirs gives for heads and tables of two dtypes, None where that is not known."""
    if x is table:
        return x if x in DTYPES else None
    return next((result for a, b, result in form.mixed if (a, b) == (x, table)), None)


def _turn(
    form: RotaryForm, layout: str, heads: list[torch.Tensor], cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """The turned heads, by our op."""
    swapped = {"heads": None, "tokens": (1, 2), "packed": (0, 1)}[layout]
    given = heads if swapped is None else [x.transpose(*swapped) for x in heads]
    if form.regrouped:
        given = [x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2) for x in given]
    options: dict[str, Any] = {
        "interleaved": form.interleaved,
        "full_width": form.tables == "pairs",
    }
    if form.tables == "halves":
        half = cos.shape[-1] // 2
        cos, sin = cos[..., :half], sin[..., :half]
    turned: tuple[torch.Tensor, ...]
    if form.with_keys:
        turned = ops.apply_rotary_qk(given[0], given[1], cos, sin, **options)
    else:
        turned = (ops.apply_rotary(given[0], cos, sin, **options),)
    return turned if swapped is None else tuple(x.transpose(*swapped) for x in turned)


def _mixed(
    function: Rotation, form: RotaryForm, layout: str
) -> Iterator[tuple[torch.dtype, torch.dtype, torch.dtype]]:
    """The pairs of different dtypes in which they agree, with the result's."""
    for narrow in DTYPES[:2]:
        for pair in ((narrow, WIDE), (WIDE, narrow)):
            for result in (WIDE, pair[0]):
                candidate = replace(form, mixed=((*pair, result),))
                if _agrees(function, candidate, layout, *pair):
                    yield *pair, result
                    break


def _agrees(
    function: Rotation,
    form: RotaryForm,
    layout: str,
    dtype: torch.dtype,
    table_dtype: torch.dtype,
    partial: bool = False,
) -> bool:
    """Whether theirs and ours give the same in one layout and one pair of dtypes."""
    try:
        with (
            torch.random.fork_rng(devices=[]),
            torch.autocast("cpu", enabled=False),
            torch.enable_grad(),
            ops.backend("reference"),
        ):
            return _compare(function, form, layout, dtype, table_dtype, partial)
    except Exception:  # Whatever a function of another library raises, it does not take this.
        return False


def _compare(
    function: Rotation,
    form: RotaryForm,
    layout: str,
    dtype: torch.dtype,
    table_dtype: torch.dtype,
    partial: bool,
) -> bool:
    generator = torch.Generator().manual_seed(0)
    heads, cos, sin = _sample(form, layout, partial, generator)
    heads = [x.to(dtype).requires_grad_() for x in heads]
    wide = [x.detach().double().requires_grad_() for x in heads]
    tables = (cos.to(table_dtype), sin.to(table_dtype))
    options = {"unsqueeze_dim": {"tokens": 2}.get(layout, 1)} if form.chosen else {}
    theirs = function(*heads, *tables, **options)
    theirs = theirs if form.with_keys else (theirs,)
    result = dtype if dtype is table_dtype else _result_dtype(form, dtype, table_dtype)
    ours = _turn(form, layout, [x.to(result) for x in heads], *tables)
    exact = _turn(form, layout, wide, *(table.double() for table in tables))
    if not isinstance(theirs, tuple) or len(theirs) != len(heads):
        return False
    for a, b, truth, *leaves in zip(ours, theirs, exact, heads, heads, wide, strict=True):
        if type(b) is not torch.Tensor or a.shape != b.shape or a.dtype is not b.dtype:
            return False
        incoming = torch.randn(truth.shape, generator=generator).to(b.dtype)
        gradients = [
            torch.autograd.grad(y, x, incoming.to(y.dtype))[0]
            for y, x in zip((a, b, truth), leaves, strict=True)
        ]
        if not (_is_as_good(a, b, truth) and _is_as_good(*gradients)):
            return False
    return True


def _is_as_good(ours: torch.Tensor, theirs: torch.Tensor, truth: torch.Tensor) -> bool:
    """Whether theirs is the truth but for rounding, and ours is no further from it."""
    errors = [(x.double() - truth).abs().max() for x in (ours, theirs)]
    unit = torch.finfo(ours.dtype).eps * truth.abs().max()
    return bool(errors[1] <= 4.0 * unit) and bool(errors[0] <= errors[1] + unit)


def _sample(
    form: RotaryForm, layout: str, partial: bool, generator: torch.Generator
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Random heads, and tables of random angles."""
    batch, tokens, columns = (SHAPE[name] for name in ("batch", "tokens", "columns"))
    counts = [SHAPE["heads"], SHAPE["key heads"]] if form.with_keys else [SHAPE["heads"]]
    shapes = {
        "heads": lambda heads: (batch, heads, tokens, columns),
        "tokens": lambda heads: (batch, tokens, heads, columns),
        "packed": lambda heads: (tokens, heads, columns),
    }
    heads = [torch.randn(shapes[layout](count), generator=generator) for count in counts]
    turned = columns // 2 if partial else columns
    rows = (tokens,) if layout == "packed" else (batch, tokens)
    angles = torch.rand((*rows, turned // 2), generator=generator) * 6.0
    if form.tables == "pairs":
        angles = angles.repeat_interleave(2, -1)
    elif form.tables == "halves":
        angles = torch.cat((angles, angles), -1)
    return heads, angles.cos(), angles.sin()
