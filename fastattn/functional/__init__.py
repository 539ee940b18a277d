"""The names and signatures of torch.nn.functional, on fastattn's ops.

`import fastattn.functional as F` serves where `import torch.nn.functional as F` did: what is listed
in `__all__` is ours, and all other names are torch's own. Where no kernels run, as on a CPU, it is
torch's own function that runs, unless ours takes what torch's does not or is more exact.
"""

from typing import TYPE_CHECKING, Any

import torch.fx
import torch.nn.functional

if TYPE_CHECKING:
    from torch.nn.functional import *  # noqa: F403  # pyright: ignore[reportWildcardImportFromLibrary]

from .dot_product_attention import scaled_dot_product_attention
from .layers import dropout, layer_norm, linear, log_softmax, rms_norm, softmax
from .losses import cross_entropy, linear_cross_entropy
from .replacing import replace_sdpa as replace_sdpa

__all__ = [
    "cross_entropy",
    "dropout",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "log_softmax",
    "rms_norm",
    "scaled_dot_product_attention",
    "softmax",
]


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return getattr(torch.nn.functional, name)


def __dir__() -> list[str]:
    theirs = (name for name in dir(torch.nn.functional) if not name.startswith("_"))
    return sorted({*globals(), *theirs})


# For torch.fx a call of these is one node, as a call of torch's own is.
for _name in __all__:
    torch.fx.wrap(_name)
