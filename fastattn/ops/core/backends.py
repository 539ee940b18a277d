"""Which backend an op runs on: Triton's kernels, or the reference in plain PyTorch.

`auto` takes the kernels where they run: tensors on a GPU that Triton compiles tensor-core code for,
in a dtype that the kernels know, or any tensors under Triton's interpreter (TRITON_INTERPRET=1 in
the environment before the first use). Everything else takes the reference, which means the same.

What a process begins with is in the environment's FASTATTN_BACKEND, read once at import; it is for
programs that cannot be edited. The logger "fastattn" says once in a process that a tensor on a
device other than a CPU was left to the reference, and why.
"""

import contextlib
import importlib.util
import logging
import os
import threading
from collections.abc import Iterator, Mapping
from typing import Literal, get_args

import torch

from ...kernels.private import run_while_tracing
from .scopes import Scope

Backend = Literal["auto", "triton", "reference"]

MINIMUM_CAPABILITY = (8, 0)
"""NVIDIA's compute capability from which Triton emits tensor-core instructions."""

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
"""Whether kernels run in Triton's interpreter, on any device; Triton reads it when it decorates."""

HAS_TRITON = importlib.util.find_spec("triton") is not None

VARIABLE = "FASTATTN_BACKEND"
"""The environment's name for the backend that every thread begins with."""

logger = logging.getLogger("fastattn")


def read_variable(environment: Mapping[str, str]) -> Backend:
    """The backend that the environment asks for; "auto" if it says nothing.

    Raises:
        ValueError: it is none that there is.
        RuntimeError: it is "triton", and Triton is not installed.
    """
    name = environment.get(VARIABLE) or "auto"
    for known in get_args(Backend):
        if name == known:
            _check_installed(VARIABLE, name)
            return known
    raise ValueError(f"{VARIABLE}: expected 'auto', 'triton' or 'reference', got {name!r}")


def _check_installed(asker: str, name: str) -> None:
    if name == "triton" and not HAS_TRITON:
        raise RuntimeError(f"{asker}: 'triton' was asked for, but triton is not installed")


_initial: Backend = read_variable(os.environ)


class _Choice(threading.local):
    def __init__(self) -> None:
        # Not of the class: Dynamo's guard would look for a choice outside of the thread's own.
        self.backend: Backend = _initial
        self.cpu_is_gpu = False


_choice = _Choice()

# Whether nothing has asked, in any thread, for kernels on a CPU. A thread's own choices need not be
# looked at there until something does: a small op takes little longer than that.
cpu_is_for_reference = not INTERPRETED and _initial != "triton"


def _expect_kernels_on_cpu() -> None:
    global cpu_is_for_reference
    cpu_is_for_reference = False


class backend(Scope):
    """Choose the backend of all ops inside a `with` block or a decorated function.

    Args:
        name: "triton" for the kernels, or an error that says why they cannot run; "reference" for
            plain PyTorch; "auto" for the kernels wherever they run.

    The choice belongs to the thread that made it. A backward pass runs on the backend that its
    forward pass ran on.

    Example:
        >>> with fastattn.backend("reference"):
        ...     y = fastattn.softmax(torch.zeros(1, 4))
        >>> y.tolist()
        [[0.25, 0.25, 0.25, 0.25]]
    """

    def __init__(self, name: Backend) -> None:
        if name not in ("auto", "triton", "reference"):
            raise ValueError(f"backend: expected 'auto', 'triton' or 'reference', got {name!r}")
        _check_installed("backend", name)
        if name == "triton":
            _expect_kernels_on_cpu()
        super().__init__(_choice, "backend", name)


def current_backend() -> Backend:
    """The backend that this thread has chosen."""
    return _choice.backend


@contextlib.contextmanager
def assume_gpu() -> Iterator[None]:
    """Treat CPU tensors as if they were on the GPU that Triton's active driver describes.

    For tools that compile kernels, or time the host, without launching anything.
    """
    _expect_kernels_on_cpu()
    outer = _choice.cpu_is_gpu
    _choice.cpu_is_gpu = True
    try:
        yield
    finally:
        _choice.cpu_is_gpu = outer


# A dictionary rather than functools.cache, which Dynamo warns of when it traces an op.
_obstacles: dict[tuple[str, int | None], str | None] = {}


# Where it would trace this, Dynamo would compile again for what is remembered.
@run_while_tracing
def device_obstacle(device_type: str, index: int | None) -> str | None:
    """Why kernels cannot run on a device, or None if they can."""
    key = (device_type, index)
    if key not in _obstacles:
        _obstacles[key] = _find_obstacle(device_type, index)
    return _obstacles[key]


def _find_obstacle(device_type: str, index: int | None) -> str | None:
    if not HAS_TRITON:
        return "triton is not installed"
    if device_type == "meta":
        return "meta tensors hold nothing to compute on"
    if INTERPRETED:
        return None
    if device_type != "cuda":
        return f"Triton has no target for the device type {device_type!r} here"
    if torch.version.hip is None:
        capability = torch.cuda.get_device_capability(index)
        if capability < MINIMUM_CAPABILITY:
            return (
                "Triton emits no tensor-core code below compute capability 8.0, "
                f"this is {capability[0]}.{capability[1]}"
            )
    return None


def use_triton(tensor: torch.Tensor) -> bool:
    """Whether an op runs Triton's kernels, judged by one of its tensors.

    An op checks first that its tensors are on one device, and that float64 mixes with nothing else.

    Raises:
        RuntimeError: the backend "triton" was asked for and cannot take the tensor.
    """
    if cpu_is_for_reference and tensor.is_cpu:
        return False
    name = _choice.backend
    if name == "reference":
        return False
    device = tensor.device
    reason = None if _choice.cpu_is_gpu else device_obstacle(device.type, device.index)
    if reason is None and not INTERPRETED and tensor.dtype is torch.float64:
        reason = "compiled kernels do not compute in float64"
    if reason is None:
        return True
    if name == "triton":
        raise RuntimeError(f"backend 'triton' was asked for, but {reason}")
    if device.type not in ("cpu", "meta"):
        _tell_of_reference(device.type, reason)
    return False


_told: set[str] = set()


# Dynamo would break the graph at a call of a logger.
@run_while_tracing
def _tell_of_reference(device_type: str, reason: str) -> None:
    """Say once in this process that a device's tensor is left to the reference, and why."""
    if not _told:
        _told.add(reason)
        logger.warning(
            "a tensor on %s is computed by the reference backend, for %s; "
            "fastattn.backend('triton') makes that an error",
            device_type,
            reason,
        )
