"""A kernel in a debugger: pdb stops inside softmax's kernel, where tensors are tiles to look at.

With TRITON_INTERPRET=1 in the environment from the start kernels run as Python on a CPU, and every
debugger steps through them. Here the commands are given; `python docs/examples/debugger.py --hands`
leaves them to you.
"""

import inspect
import io
import os
import pdb
import sys

os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when a kernel is defined.

import torch

import fastattn
from fastattn.kernels import softmax

COMMANDS = """
tbreak {file}:{line}
continue
list {line}
p z.handle.data[:2]
p row_max.handle.data[:2]
next
p total.handle.data[:2]
continue
"""


def main(hands: bool = False) -> str:
    """Stop where softmax's kernel adds up a tile's rows, and return what the debugger said."""
    x = torch.tensor([[0.0, 1.0, 2.0], [3.0, 3.0, 3.0]])
    lines = inspect.getsource(softmax).splitlines()
    line = next(number for number, text in enumerate(lines, 1) if "total = tl.sum" in text)
    commands = io.StringIO(COMMANDS.format(file=softmax.__file__, line=line))
    said = io.StringIO()
    debugger = pdb.Pdb() if hands else pdb.Pdb(stdin=commands, stdout=said, readrc=False)
    y = debugger.runcall(fastattn.softmax, x)
    torch.testing.assert_close(y, x.softmax(-1))
    return said.getvalue()


if __name__ == "__main__":
    print(main(hands="--hands" in sys.argv))
