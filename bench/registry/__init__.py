"""The ops whose compiled code, host cost and speed are measured.

A new op adds one entry to the OPS of its family's file here, or a file with OPS of its own, and
gets all of it.
"""

from importlib import import_module
from pkgutil import iter_modules

from ..op import Op

FAMILIES = sorted(module.name for module in iter_modules(__path__))

OPS: tuple[Op, ...] = tuple(
    op for family in FAMILIES for op in import_module(f".{family}", __name__).OPS
)
