"""torchvision beside a torch that it was not built for.

transformers and timm import it wherever it is installed. Its wheels are built for CUDA, and cannot
load their ops where torch is one for CPUs; then its import fails for want of two ops' names.
Nothing here calls an op of it.
"""

import sys
from importlib.util import find_spec

import torch


def import_torchvision() -> None:
    """Import it if it is there, with those names defined if they have to be."""
    if find_spec("torchvision") is None:
        return
    try:
        import torchvision  # type: ignore[import-not-found]
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # type: ignore[import-not-found]

        # The names live as long as this.
        torchvision.library_of_names = library
