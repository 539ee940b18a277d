"""`python -m fastattn hub OUT`: write fastattn as a kernel of Hugging Face's Hub.

The folder has what a repository of the type "kernel" has: the package as the universal variant, of
Python alone, and what it is in metadata.json. `kernels.get_local_kernel(Path(OUT))` loads it under
a name made from its contents, so that several versions live in one process.
"""

import argparse
import base64
import hashlib
import json
import shutil
import sys
from pathlib import Path

from .. import __version__

PACKAGE = Path(__file__).parents[1]
VARIANT = Path("build", "torch-universal")
LEFT_OUT = ("__main__.py", "__pycache__", "commands", "demo", "machine")
"""What is run by itself, and may need other libraries: a kernel needs PyTorch alone."""

EXPORTS = """
# Of a kernel on the Hub, transformers takes attention by these names, and `kernels` layers.
from .integrations import hub as layers
from .integrations.flash_attn import flash_attn_func as flash_attn_func
from .integrations.flash_attn import flash_attn_varlen_func as flash_attn_varlen_func
from .integrations.flash_attn import flash_attn_with_kvcache as flash_attn_with_kvcache
"""

CARD = f"""---
library_name: kernels
license: bsd-3-clause
tags: [kernel]
---

# fastattn {__version__}

Transformer building blocks as plain Triton kernels with exact, hand-written gradients, and on a
CPU as plain PyTorch.
Written by `python -m fastattn hub`, from Python alone: the universal variant.

```python
from pathlib import Path
from kernels import get_local_kernel

fastattn = get_local_kernel(Path("."))
fastattn.rms_norm, fastattn.attention, fastattn.flash_attn_varlen_func
fastattn.layers.LlamaRMSNorm
```
"""


def main(arguments: list[str]) -> int:
    """Write fastattn as a kernel of Hugging Face's Hub into a new or empty folder."""
    parser = argparse.ArgumentParser("python -m fastattn hub", description=main.__doc__)
    parser.add_argument("out", type=Path, metavar="OUT")
    out = parser.parse_args(arguments).out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        print(f"fastattn hub: error: {out} is there and not an empty folder", file=sys.stderr)
        return 2
    write_kernel(out)
    print(f"{out}: kernels.get_local_kernel(Path({str(out)!r})) loads it")
    return 0


def write_kernel(out: Path) -> None:
    """Write the repository: the package, its metadata, and a card."""
    variant = out / VARIANT
    ignored = shutil.ignore_patterns(*LEFT_OUT)
    shutil.copytree(PACKAGE, variant, ignore=ignored)
    with (variant / "__init__.py").open("a") as init:
        init.write(EXPORTS)
    metadata = json.dumps(describe(variant), indent=2)
    (variant / "metadata.json").write_text(metadata + "\n")
    (out / "README.md").write_text(CARD)


def describe(variant: Path) -> dict[str, object]:
    """What metadata.json says of a variant: names, and a digest of every file."""
    files = {
        path.relative_to(variant).as_posix(): hashlib.sha256(path.read_bytes()).digest()
        for path in sorted(variant.rglob("*"))
        if path.is_file()
    }
    whole = hashlib.sha256(b"".join(name.encode() + files[name] for name in files))
    return {
        "name": "fastattn",
        "id": f"_fastattn_{whole.hexdigest()[:8]}",
        # The Hub's are numbers of incompatible interfaces, and 0 that of what may still change.
        "version": int(__version__.partition(".")[0]),
        "license": "BSD-3-Clause",
        "python-depends": [],
        "backend": {"type": "cuda"},
        "digest": {
            "algorithm": "sha256",
            "files": {name: base64.b64encode(found).decode() for name, found in files.items()},
        },
    }
