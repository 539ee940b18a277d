"""The ops whose compiled code, host cost and speed are measured.

A new op adds one entry to OPS and gets all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

import fastattn

from .op import BACKWARD, BOTH, FORWARD, Benchmark, Op, Shape
from .traffic import (
    cross_entropy_traffic,
    dropout_traffic,
    gated_traffic,
    norm_traffic,
    rotary_head_dim,
    rotary_traffic,
    softmax_traffic,
)

DROPOUT = 0.1

# 128 MiB a tensor in bfloat16, which no L2 cache holds.
SIZES = [(2**26 // cols, cols) for cols in (4096, 1024, 16384, 65536, 8192, 32768, 2048)]
SMALL_SIZES = [(512, 1024), (16, 32768), (2048, 256), (64, 8192)]


def norm_goal(direction: str, shape: Shape) -> float | None:
    """The share of the copy bandwidth that a norm is to reach."""
    cols = shape[-1]
    if direction == FORWARD:
        return 0.90
    if direction == BACKWARD:
        return 0.75 if cols <= 8192 else 0.60 if cols <= 16384 else 0.45
    return None


def torch_layer_norm(x: torch.Tensor, **parameters: Any) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], **parameters)


def torch_rms_norm(x: torch.Tensor, **parameters: Any) -> torch.Tensor:
    return F.rms_norm(x, x.shape[-1:], **parameters)


def torch_add(
    norm: Callable[..., torch.Tensor],
    x: torch.Tensor,
    residual: torch.Tensor,
    dropout_p: float = 0.0,
    **parameters: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    hidden = F.dropout(x, dropout_p) + residual
    return norm(hidden, **parameters), hidden


def liger_rms_norm() -> Callable[..., Any]:
    from liger_kernel.transformers.functional import liger_rms_norm  # type: ignore[import-not-found]

    # By default Liger writes gradients over dy, which a second call would then read.
    return lambda x, weight, eps: liger_rms_norm(
        x, weight, eps, casting_mode="gemma", in_place=False
    )


def liger_layer_norm() -> Callable[..., Any]:
    from liger_kernel.transformers.functional import (  # type: ignore[import-not-found]
        liger_layer_norm,
    )

    return lambda x, weight, bias, eps: liger_layer_norm(x, weight, bias, eps)


def liger_add_rms_norm() -> Callable[..., Any]:
    from liger_kernel.transformers.functional import (  # type: ignore[import-not-found]
        liger_fused_add_rms_norm,
    )

    return lambda x, residual, weight, eps: liger_fused_add_rms_norm(
        x, residual, weight, eps, casting_mode="gemma", in_place=False
    )


def quack_rms_norm() -> Callable[..., Any]:
    from quack import rmsnorm  # type: ignore[import-not-found]

    return lambda x, weight, eps: rmsnorm(x, weight, eps=eps)


def quack_add_rms_norm() -> Callable[..., Any]:
    from quack import rmsnorm  # type: ignore[import-not-found]

    return lambda x, residual, weight, eps: rmsnorm(
        x, weight, residual=residual, eps=eps, prenorm=True
    )


def norm(
    name: str,
    call: Callable[..., Any],
    torch: Callable[..., Any],
    *extra: str,
    rivals: Mapping[str, Callable[[], Callable[..., Any]]] | None = None,
    quick_widths: Sequence[int] = (1024, 8192, 65536),
    **options: Any,
) -> Op:
    """An entry for a norm over the last dimension with a weight and the `extra` tensors."""
    rows = 4096
    # Rows of a quarter of a warp up to rows that no register file holds. 1000 is divisible by 8 and
    # not by 16, 1023 by no power of two.
    widths = (64, 128, 1000, 1023, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 262144)

    def arguments(rows: int, cols: int) -> dict[str, Any]:
        shapes = {"residual": (rows, cols), "bias": (cols,)}
        chosen = {name: shapes[name] for name in extra}
        return {"x": (rows, cols), "weight": (cols,), "eps": 1e-5} | chosen | options

    dropout = "dropout_p" in options
    return Op(
        name,
        call,
        arguments,
        shapes=[(rows, width) for width in widths],
        quick_shapes=[(rows, width) for width in quick_widths],
        small=(8, 256),
        torch=torch,
        benchmark=Benchmark(
            SIZES,
            SMALL_SIZES,
            partial(
                norm_traffic,
                centered="layer" in name,
                bias="bias" in extra,
                residual="residual" in extra,
                dropout=dropout,
            ),
            rivals or {},
            goal=norm_goal,
            random=dropout,
        ),
    )


def gated(
    name: str,
    call: Callable[..., Any],
    torch: Callable[..., Any],
    *,
    packed: bool = False,
    rivals: Mapping[str, Callable[[], Callable[..., Any]]] | None = None,
    **options: Any,
) -> Op:
    """An entry for a gated activation; a shape counts the columns of its output."""

    def arguments(rows: int, cols: int) -> dict[str, Any]:
        given = {"gate": (rows, 2 * cols)} if packed else {"gate": (rows, cols), "up": (rows, cols)}
        return given | options

    widths = (64, 1000, 1023, 4096, 11008, 16384)
    return Op(
        name,
        call,
        arguments,
        shapes=[(4096, width) for width in widths],
        quick_shapes=[(4096, width) for width in (64, 11008)],
        small=(8, 256),
        torch=torch,
        benchmark=Benchmark(
            SIZES,
            SMALL_SIZES,
            gated_traffic,
            rivals or {},
            goal=lambda direction, shape: 0.85 if direction != BOTH else None,
        ),
    )


def torch_gpt_oss(
    gate: torch.Tensor, interleaved: bool, limit: float, alpha: float, up_offset: float
) -> torch.Tensor:
    gate, up = gate[..., ::2].clamp(max=limit), gate[..., 1::2].clamp(-limit, limit)
    return (up + up_offset) * (gate * torch.sigmoid(gate * alpha))


def liger_swiglu() -> Callable[..., Any]:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction  # type: ignore[import-not-found]

    return lambda gate, up: LigerSiLUMulFunction.apply(gate, up)


def liger_geglu() -> Callable[..., Any]:
    from liger_kernel.ops.geglu import LigerGELUMulFunction  # type: ignore[import-not-found]

    return lambda gate, up, approximate: LigerGELUMulFunction.apply(gate, up)


def targets(rows: int, classes: int) -> Callable[[Any], torch.Tensor]:
    """Class indices all over the vocabulary."""
    return lambda device: torch.arange(rows, device=device) * 7919 % classes


def quack_cross_entropy() -> Callable[..., Any]:
    from quack import cross_entropy  # type: ignore[import-not-found]

    return lambda logits, target: cross_entropy(logits, target, reduction="mean")


def softmax(name: str, call: Callable[..., Any], torch: Callable[..., Any], log: bool) -> Op:
    """An entry for a normalization by exponentials over the last dimension."""
    widths = (64, 1000, 1023, 1024, 4096, 8192, 16384, 32768, 131072)
    return Op(
        name,
        call,
        lambda rows, cols: {"x": (rows, cols)},
        shapes=[(4096, width) for width in widths],
        quick_shapes=[(4096, width) for width in (64, 1024, 32768)],
        small=(8, 256),
        torch=torch,
        benchmark=Benchmark(
            SIZES,
            SMALL_SIZES,
            partial(softmax_traffic, log=log),
            goal=lambda direction, shape: None if direction == BOTH else 0.85,
        ),
    )


def rotary_arguments(tokens: int, width: int) -> dict[str, Any]:
    """q and k, the heads of each as wide together as `width` says."""
    head_dim = rotary_head_dim(width)

    def angles(device: torch.device) -> torch.Tensor:
        return torch.full((tokens, head_dim // 2), 0.5, device=device)

    heads = (1, width // head_dim, tokens, head_dim)
    return {"q": heads, "k": heads, "cos": angles, "sin": angles}


def torch_rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """The usual formula on tables of whole heads, as in Hugging Face's models."""
    cos, sin = torch.cat((cos, cos), -1).to(q.dtype), torch.cat((sin, sin), -1).to(q.dtype)

    def turned(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin

    return turned(q), turned(k)


def liger_rotary() -> Callable[..., Any]:
    from liger_kernel.ops.rope import LigerRopeFunction  # type: ignore[import-not-found]

    def rotary(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        # Liger turns tensors in place.
        cos, sin = torch.cat((cos, cos), -1)[None], torch.cat((sin, sin), -1)[None]
        return LigerRopeFunction.apply(q.clone(), k.clone(), cos, sin)

    return rotary


OPS = (
    norm(
        "rms_norm",
        fastattn.rms_norm,
        torch_rms_norm,
        rivals={"Liger": liger_rms_norm, "quack": quack_rms_norm},
        quick_widths=(64, 1000, 1024, 4096, 8192, 16384, 65536),
    ),
    norm(
        "layer_norm",
        fastattn.layer_norm,
        torch_layer_norm,
        "bias",
        rivals={"Liger": liger_layer_norm},
    ),
    norm(
        "add_rms_norm",
        fastattn.add_rms_norm,
        partial(torch_add, torch_rms_norm),
        "residual",
        rivals={"Liger": liger_add_rms_norm, "quack": quack_add_rms_norm},
        quick_widths=(),
    ),
    norm(
        "add_layer_norm+dropout",
        fastattn.add_layer_norm,
        partial(torch_add, torch_layer_norm),
        "residual",
        "bias",
        dropout_p=DROPOUT,
    ),
    Op(
        "dropout",
        fastattn.dropout,
        lambda rows, columns: {"x": (rows, columns), "p": DROPOUT},
        shapes=[(4096, 4096)],
        quick_shapes=[(4096, 4096)],
        small=(8, 256),
        torch=lambda x, p: F.dropout(x, p),
        benchmark=Benchmark(
            [(2**26 // cols, cols) for cols in (4096, 1024, 65536)],
            SMALL_SIZES,
            dropout_traffic,
            random=True,
        ),
    ),
    gated(
        "swiglu",
        fastattn.swiglu,
        lambda gate, up: F.silu(gate) * up,
        rivals={"Liger": liger_swiglu},
    ),
    gated(
        "swiglu packed",
        fastattn.swiglu,
        lambda gate: F.silu(gate.chunk(2, -1)[0]) * gate.chunk(2, -1)[1],
        packed=True,
    ),
    gated(
        "swiglu of gpt-oss",
        fastattn.swiglu,
        torch_gpt_oss,
        packed=True,
        interleaved=True,
        limit=7.0,
        alpha=1.702,
        up_offset=1.0,
    ),
    gated("geglu", fastattn.geglu, lambda gate, up: F.gelu(gate) * up),
    gated(
        "geglu tanh",
        fastattn.geglu,
        lambda gate, up, approximate: F.gelu(gate, approximate=approximate) * up,
        approximate="tanh",
        rivals={"Liger": liger_geglu},
    ),
    gated("reglu", fastattn.reglu, lambda gate, up: F.relu(gate) * up),
    gated("glu", fastattn.glu, lambda gate, up: torch.sigmoid(gate) * up),
    # Liger writes the gradient over the logits in its forward, so it cannot be called twice.
    Op(
        "cross_entropy",
        fastattn.cross_entropy,
        lambda rows, classes: {"logits": (rows, classes), "target": targets(rows, classes)},
        shapes=[(4096, c) for c in (2, 64, 1000, 1023, 32000, 50257, 131072, 262144)],
        quick_shapes=[(4096, c) for c in (64, 50257, 131072)],
        small=(8, 256),
        torch=lambda logits, target: F.cross_entropy(logits, target),
        benchmark=Benchmark(
            [(2**27 // classes, classes) for classes in (131072, 32768, 262144)],
            [(256, 4096), (32, 32768)],
            cross_entropy_traffic,
            {"quack": quack_cross_entropy},
            goal=lambda direction, shape: None if direction == BOTH else 0.85,
        ),
    ),
    Op(
        "cross_entropy+everything",
        fastattn.cross_entropy,
        lambda rows, classes: {
            "logits": (rows, classes),
            "target": targets(rows, classes),
            "weight": lambda device: torch.linspace(0.5, 2.0, classes, device=device),
            "label_smoothing": 0.1,
            "z_loss": 1e-4,
            "softcap": 30.0,
            "return_lse": True,
        },
        shapes=[(4096, classes) for classes in (64, 1000, 50257, 131072)],
        quick_shapes=[(4096, 131072)],
        small=(8, 256),
    ),
    softmax("softmax", fastattn.softmax, lambda x: F.softmax(x, -1), log=False),
    softmax("log_softmax", fastattn.log_softmax, lambda x: F.log_softmax(x, -1), log=True),
    Op(
        "softmax causal",
        fastattn.softmax,
        lambda heads, queries, cols: {"x": (heads, queries, cols), "causal": True, "scale": 0.125},
        shapes=[(16, 128, 128), (16, 1024, 1024), (2, 4096, 4096), (1, 64, 32768)],
        quick_shapes=[(16, 1024, 1024)],
        small=(2, 16, 64),
    ),
    Op(
        "softmax masked",
        fastattn.softmax,
        lambda heads, queries, cols: {
            "x": (heads, queries, cols),
            "mask": lambda device: torch.ones(queries, cols, dtype=torch.bool, device=device),
        },
        shapes=[(16, 128, 128), (16, 1024, 1024), (2, 4096, 4096), (1, 64, 32768)],
        quick_shapes=[(16, 1024, 1024)],
        small=(2, 16, 64),
    ),
    Op(
        "apply_rotary_qk",
        fastattn.apply_rotary_qk,
        rotary_arguments,
        shapes=[(4096, width) for width in (80, 96, 1000, 4096, 8192)],
        quick_shapes=[(4096, width) for width in (80, 4096)],
        small=(8, 256),
        torch=torch_rotary,
        benchmark=Benchmark(
            [(2**25 // width, width) for width in (4096, 1024, 8192)],
            SMALL_SIZES,
            rotary_traffic,
            {"Liger": liger_rotary},
            goal=lambda direction, shape: None if direction == BOTH else 0.85,
        ),
    ),
    Op(
        "apply_rotary partial, interleaved",
        fastattn.apply_rotary,
        lambda tokens, head_dim: {
            "x": (2, 8, tokens, head_dim),
            "cos": lambda device: torch.ones(tokens, head_dim // 4, device=device),
            "sin": lambda device: torch.ones(tokens, head_dim // 4, device=device),
            "positions": lambda device: torch.arange(tokens, device=device),
            "interleaved": True,
        },
        shapes=[(4096, head_dim) for head_dim in (64, 128, 256)],
        quick_shapes=[(4096, 128)],
        small=(8, 64),
    ),
)
