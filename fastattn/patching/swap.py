"""Patching a model in place, and undoing it.

A module becomes ours by its class, `module.__class__ = ours`, as in PyTorch's own parametrizations
and `fully_shard`. The object stays the one that parents, optimizers, hooks and closures know, with
the attributes it has, so parameters, buffers, ties and modes have nothing to be copied from or to.
A new module would have to be put wherever the old one is referred to, and could not take the place
of the model itself. What this needs are classes that derive from those they replace; a `Rule` asks
for them.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn.utils import parametrize

from .. import nn as ours
from ..kernels.private import has_forward_hooks
from ..ops.core.arguments import FLOAT_DTYPES
from ..ops.core.sharding import is_distributed
from .libraries import find_libraries
from .norms import find_norm
from .report import Changed, LeftAlone, Replaced, Report
from .rules import CONTAINERS, OPTIONS, UNTOUCHED, Finder, Rule, Wanted, choose_rules

RECORD = "_fastattn_patched"
"""The attribute of a patched module that says what `unpatch` has to restore."""


@dataclass(frozen=True)
class Record:
    """What a patched module was and became, and which attributes it did not have."""

    theirs: type[nn.Module]
    ours: type[nn.Module]
    added: tuple[str, ...]


def patch(
    model: nn.Module,
    *,
    norms: bool = True,
    mlp: bool = True,
    rotary: bool = True,
    loss: bool = True,
    attention: bool = True,
    linear: bool = False,
    rules: Iterable[Rule] = (),
) -> Report:
    """Make the modules of a model ours, in place, and say which.

    torch.nn's LayerNorm, RMSNorm, MultiheadAttention, the layers and stacks of its Transformer,
    Dropout, Softmax, LogSoftmax and CrossEntropyLoss become fastattn's, and norms of any library
    that compute what one of ours does. In models of Hugging Face's transformers so do feed-forward
    layers, rotary positions, residual sums with the norm after them, the loss of language models,
    which then needs no logits, and attention, whose implementation becomes "fastattn":
    docs/patching.md says what is replaced there and how.

    Each module stays the same object with the same parameters, so optimizers, tied weights,
    `state_dict` and its hooks, parametrizations, dtypes, devices (meta too) and modes are what they
    were. Results are the same within rounding, except that dropout draws other random numbers, and
    that torch.nn's norms, those derived from them, softmax and cross entropy return their input's
    dtype under autocast where torch's return float32.

    A module is left alone, and the report says why, if it has forward hooks or a forward of its own
    (which `accelerate` gives), if it is of a class for which there is no rule, and if its
    parameters are of a dtype or tensor class that no kernel takes. Patching again changes nothing;
    a part of a model can be patched by itself. A patched model can be copied and pickled, and a
    copy unpatched.

    Wrapped models: what DistributedDataParallel and FullyShardedDataParallel hold is patched inside
    them. `fully_shard` makes the modules that it is called with subclasses with hooks, which are
    left alone, so patch first. A model that `torch.compile` has compiled is compiled again at its
    next call.

    Args:
        model: changed in place.
        norms: whether norms are replaced, and the sums before them.
        mlp: whether feed-forward layers are.
        rotary: whether the functions are by which attention turns queries and keys.
        loss: whether losses are, and with them the heads of language models.
        attention: whether attention is, and torch.nn's transformer layers, which are made of it.
        linear: whether Linear is replaced too; for itself it gains nothing over cuBLAS.
        rules: for other classes, or other replacements; they come before all others.

    Returns:
        A report: print it, or read `replaced`, `left_alone` and `changed`.

    Raises:
        TypeError: model is no module.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.LayerNorm(8), torch.nn.Dropout(0.1))
        >>> report = fastattn.patch(model)
        >>> isinstance(model[0], fastattn.nn.LayerNorm), len(report.replaced)
        (True, 2)
    """
    _check_module("patch", model)
    wanted = Wanted(norms, mlp, rotary, loss, attention, linear)
    own = {rule.theirs: rule for rule in rules}
    table = {**choose_rules(wanted), **own}
    libraries = find_libraries(model.modules())
    finders = [find for library in libraries for find in library.make_finders(model, wanted)]
    replaced: list[Replaced] = []
    left_alone: list[LeftAlone] = []
    for module, places in _modules(model):
        kind = plain_class(module)
        rule = own.get(kind) or _find_rule(module, kind, table, [*finders, *[find_norm] * norms])
        reason = rule if isinstance(rule, str) else _reason(module, kind, rule, table)
        if isinstance(rule, Rule) and reason is None:
            _become(module, rule)
            replaced.append(Replaced(places, kind, rule.ours))
        elif reason is not None:
            left_alone.append(LeftAlone(places, kind, reason))
    settings = [found for library in libraries for found in library.change_settings(model, wanted)]
    left_alone += [found for found in settings if isinstance(found, LeftAlone)]
    changed = [found for found in settings if isinstance(found, Changed)]
    return Report(tuple(replaced), tuple(left_alone), tuple(changed))


def unpatch(model: nn.Module) -> None:
    """Undo `patch`, exactly, in all of a model or in a part of it.

    Modules that were ours from the start stay.

    Raises:
        TypeError: model is no module.
        RuntimeError: something else has changed the class of a patched module since, as
            `fully_shard` does. Nothing is undone then.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.LayerNorm(8))
        >>> report = fastattn.patch(model)
        >>> fastattn.unpatch(model)
        >>> type(model[0]) is torch.nn.LayerNorm
        True
    """
    _check_module("unpatch", model)
    patched: list[tuple[nn.Module, Record]] = []
    for module, places in _modules(model):
        record = vars(module).get(RECORD)
        if record is None:
            continue
        if plain_class(module) is not record.ours:
            raise RuntimeError(
                f"unpatch: {places[0] or 'the model'} was made a {record.ours.__name__} and has "
                f"become a {type(module).__name__} since"
            )
        patched.append((module, record))
    libraries = find_libraries(model.modules())
    for module, record in patched:
        _set_class(module, record.theirs)
        for name in (*record.added, RECORD):
            delattr(module, name)
    for library in libraries:
        library.restore_settings(model)


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module without what a parametrization derived from it."""
    kind = type(module)
    return kind.__bases__[0] if _is_of_parametrize(kind) else kind


