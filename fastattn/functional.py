"""The names and signatures of torch.nn.functional, on fastattn's ops.

`import fastattn.functional as F` serves where `import torch.nn.functional as F` did, for what is
listed in `__all__`. Where no kernels run, as on a CPU, it is torch's own function that runs, unless
ours takes what torch's does not or is more exact.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F

from . import ops
from .kernels import private
from .ops.attention.terms import CausalFromFirst, Term
from .ops.core.backends import use_triton
from .ops.core.tensor_kinds import is_foreign, is_plain

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


def layer_norm(
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """`torch.nn.functional.layer_norm`: see `fastattn.layer_norm`.

    Where torch's own runs, on a CPU, the weight's gradient of rows of one large number has rounding
    errors of that size, which `fastattn.layer_norm` has not.
    """
    # Of a single column all rows are of one number.
    if is_for_torch(input, weight, bias) and (input.is_nested or input.shape[-1:] != (1,)):
        return F.layer_norm(input, list(normalized_shape), weight, bias, eps)
    x, weight, bias = _join_dimensions("layer_norm", input, normalized_shape, weight, bias)
    return _restore_shape(ops.layer_norm(x, weight, bias, eps), input.shape)


def linear(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`torch.nn.functional.linear`: see `fastattn.linear`."""
    if is_for_torch(input) or is_foreign(weight):
        return F.linear(input, weight, bias)
    return ops.linear(input, weight, bias)


def rms_norm(
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    eps: float | None = None,
) -> torch.Tensor:
    """`torch.nn.functional.rms_norm`: see `fastattn.rms_norm`."""
    if is_for_torch(input, weight):
        return F.rms_norm(input, list(normalized_shape), weight, eps)
    x, weight, _ = _join_dimensions("rms_norm", input, normalized_shape, weight, None)
    return _restore_shape(ops.rms_norm(x, weight, eps), input.shape)


