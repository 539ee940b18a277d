"""The kernels of others, where they are installed, as cases of `python -m bench.compiled --cost`.

`python -m bench.compiled --cost --peers` predicts Liger-Kernel's and flash-linear-attention's, and
with `--tutorial FILE` those of a copy of Triton's tutorial 06 (python/tutorials in its repository).
They are compiled as ours are. Of kernels that tune themselves it takes the first configuration, for
nothing can be timed.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from fastattn.kernels.config import device_target

from ...op import Op
from . import TUTORIAL

ROWS = [(4096, 4096), (4096, 16384)]
HEADS = [(2, 16, 8192, 64), (2, 16, 8192, 128)]


def liger_rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Liger-Kernel's RMSNorm."""
    from liger_kernel.ops.rms_norm import (  # type: ignore[import-not-found]
        LigerRMSNormFunction,
    )

    return LigerRMSNormFunction.apply(x, weight, 1e-5, 0.0, "llama", False)


def liger_swiglu(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Liger-Kernel's SwiGLU."""
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction  # type: ignore[import-not-found]

    return LigerSiLUMulFunction.apply(a, b)


def fla_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """flash-linear-attention's softmax attention, causal, (B, T, H, D)."""
    _let_cuda_answer()
    from fla.ops.attn.parallel import parallel_attn  # type: ignore[import-not-found]

    return parallel_attn(q, k, v, scale=0.1)


def tutorial_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The tutorial's attention, causal, (B, H, M, D); by block pointers or by descriptors."""
    _let_cuda_answer()
    return _tutorial().attention(q, k, v, True, 0.1)


def _tutorial() -> Any:
    name = "triton_tutorial_06"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, os.environ[TUTORIAL])
        if spec is None or spec.loader is None:
            raise ImportError(f"no Python file: {os.environ[TUTORIAL]}")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[name] = module
    return sys.modules[name]


@functools.cache
def _let_cuda_answer() -> None:
    """Give torch.cuda the answers of the target, as long as this process compiles for it."""
    target = device_target(0)
    major, minor = divmod(int(target.arch), 10)
    properties = SimpleNamespace(
        name="NVIDIA", major=major, minor=minor, multi_processor_count=target.multiprocessors
    )
    answers: dict[str, Callable[..., Any]] = {
        "get_device_name": lambda device=None: "NVIDIA",
        "get_device_capability": lambda device=None: (major, minor),
        "get_device_properties": lambda device=None: properties,
        "current_device": lambda: 0,
        "device": lambda device: contextlib.nullcontext(),
    }
    for name, answer in answers.items():
        mock.patch.object(torch.cuda, name, answer).start()


def _peer(
    name: str,
    call: Callable[..., Any],
    arguments: Callable[..., dict[str, Any]],
    shapes: list[tuple[int, ...]],
    dtype: torch.dtype = torch.bfloat16,
) -> Op:
    return Op(name, call, arguments, shapes, shapes[:1], shapes[0], (dtype,))


def _available() -> Iterator[Op]:
    if importlib.util.find_spec("liger_kernel"):
        yield _peer(
            "Liger rms_norm",
            liger_rms_norm,
            lambda rows, cols: {"x": (rows, cols), "weight": (cols,)},
            ROWS,
        )
        yield _peer(
            "Liger swiglu",
            liger_swiglu,
            lambda rows, cols: {"a": (rows, cols), "b": (rows, cols)},
            [(4096, 11008)],
        )
    if importlib.util.find_spec("fla"):
        yield _peer(
            "fla parallel_attn",
            fla_attention,
            lambda b, h, m, d: dict.fromkeys("qkv", (b, m, h, d)),
            HEADS,
        )
    if os.environ.get(TUTORIAL):
        yield _peer(
            "tutorial 06",
            tutorial_attention,
            lambda b, h, m, d: dict.fromkeys("qkv", (b, h, m, d)),
            HEADS,
            torch.float16,
        )


OPS = tuple(_available())