def _find_rule(
    module: nn.Module,
    kind: type[nn.Module],
    table: Mapping[type[nn.Module], Rule],
    finders: Sequence[Finder],
) -> Rule | str | None:
    """What the first finder says that says anything, or the table."""
    if _is_ours(module, kind):
        return None
    found = (find(module, kind) for find in finders)
    return next((rule for rule in found if rule is not None), table.get(kind))


def _is_ours(module: nn.Module, kind: type[nn.Module]) -> bool:
    return RECORD in vars(module) or kind.__module__.startswith(f"{ours.__name__}.")


def _check_module(function: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model must be a torch.nn.Module, got {type(model).__name__}")


def _modules(model: nn.Module) -> Iterator[tuple[nn.Module, tuple[str, ...]]]:
    """Each module once, with all its names."""
    places: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        places.setdefault(module, []).append(name)
    return ((module, tuple(names)) for module, names in places.items())


def _reason(
    module: nn.Module,
    kind: type[nn.Module],
    rule: Rule | None,
    table: Mapping[type[nn.Module], Rule],
) -> str | None:
    """Why a module is left alone; None where it is not, and for what does no computation."""
    if _is_ours(module, kind):
        return "already ours"
    if rule is None:
        return _reason_without_rule(module, kind, table)
    if has_forward_hooks(module):
        return "it has forward hooks"
    if "forward" in vars(module):
        return "its forward was replaced"
    odd = {_unknown(parameter) for parameter in module.parameters()} - {None}
    if odd:
        return f"its parameters are {', '.join(sorted(map(str, odd)))}"
    objection = rule.objection(module)
    if objection is not None:
        return objection
    taken = [name for name in rule.attributes(module) if hasattr(module, name)]
    return f"it has an attribute {taken[0]!r}, which means something in ours" if taken else None


def _unknown(parameter: torch.Tensor) -> str | None:
    """What kernels cannot take about a parameter: its dtype, or a type such as quantizers use."""
    if type(parameter) not in (nn.Parameter, torch.Tensor) and not is_distributed(parameter):
        return type(parameter).__name__
    return None if parameter.dtype in FLOAT_DTYPES else str(parameter.dtype)


def _reason_without_rule(
    module: nn.Module, kind: type[nn.Module], table: Mapping[type[nn.Module], Rule]
) -> str | None:
    if kind in CONTAINERS or kind is parametrize.ParametrizationList:
        return None
    if kind in UNTOUCHED:
        return UNTOUCHED[kind]
    if kind in OPTIONS:
        return f"not asked for: patch(model, {OPTIONS[kind]}=False)"
    known = next((base for base in kind.__mro__ if base in table), None)
    if known is not None:
        return f"a subclass of {known.__name__} without a rule"
    return "no rule; its parts are looked at" if any(module.children()) else "no rule"


def _become(module: nn.Module, rule: Rule) -> None:
    attributes = rule.attributes(module)
    _set_class(module, rule.ours)
    for name, value in attributes.items():
        setattr(module, name, value)
    setattr(module, RECORD, Record(rule.theirs, rule.ours, tuple(attributes)))


def _set_class(module: nn.Module, kind: type[nn.Module]) -> None:
    """Make a module an instance of `kind`, with its parametrizations if it has any.

    A parametrization stands in a class of the module's own that derives from the plain one, where
    its tensors are properties.
    """
    own = type(module)
    if _is_of_parametrize(own):
        members = {
            name: value
            for name, value in vars(own).items()
            if name not in ("__dict__", "__weakref__")
        }
        kind = type(f"Parametrized{kind.__name__}", (kind,), members)
    module.__class__ = kind


def _is_of_parametrize(kind: type[nn.Module]) -> bool:
    return kind.__module__ == parametrize.__name__ and kind.__name__.startswith("Parametrized")