def dropout(
    input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> torch.Tensor:
    """`torch.nn.functional.dropout`: see `fastattn.dropout`.

    Random numbers in the kernels are not those of PyTorch's own dropout, but follow
    `torch.manual_seed` as it does. `inplace=True` writes the result over `input`.
    """
    if is_for_torch(input):
        return F.dropout(input, p, training, inplace)
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout: p must be in [0, 1], got {p}")
    if not training or p == 0.0:
        return input
    output = torch.zeros_like(input) * input if p == 1.0 else ops.dropout(input, p)
    return input.copy_(output) if inplace else output


def cross_entropy(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """`torch.nn.functional.cross_entropy`: see `fastattn.cross_entropy`.

    As in torch, the classes are dimension 1 of an input with more than one dimension; the kernels
    have them last, so an input with more than two is copied unless they lie innermost in memory.
    NaN and infinity where the target is `ignore_index` reach nothing, unlike in torch.
    """
    if size_average is not None or reduce is not None:
        reduction = torch.nn.CrossEntropyLoss(None, size_average, -100, reduce).reduction
    # In 16 bits torch's own rounds between its steps.
    if is_for_torch(input, weight) and (input.element_size() > 2 or is_foreign(input)):
        if not is_foreign(input):
            input = _clear_ignored(input, target, ignore_index)
        return F.cross_entropy(
            input,
            target,
            weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
    classes = 1 if input.dim() > 1 else 0
    return ops.cross_entropy(
        input.movedim(classes, -1),
        target.movedim(classes, -1) if target.is_floating_point() else target,
        weight=weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )


def _clear_ignored(input: torch.Tensor, target: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """Logits (N, C, ...) or (C,) without what torch would make NaN of in the backward."""
    if not (input.requires_grad and torch.is_grad_enabled()) or target.is_floating_point():
        return input
    places = (*input.shape[:1], *input.shape[2:]) if input.dim() > 1 else ()
    if target.shape != places:  # torch says what is wrong with it.
        return input
    ignored = target == ignore_index
    # Most often nothing is wrong, and a copy can be spared where looking makes nobody wait.
    seen = input.is_cpu and is_plain((input, target)) and not private.are_transforms_active()
    classes = 1 if input.dim() > 1 else 0
    if seen and not ignored.any():
        return input
    if seen and input.detach().movedim(classes, -1)[ignored].sum().isfinite():
        return input
    return input.masked_fill(ignored.unsqueeze(classes), 0.0)


def linear_cross_entropy(
    input: torch.Tensor,
    linear_weight: torch.Tensor,
    target: torch.Tensor,
    *,
    linear_bias: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> torch.Tensor:
    """`torch.nn.functional.linear_cross_entropy`: see `fastattn.linear_cross_entropy`.

    The logits are held a chunk at a time whether there are `options` or not; of these, which steer
    torch's own chunks, batch_chunk_size is the most rows of a chunk. Class probabilities and
    weights with more than two dimensions need all logits at once. `z_loss` and `softcap` are ours.
    """
    settings: dict[str, Any] = {
        "ignore_index": -100 if ignore_index is None else ignore_index,
        "reduction": reduction,
        "label_smoothing": label_smoothing,
        "z_loss": z_loss,
        "softcap": softcap,
    }
    in_chunks = linear_weight.dim() == 2 and not target.is_floating_point()
    if in_chunks and not is_foreign(linear_weight):
        chunk_rows = None if options is None else options.batch_chunk_size
        return ops.linear_cross_entropy(
            input,
            linear_weight,
            target,
            linear_bias,
            class_weight=weight,
            chunk_rows=chunk_rows,
            **settings,
        )
    bias = None if linear_bias is None else linear_bias.flatten()
    if not target.is_floating_point():
        hidden = (target == settings["ignore_index"])[..., None].flatten(input.dim() - 1).all(-1)
        input = input.masked_fill(hidden[..., None], 0.0)
    logits = F.linear(input, linear_weight.flatten(0, -2), bias)
    classes = input.dim() - 1
    logits = logits.unflatten(-1, linear_weight.shape[:-1]).movedim(classes, -1)
    if target.is_floating_point():
        target = target.movedim(classes, -1)
    return ops.cross_entropy(logits, target, weight=weight, **settings)


def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`: see `fastattn.attention`.

    Args:
        query: (..., H, L, E), or (L, E).
        key: (..., Hkv, S, E).
        value: (..., Hkv, S, Ev).
        attn_mask: broadcasts to (..., H, L, S); booleans, True where a query sees a key, or floats
            that are added to the scores.
        dropout_p: in [0, 1].
        is_causal: query i sees the keys up to key i, whatever L and S; excludes attn_mask.
        scale: E^-0.5 if None.
        enable_gqa: allow Hkv to be a divisor of H.

    Leading dimensions broadcast. A mask of numbers gets its gradient. Dropout's random numbers in
    the kernels are not those of PyTorch's own function, but follow `torch.manual_seed` as it does.
    """
    name = "scaled_dot_product_attention"
    if attn_mask is not None and is_causal:
        raise ValueError(f"{name}: attn_mask and is_causal exclude each other")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"{name}: dropout_p must be in [0, 1], got {dropout_p}")
    # Where nothing is kept no scale makes up for it; and without kernels PyTorch's own random
    # numbers are cheaper than ours.
    for_torch = dropout_p == 1.0 or (dropout_p > 0.0 and not use_triton(query))
    for_torch = for_torch or any_is_foreign(query, key, value, attn_mask)
    if for_torch or (attn_mask is None and _is_torchs_too(query, key, value, is_causal)):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if min(query.dim(), key.dim(), value.dim()) < 2:
        raise ValueError(
            f"{name}: query, key and value must have 2 dimensions or more, got the shapes "
            f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        )
    # With enable_gqa the numbers of heads may differ.
    own = 3 if enable_gqa else 2
    leading = _broadcast_shapes(name, query.shape[:-own], key.shape[:-own], value.shape[:-own])
    query, key, value = (
        x if x.shape[:-own] == leading else x.expand(*leading, *x.shape[-own:])
        for x in (query, key, value)
    )
    keys = key.shape[-2]
    q, k, v = (_split_batch_and_heads(x) for x in (query, key, value))
    mods: list[Term] = [CausalFromFirst()] if is_causal else []
    mask = bias = None
    if attn_mask is not None:
        wanted = (*query.shape[:-1], keys)
        if _broadcast_shapes(name, wanted, attn_mask.shape) != wanted:
            raise ValueError(
                f"{name}: attn_mask must broadcast to {wanted}, got {tuple(attn_mask.shape)}"
            )
        full = _expand_mask(attn_mask, query)
        if full.dtype is torch.bool:
            mask = full
        elif full.is_floating_point():
            bias = full
        else:
            raise TypeError(f"{name}: attn_mask must be boolean or float, got {full.dtype}")
    o = ops.attention(
        q, k, v, mask=mask, bias=bias, dropout_p=dropout_p, scale=scale, score_mods=mods
    )
    return o.reshape(*query.shape[:-1], value.shape[-1])


def _is_torchs_too(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool
) -> bool:
    """Whether torch's function, faster without kernels, gives what ours does without a mask.

    It has no second derivative, errors of its own, and NaN for NaN in keys that no query sees.
    """
    if not (is_plain((query, key, value)) and is_for_torch(query, key, value)):
        return False
    if torch.is_grad_enabled() and (
        query.requires_grad or key.requires_grad or value.requires_grad
    ):
        return False
    q, k = query.shape, key.shape
    if len(q) < 3 or k != value.shape or q[:-2] != k[:-2] or q[-1] != k[-1]:
        return False
    if k[-2] == 0 or not query.is_floating_point():
        return False
    return not is_causal or q[-2] >= k[-2]


def _broadcast_shapes(name: str, *shapes: Sequence[int]) -> tuple[int, ...]:
    """What leading dimensions or masks broadcast to."""
    try:
        return tuple(torch.broadcast_shapes(*shapes))
    except RuntimeError as error:
        shown = ", ".join(str(tuple(shape)) for shape in shapes)
        raise ValueError(f"{name}: shapes must broadcast, got {shown}") from error


def _split_batch_and_heads(x: torch.Tensor) -> torch.Tensor:
    """(..., H, L, E) as (B, H, L, E)."""
    return x.flatten(0, -4) if x.dim() > 4 else x[(None,) * (4 - x.dim())]


def _expand_mask(attn_mask: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """A mask as (B or 1, H or 1, L or 1, S or 1); only of more than one batch dimension a copy."""
    full = attn_mask[(None,) * (query.dim() - attn_mask.dim())]
    if full.dim() <= 4:
        return full[(None,) * (4 - full.dim())]
    if any(size > 1 for size in full.shape[:-3]):
        full = full.expand(*query.shape[:-3], *full.shape[-3:])
    return full.flatten(0, -4)


def softmax(
    input: torch.Tensor,
    dim: int | None = None,
    _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """`torch.nn.functional.softmax`: see `fastattn.softmax`.

    A dimension other than the last is copied to the end first.
    """
    if is_for_torch(input):
        return F.softmax(input, dim, _stacklevel + 1, dtype)
    return _apply_along("softmax", ops.softmax, input, dim, _stacklevel, dtype)


def log_softmax(
    input: torch.Tensor,
    dim: int | None = None,
    _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """`torch.nn.functional.log_softmax`: see `fastattn.log_softmax`.

    A dimension other than the last is copied to the end first.
    """
    if is_for_torch(input):
        return F.log_softmax(input, dim, _stacklevel + 1, dtype)
    return _apply_along("log_softmax", ops.log_softmax, input, dim, _stacklevel, dtype)


def is_for_torch(
    input: Any, second: torch.Tensor | None = None, third: torch.Tensor | None = None
) -> bool:
    """Whether torch's own function runs.

    It does where no kernels do and it takes these dtypes everywhere, and where kernels cannot read
    what is given, as nested tensors: see `is_foreign`.
    """
    if isinstance(input, torch.Tensor) and not use_triton(input):
        return (second is None or second.dtype is input.dtype) and (
            third is None or third.dtype is input.dtype
        )
    return any_is_foreign(input, second, third)


def any_is_foreign(*tensors: Any) -> bool:
    """Whether one is a tensor that only torch's own functions can be called on."""
    return any(map(is_foreign, tensors))


def _apply_along(
    name: str,
    op: Callable[..., torch.Tensor],
    input: torch.Tensor,
    dim: int | None,
    stacklevel: int,
    dtype: torch.dtype | None,
) -> torch.Tensor:
    """Apply an op of the last dimension to dimension `dim`, with torch's meaning of `dtype`."""
    # torch's own rule where none is given, with its warning.
    place: int = private.softmax_dim(name, input.dim(), stacklevel + 1) if dim is None else dim
    if dtype is not None and not (input.element_size() == 2 and dtype is torch.float32):
        input = input.to(dtype)
    if input.dim() == 0:
        return op(input[None], dtype=dtype)[0]
    return op(input.movedim(place, -1), dtype=dtype).movedim(-1, place)


def _restore_shape(y: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """`y` itself where it has the shape: a view that is written in place loses FSDP2's hooks."""
    return y if y.shape == shape else y.view(shape)


def _join_dimensions(
    op: str,
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Fold the normalized dimensions, one or more, into one."""
    shape = tuple(normalized_shape)
    if not shape or tuple(input.shape[-len(shape) :]) != shape:
        raise ValueError(
            f"{op}: normalized_shape must be the last dimensions of input, got {shape} for an "
            f"input of shape {tuple(input.shape)}"
        )
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.shape != shape:
            raise ValueError(
                f"{op}: {name} must have the shape {shape} of normalized_shape, "
                f"got {tuple(parameter.shape)}"
            )
    if len(shape) == 1:
        return input, weight, bias
    cols = math.prod(shape)
    return (
        input.reshape(*input.shape[: -len(shape)], cols),
        None if weight is None else weight.reshape(cols),
        None if bias is None else bias.reshape(cols),
    )


# For torch.fx a call of these is one node, as a call of torch's own is.
for _name in __all__:
    torch.fx.wrap(_name)
