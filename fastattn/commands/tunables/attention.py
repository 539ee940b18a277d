"""Attention's kernels, for `python -m fastattn tune`."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ... import reference
from ...checking import Change, enough_neighbours, measure_reference
from ...kernels.config import Target
from ...ops.attention.bias_terms import Alibi, alibi_slopes
from ...ops.attention.function import part_terms
from ...ops.attention.term_lists import description, gather_arguments
from ...ops.attention.terms import BooleanMask, Causal, Term
from .case import Case, Tunable

BATCH, HEADS = 4, 4
"""Few heads, because PyTorch holds their scores; together with 4096 queries they fill a GPU."""

PRECISION = "ieee"
"""How float32 is multiplied in a dry run; 16 bits have one way."""


RESULTS = {
    "attention_forward": "o",
    "attention_keys_backward": "dk and dv",
    "attention_queries_backward": "dq",
    "attention_hopper_forward": "o",
    "attention_hopper_keys_backward": "dk and dv",
    "attention_hopper_queries_backward": "dq",
}
"""What the kernels compute, in the accuracy rule's names."""

HOPPER = tuple(kernel for kernel in RESULTS if "hopper" in kernel)
"""The warp-specialised kernels. Their rule is the kernels of all devices, their rival cuDNN's."""


def make_terms(term_class: str, length: int, device: str) -> list[Term]:
    """Terms that make the class which tiles are chosen by."""
    if term_class == "index":
        return [Alibi(alibi_slopes(HEADS).to(device)), Causal()]
    if term_class == "tensor":
        mask = torch.rand(length, length, device=device) < 0.9
        return [BooleanMask(mask[None, None])]
    return [Causal()]


def attention_case(
    kernel: str,
    key_dim: int,
    value_dim: int,
    term_class: str,
    dtype: torch.dtype,
    length: int,
    device: str,
) -> Case:
    """Attention of a sequence to itself: the output, or the gradients that a kernel computes."""
    torch.manual_seed(0)

    def random(dim: int) -> torch.Tensor:
        return torch.randn(BATCH, HEADS, length, dim, device=device).to(dtype)

    q, k, v, do = random(key_dim), random(key_dim), random(value_dim), random(value_dim)
    terms = make_terms(term_class, length, device)
    given = Launches(kernel, q, k, v, do, terms)
    name = RESULTS[kernel]

    def run_torch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if term_class == "plain":
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return reference.attention(q, k, v, **part_terms(terms))

    def run(change: Change) -> dict[str, torch.Tensor]:
        changed = [change(x) for x in (q, k, v, do)]
        if not change.wide:
            return {name: result(kernel, run_torch, *changed)}
        # A batch element at a time, because all scores in float64 may not fit into memory.
        function = functools.partial(reference.attention, **part_terms(terms))
        elements = zip(*(x.split(1) for x in changed), strict=True)
        return {name: torch.cat([result(kernel, function, *parts) for parts in elements])}

    features: dict[str, Any] = {"key_dim": key_dim, "value_dim": value_dim}
    if kernel not in HOPPER:
        features["operands"] = "16 bits" if dtype.itemsize == 2 else PRECISION
        features["term_class"] = term_class
    measured = measure_reference(run, enough_neighbours(max(q.numel(), v.numel())))
    rival = run_cudnn if kernel in HOPPER else run_torch
    timed = functools.partial(result, kernel, rival, q, k, v, do)
    return Case(features, given.launch, timed, name, measured)


