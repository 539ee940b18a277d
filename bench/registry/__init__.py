"""The ops whose compiled code, host cost, speed and memory are measured.

A new op adds one entry to the OPS of its family's file here, or a file with OPS of its own, and
gets all of it. What it must read and write, in bytes, is part of the entry.
"""

from importlib import import_module
from pkgutil import iter_modules

from ..op import Op

OPS: tuple[Op, ...] = tuple(
    op
    for name in sorted(module.name for module in iter_modules(__path__))
    for op in getattr(import_module(f".{name}", __name__), "OPS", ())
)
