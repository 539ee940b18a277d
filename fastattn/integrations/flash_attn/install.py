"""Libraries that import flash_attn get fastattn's functions, in modules of that name."""

import importlib
import sys
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

NAME = "flash_attn"

VERSION = "2.8.4+fastattn"
"""What `flash_attn.__version__` says, for libraries that compare it."""

OWN = __name__.rpartition(".")[0]

MODULES = (
    "",
    ".bert_padding",
    ".flash_attn_interface",
    ".layers",
    ".layers.rotary",
    ".losses",
    ".losses.cross_entropy",
    ".modules",
    ".modules.mha",
    ".ops",
    ".ops.activations",
    ".ops.fused_dense",
    ".ops.triton",
    ".ops.triton.cross_entropy",
    ".ops.triton.layer_norm",
)
"""Modules of flash_attn that are there, by what follows its name, packages before their modules."""

_made: dict[str, ModuleType] = {}


def install_as_flash_attn() -> None:
    """Let `import flash_attn` find fastattn's functions, from now on, in this process.

    Modules of flash_attn are put into `sys.modules`, as many as stand in
    `fastattn.integrations.flash_attn`; others, as `flash_attn.ops.layer_norm`, stay
    ModuleNotFoundErrors. Call it before the library that imports flash_attn is imported. A second
    call changes nothing. No distribution is made up, so transformers, which asks for one, goes on
    saying that there is no flash-attn: its models take `attn_implementation="fastattn"`.

    Raises:
        RuntimeError: the distribution flash-attn is installed, or another module of that name has
            been imported.

    Source: the modules of flash-attn 2.8.

    Example:
        >>> install_as_flash_attn()
        >>> from flash_attn import flash_attn_func
        >>> flash_attn_func.__module__
        'fastattn.integrations.flash_attn.attention'
        >>> uninstall_as_flash_attn()
    """
    if _made and sys.modules.get(NAME) is _made[NAME]:
        return
    try:
        installed = version("flash-attn")
    except PackageNotFoundError:
        installed = None
    if installed is not None:
        raise RuntimeError(
            f"install_as_flash_attn: flash-attn {installed} is installed, and nothing takes its "
            "place; import from fastattn.integrations.flash_attn instead, or uninstall it"
        )
    if NAME in sys.modules:
        raise RuntimeError(
            "install_as_flash_attn: another module flash_attn has been imported, from "
            f"{getattr(sys.modules[NAME], '__file__', None)}"
        )
    for name in MODULES:
        _made[NAME + name] = _make_module(name)
    _made[NAME].__dict__["__version__"] = VERSION
    sys.modules.update(_made)


def uninstall_as_flash_attn() -> None:
    """Take out of `sys.modules` what `install_as_flash_attn` put there; else nothing.

    What has been imported from there goes on working.

    Source: ours, for tests.

    Example:
        >>> uninstall_as_flash_attn()
    """
    for name, module in _made.items():
        if sys.modules.get(name) is module:
            del sys.modules[name]
    _made.clear()


def _make_module(name: str) -> ModuleType:
    """A module of flash_attn with the contents of ours, also as an attribute of its package."""
    ours = importlib.import_module(OWN + name)
    name = NAME + name
    is_package = hasattr(ours, "__path__")
    module = ModuleType(name, ours.__doc__)
    for key, value in vars(ours).items():
        # Of ours' own modules each has its counterpart, or is none of flash_attn's.
        if not key.startswith("__") and not isinstance(value, ModuleType):
            setattr(module, key, value)
    # `importlib.util.find_spec` raises for a module without one.
    module.__spec__ = ModuleSpec(name, None, origin="fastattn", is_package=is_package)
    if is_package:
        # Empty: what is not in sys.modules is nowhere.
        module.__path__ = []
    module.__package__ = name if is_package else name.rpartition(".")[0]
    package, _, last = name.rpartition(".")
    if package:
        setattr(_made[package], last, module)
    return module
