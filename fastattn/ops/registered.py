"""Importing this registers every launcher as an op `fastattn::<name>`, before anything calls it.

A graph that another process has exported names the ops that it calls:

    torch.ops.import_module("fastattn.ops.registered")
    program = torch.export.load("model.pt2")
"""

from .core.registration import register_all

register_all()
