"""A transformer's block, and a stack of them, with additions fused into the norms behind them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, get_args

import torch
import torch.nn as nn

from .. import functional, ops
from ..ops.core.arguments import check_choice
from .attention import check_dropout
from .context_cache import ContextCache
from .hooks import has_hooks
from .mlp import are_readable
from .norm import LayerNorm, RMSNorm
from .tracing import one_node

Stream = tuple[torch.Tensor, torch.Tensor | None]
"""(branch, residual): what is still to be added to the residual stream, and the stream so far.

Their sum is the stream. A stream that begins, or that a norm has just written, has no residual.
"""

Pending = tuple[torch.Tensor, torch.Tensor | None, float]
"""A stream, and the dropout that its branch still has to go through before it is added."""

Order = Literal["pre", "post", "sandwich"]

NORMS: dict[Order, dict[str, tuple[str | None, str | None]]] = {
    "pre": {
        "self_attn": ("input_layernorm", None),
        "cross_attn": ("pre_cross_attn_layernorm", None),
        "mlp": ("post_attention_layernorm", None),
    },
    "post": {
        "self_attn": (None, "post_attention_layernorm"),
        "cross_attn": (None, "post_cross_attn_layernorm"),
        "mlp": (None, "post_feedforward_layernorm"),
    },
    "sandwich": {
        "self_attn": ("input_layernorm", "post_attention_layernorm"),
        "cross_attn": ("pre_cross_attn_layernorm", "post_cross_attn_layernorm"),
        "mlp": ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    },
}
"""The norm before each layer, and the one after it."""


class TransformerBlock(nn.Module):
    """Attention and a feed-forward layer, each added to the residual stream.

    The additions are one kernel with the norm that follows them. In a stack, the last one of a
    block is followed by the first norm of the next block: called with a pair (branch, residual) in
    place of a tensor, a block leaves it to that norm and returns such a pair. See
    `TransformerStack`.

    ```
    block = TransformerBlock(Attention(64, 4), GatedMLP(64, 256), partial(RMSNorm, 64))
    ```

    Args:
        self_attn: the attention; any module that maps (B, S, C) to the same.
        mlp: the feed-forward layer; any module that maps (B, S, C) to the same.
        norm: makes a norm; called once for each.
        order: where the norms are. Their names are those of Hugging Face's Llama and Gemma 2.

            - "pre", as in Llama and GPT-2: `input_layernorm` before the attention and
              `post_attention_layernorm` before the feed-forward layer.
            - "post", as in the first transformer and BERT: `post_attention_layernorm` and
              `post_feedforward_layernorm` of the stream after each addition.
            - "sandwich", as in Gemma 2: `input_layernorm` and `pre_feedforward_layernorm` before
              the layers, `post_attention_layernorm` and `post_feedforward_layernorm` of what they
              give, before it is added.

        cross_attn: attention to a context, between the two; any module called with (x, context).
            Its norms are `pre_cross_attn_layernorm` and `post_cross_attn_layernorm`.
        dropout: the probability with which an element that a layer gives is dropped in training,
            before it is added.

    There are no parameters but those of the modules given, and nothing changes their values.

    Sources: Vaswani et al., "Attention Is All You Need" (2017); Xiong et al., "On Layer
    Normalization in the Transformer Architecture" (2020); Gemma Team, "Gemma 2" (2024).

    Example:
        >>> attention = fastattn.nn.Attention(16, 2, causal=True)
        >>> mlp = fastattn.nn.GatedMLP(16, 32)
        >>> block = fastattn.nn.TransformerBlock(attention, mlp, lambda: fastattn.nn.RMSNorm(16))
        >>> stack = fastattn.nn.TransformerStack([block], fastattn.nn.RMSNorm(16))
        >>> stack(torch.randn(1, 5, 16)).shape
        torch.Size([1, 5, 16])
    """

    def __init__(
        self,
        self_attn: nn.Module,
        mlp: nn.Module,
        norm: Callable[[], nn.Module],
        *,
        order: Order = "pre",
        cross_attn: nn.Module | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_choice("TransformerBlock", "order", order, get_args(Order))
        check_dropout("TransformerBlock", dropout)
        self.order: Order = order
        self.dropout = dropout
        self.self_attn = self_attn
        self.cross_attn = cross_attn
        self.mlp = mlp
        for layer, (before, after) in NORMS[order].items():
            if getattr(self, layer) is not None:
                for name in filter(None, (before, after)):
                    self.add_module(name, norm())

    @one_node
    def forward(
        self,
        x: torch.Tensor | Stream,
        context: torch.Tensor | None = None,
        *,
        cross: Mapping[str, Any] | None = None,
        **terms: Any,
    ) -> Any:
        """(B, S, C) to (B, S, C), or a pair (branch, residual) to a pair.

        Args:
            x: the residual stream, or a pair that sums up to it; its residual may be None.
            context: what cross_attn attends to; None where a `ContextCache` in `cross` has it.
            cross: keyword arguments of cross_attn, as its mask or cache.
            terms: keyword arguments of self_attn, as its mask, rotary tables or cache.
        """
        has_context = context is not None or isinstance((cross or {}).get("cache"), ContextCache)
        if has_context is not (self.cross_attn is not None):
            raise ValueError(
                "TransformerBlock: a context is needed where there is cross_attn, and only there"
            )
        branch, residual = x if isinstance(x, tuple) else (x, None)
        stream = self._advance("self_attn", (branch, residual, 0.0), **terms)
        if self.cross_attn is not None:
            stream = self._advance("cross_attn", stream, context, **(cross or {}))
        branch, residual, dropout_p = self._advance("mlp", stream)
        if not isinstance(x, tuple):
            return _sum(branch, residual, dropout_p)
        # Whoever adds the branch does not know this block's dropout.
        return functional.dropout(branch, dropout_p), residual

    def _advance(self, name: str, stream: Pending, *arguments: Any, **options: Any) -> Pending:
        """The stream after a layer, from the one before it."""
        branch, residual, pending_p = stream
        layer = getattr(self, name)
        norms: list[Any] = [norm and getattr(self, norm) for norm in NORMS[self.order][name]]
        before, after = norms
        dropout_p = self.dropout if self.training else 0.0
        if before is None:
            x = _sum(branch, residual, pending_p)
            branch = layer(x, *arguments, **options)
            # A norm gives what the branch has, which autocast has made narrower than the stream.
            branch = branch.to(torch.promote_types(branch.dtype, x.dtype))
            x, _ = add_norm(branch, x, after, dropout_p)
            return x, None, 0.0
        x, residual = add_norm(branch, residual, before, pending_p)
        branch = layer(x, *arguments, **options)
        return branch if after is None else after(branch), residual, dropout_p

    def extra_repr(self) -> str:
        """The order, and the dropout if there is any."""
        return f"order={self.order!r}" + (f", dropout={self.dropout}" if self.dropout else "")


class TransformerStack(nn.Module):
    """Blocks one after another, and a norm behind them, with every addition fused into a norm.

    Args:
        layers: modules that map a pair (branch, residual) to such a pair, as `TransformerBlock`.
        norm: the norm of the stream that comes out, or None.

    There are no parameters but those of the modules given, as `layers.0`, ... and `norm`.

    Example:
        >>> attention, mlp = fastattn.nn.Attention(16, 2), fastattn.nn.MLP(16, 32)
        >>> block = fastattn.nn.TransformerBlock(attention, mlp, lambda: fastattn.nn.LayerNorm(16))
        >>> fastattn.nn.TransformerStack([block])(torch.randn(1, 5, 16)).shape
        torch.Size([1, 5, 16])
    """

    def __init__(self, layers: Iterable[nn.Module], norm: nn.Module | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = norm

    @one_node
    def forward(self, x: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        """(B, S, C) to (B, S, C); the other arguments go to every layer."""
        branch, residual = x, None
        for layer in self.layers:
            branch, residual = layer((branch, residual), *arguments, **options)
        if self.norm is None:
            return _sum(branch, residual, 0.0)
        return add_norm(branch, residual, self.norm)[0]


def add_norm(
    branch: torch.Tensor,
    residual: torch.Tensor | None,
    norm: nn.Module,
    dropout_p: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm(stream), stream), the stream being dropout(branch) + residual, in one kernel.

    LayerNorm and RMSNorm, fastattn's and torch's, are fused with the addition, and any module that
    has a method `add_norm(branch, residual, dropout_p)`, which returns both. Other modules, and
    those with hooks, are called after it.

    Args:
        branch: what a layer gave, (..., C).
        residual: the residual stream so far, of any float dtype; None where it begins with branch,
            which is then not dropped.
        norm: the norm.
        dropout_p: the probability with which an element of branch is dropped.

    Returns:
        The normalized stream in branch's dtype, and the stream.

    Example:
        >>> branch, residual = torch.randn(2, 3, 8)
        >>> y, summed = fastattn.nn.add_norm(branch, residual, fastattn.nn.RMSNorm(8))
        >>> torch.equal(summed, branch + residual)
        True
    """
    if residual is None:
        return norm(branch), branch
    fused = _find_fused_addition(norm)
    if fused is not None:
        return fused(branch, residual, dropout_p)
    stream = _sum(branch, residual, dropout_p)
    return norm(stream).to(branch.dtype), stream