def run_cudnn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention by cuDNN, or where it takes no such heads by what PyTorch has."""
    best = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(best, set_priority=True):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def result(
    kernel: str,
    function: Callable[..., torch.Tensor],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    do: torch.Tensor,
) -> torch.Tensor:
    """What a kernel computes, by a differentiable function and its derivatives."""
    if RESULTS[kernel] == "o":
        return function(q, k, v)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    dq, dk, dv = torch.autograd.grad(function(*leaves), leaves, do)
    return dq if RESULTS[kernel] == "dq" else torch.cat((dk, dv), -1)


class Launches:
    """The launches of one of the kernels on given tensors."""

    def __init__(
        self,
        kernel: str,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        do: torch.Tensor,
        terms: Sequence[Term],
    ) -> None:
        from ...kernels.attention.backward import compute_delta
        from ...kernels.attention.forward import attention_forward
        from ...kernels.attention.launch import Call, Gradient

        self.kernel = kernel
        tensors, floats, integers = gather_arguments(terms)
        described = description(terms, q.dtype)
        self.length, self.scale = q.size(2), q.size(3) ** -0.5
        self.settings = (self.scale, 0.0, PRECISION, described, floats, integers, False)
        self.forward = (q, k, v, None, None, None, None, tensors, self.length, *self.settings)
        if RESULTS[kernel] != "o":
            o, lse = attention_forward(*self.forward)
            whole = (None, None, self.length, self.length)
            no_dropout = (None, 0.0)
            composed = (described, tensors, floats, integers)
            self.call = Call(q, k, v, *whole, *no_dropout, self.scale, PRECISION, *composed, False)
            log_sums, delta, _ = compute_delta(o, do, None, lse, None, self.call.folded)
            self.gradient = Gradient(do, lse, log_sums, delta)

    def launch(self, config: Any) -> torch.Tensor:
        """The result of the kernel with a configuration."""
        from ...kernels.attention.backward_keys import keys_backward
        from ...kernels.attention.backward_queries import queries_backward
        from ...kernels.attention.forward import attention_forward

        name = "hopper_rule" if self.kernel in HOPPER else "rule"
        rule: dict[str, Any] = {name: always(config)}
        if RESULTS[self.kernel] == "o":
            return attention_forward(*self.forward, **rule)[0]
        if RESULTS[self.kernel] == "dq":
            return queries_backward(self.call, self.gradient, **rule)[0]
        dk, dv = keys_backward(self.call, self.gradient, **rule)
        return torch.cat((dk, dv), -1)


@functools.cache
def always(config: Any) -> Callable[..., Any]:
    """The rule that gives a configuration; one and the same, because launches remember theirs."""
    return lambda *features: config


def candidates(kernel: str, target: Target, **features: Any) -> Sequence[Any]:
    from ...kernels.attention.candidates import attention_candidates

    return attention_candidates(target, kernel=kernel, **features)


def rule(kernel: str, target: Target, **features: Any) -> Any:
    from ...kernels.attention.config import attention_rule

    return attention_rule(target, kernel=kernel, **features)


def hopper_candidates(kernel: str, target: Target, **features: Any) -> Sequence[Any]:
    from ...kernels.attention.hopper import backward_config, config

    if RESULTS[kernel] == "o":
        return config.hopper_candidates(target, **features)
    return backward_config.hopper_backward_candidates(target, kernel=kernel, **features)


def hopper_rule(kernel: str, target: Target, **features: Any) -> Any:
    from ...kernels.attention.hopper import backward_config, config

    if RESULTS[kernel] == "o":
        return config.hopper_rule(target, **features)
    return backward_config.hopper_backward_rule(target, kernel=kernel, **features)


SHAPES = [
    (*dims, term_class, torch.bfloat16, 4096)
    for term_class, all_dims in {
        "plain": ((128, 128), (64, 64), (256, 256), (192, 128), (96, 96), (80, 80)),
        "index": ((128, 128), (64, 64)),
        "tensor": ((128, 128), (64, 64)),
    }.items()
    for dims in all_dims
]

ATTENTION = tuple(
    Tunable(
        kernel,
        shapes=SHAPES,
        tiny_shapes=[
            (16, 32, term_class, torch.float32, 40) for term_class in ("plain", "index", "tensor")
        ],
        case=functools.partial(attention_case, kernel),
        candidates=functools.partial(candidates, kernel),
        rule=functools.partial(rule, kernel),
    )
    for kernel in ("attention_forward", "attention_keys_backward", "attention_queries_backward")
)

ATTENTION_HOPPER = tuple(
    Tunable(
        kernel,
        shapes=[
            (*dims, "plain", torch.bfloat16, 8192)
            for dims in ((128, 128), (64, 64), (192, 128), (96, 96))
        ],
        # The interpreter has not the instructions that they are made of.
        tiny_shapes=[],
        case=functools.partial(attention_case, kernel),
        candidates=functools.partial(hopper_candidates, kernel),
        rule=functools.partial(hopper_rule, kernel),
    )
    for kernel in HOPPER
)
