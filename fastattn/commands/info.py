"""`python -m fastattn info`: say which backend each device uses, and why."""

import argparse
import importlib.metadata
import platform

import torch

from .. import __version__
from ..ops.core.backends import INTERPRETED, device_obstacle


def main(arguments: list[str]) -> int:
    """Print versions and devices, and the backend that each device would use."""
    argparse.ArgumentParser(prog="python -m fastattn info", description=main.__doc__).parse_args(
        arguments
    )
    for name, value in [*versions(), *devices()]:
        print(f"{name:<12} {value}")
    return 0


def versions() -> list[tuple[str, str]]:
    """Of fastattn, Python, torch, triton, and the driver's runtime."""
    runtime = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    if torch.version.hip:
        runtime = f"ROCm {torch.version.hip}"
    return [
        ("fastattn", __version__),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", f"{torch.__version__} ({runtime})"),
        ("triton", _triton_version()),
    ]


def _triton_version() -> str:
    # ROCm's PyTorch brings Triton under a name of its own.
    for distribution in ("triton", "pytorch-triton-rocm", "triton-rocm", "triton-windows"):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "not installed"


def devices() -> list[tuple[str, str]]:
    """The CPU and every GPU: what it is, the backend `auto` takes there, and why."""
    rows = [("cpu", _backend("cpu", None, "the interpreter is on"))]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        if torch.version.hip:
            capability = properties.gcnArchName.split(":")[0]
        described = (
            f"{properties.name}, capability {capability}, "
            f"{properties.total_memory / 2**30:.0f} GiB, "
            f"{properties.multi_processor_count} multiprocessors: "
        )
        rows.append(
            (f"cuda:{index}", described + _backend("cuda", index, "Triton compiles for it"))
        )
    return rows


def _backend(device_type: str, index: int | None, why: str) -> str:
    reason = device_obstacle(device_type, index)
    if reason is not None:
        return f"reference backend ({reason})"
    return f"triton backend ({'the interpreter is on' if INTERPRETED else why})"