def _find_fused_addition(norm: Any) -> Callable[..., tuple[torch.Tensor, torch.Tensor]] | None:
    """What adds and normalizes in one kernel as `norm` would, called as a method `add_norm` is."""
    if not calls_only_forward(norm):
        return None
    if type(norm) in (RMSNorm, nn.RMSNorm) and len(norm.normalized_shape) == 1:
        return lambda branch, residual, dropout_p: ops.add_rms_norm(
            branch, residual, norm.weight, norm.eps, dropout_p=dropout_p
        )
    if type(norm) in (LayerNorm, nn.LayerNorm) and len(norm.normalized_shape) == 1:
        return lambda branch, residual, dropout_p: ops.add_layer_norm(
            branch, residual, norm.weight, norm.bias, norm.eps, dropout_p=dropout_p
        )
    # Of a class derived from one that has both, forward may say something else by now.
    both = ("add_norm", "forward")
    owner: type = next(kind for kind in type(norm).__mro__ if any(n in vars(kind) for n in both))
    return getattr(norm, "add_norm", None) if "add_norm" in vars(owner) else None


def _sum(branch: torch.Tensor, residual: torch.Tensor | None, dropout_p: float) -> torch.Tensor:
    """dropout(branch) + residual."""
    return branch if residual is None else functional.dropout(branch, dropout_p) + residual


def calls_only_forward(module: nn.Module) -> bool:
    """Whether calling a module does what its class says: no hooks, no other forward.

    Nor parameters that kernels cannot take, such as quantizers put there.
    """
    return (
        "forward" not in vars(module)
        and are_readable(*module.parameters(recurse=False))
        and not has_hooks(module)
    )
