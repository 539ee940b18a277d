"""Mixtures of experts as modules: a router, the experts, and both in the place of an MLP."""

import abc
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn

from .. import ops
from ..ops.core.arguments import check_choice
from ..ops.core.precision import disable_autocast
from ..ops.gated_linear import ACTIVATIONS, Activation
from ..ops.routing import SCORES, Score
from .linear import Linear
from .tracing import one_node


class TopKRouter(nn.Module):
    """The k experts of each token and their weights, by a linear layer and `route_top_k`.

    The parameters have the names of Hugging Face's routers: `weight` (E, H), `bias` (E,) as
    gpt-oss has one, and the buffer `e_score_correction_bias` (E,) of DeepSeek-V3, in float32.

    Losses of the router's logits are made of what it returns, which a hook may keep:
    `load_balancing_loss` and `router_z_loss`.

    Args:
        in_features: the columns of x, H.
        experts: E.
        k: experts of a token.
        score, normalize, groups, top_groups, scale: as in `fastattn.route_top_k`.
        bias: whether the linear layer has a bias.
        correction: whether there is a bias for the choice alone, which training moves by hand.
        wide: multiply in float32 whatever x is and autocast says, as DeepSeek-V3 does.
        device, dtype: as in torch.nn.Linear.

    Example:
        >>> weights, ids, logits = fastattn.nn.TopKRouter(8, 4, 2)(torch.randn(5, 8))
        >>> ids.shape
        torch.Size([5, 2])
    """

    e_score_correction_bias: torch.Tensor | None

    def __init__(
        self,
        in_features: int,
        experts: int,
        k: int,
        *,
        score: Score = "softmax",
        normalize: bool = True,
        groups: int | None = None,
        top_groups: int | None = None,
        scale: float = 1.0,
        bias: bool = False,
        correction: bool = False,
        wide: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_choice("TopKRouter", "score", score, SCORES)
        self.k = k
        self.score: Score = score
        self.normalize = normalize
        self.groups = groups
        self.top_groups = top_groups
        self.scale = scale
        self.wide = wide
        options = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(experts, in_features, **options))
        self.bias = nn.Parameter(torch.empty(experts, **options)) if bias else None
        correct = torch.zeros(experts, device=device) if correction else None
        self.register_buffer("e_score_correction_bias", correct)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters as torch.nn.Linear does; the correction is 0."""
        bound = 1.0 / math.sqrt(max(self.weight.shape[1], 1))
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)
        if self.e_score_correction_bias is not None:
            nn.init.zeros_(self.e_score_correction_bias)

    @one_node
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(weights (..., k), ids (..., k), logits (..., E)) of x (..., H)."""
        logits = self._multiply(x)
        correction = self.e_score_correction_bias
        if correction is not None:
            correction = correction.to(torch.promote_types(logits.dtype, torch.float32))
        weights, ids = ops.route_top_k(
            logits,
            self.k,
            score=self.score,
            normalize=self.normalize,
            bias=correction,
            groups=self.groups,
            top_groups=self.top_groups,
            scale=self.scale,
        )
        return weights, ids, logits

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        if not self.wide:
            return ops.linear(x, self.weight, self.bias)
        computed = torch.promote_types(x.dtype, torch.float32)
        with disable_autocast(x):
            bias = None if self.bias is None else self.bias.to(computed)
            return ops.linear(x.to(computed), self.weight.to(computed), bias)

    def extra_repr(self) -> str:
        """The sizes and the score."""
        experts, columns = self.weight.shape
        return f"{columns}, experts={experts}, k={self.k}, score={self.score!r}"


class ExpertLayers(nn.Module):
    """What layers of experts have in common: `fastattn.nn.shard_experts` may deal them out."""

    down_proj: torch.Tensor
    """(E, ...), the weights that give the output."""

    def __init__(self) -> None:
        super().__init__()
        self.distribute: Callable[..., torch.Tensor] | None = None

    @one_node
    def forward(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """(..., H) to (..., H), with ids and weights (..., K) of each token's experts."""
        if self.distribute is not None:
            return self.distribute(x, ids, weights, self.mix)
        return self.mix(x, ids, weights)

    @abc.abstractmethod
    def mix(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """What the experts here give; an id that is none of theirs adds nothing."""


class Experts(ExpertLayers):
    """Gated feed-forward layers, each for the tokens that were routed to it: `fastattn.mixture`.

    The parameters have the names and shapes of Hugging Face's fused experts: `gate_up_proj`
    (E, 2 I, H), `down_proj` (E, H, I), and with biases `gate_up_proj_bias` (E, 2 I) and
    `down_proj_bias` (E, H). Transposed and interleaved they are those of gpt-oss. Of experts that
    `fastattn.nn.shard_experts` has dealt out to ranks, they are a rank's own.

    Args:
        experts: E.
        in_features: the columns of x and of the output, H.
        hidden_features: the columns of gate and up, I.
        activation: "silu", "gelu", "gelu_tanh", "relu" or "sigmoid".
        bias: whether both products have biases.
        interleaved, transposed, limit, alpha, up_offset, recompute: as in `fastattn.mixture`.
        device, dtype: as in torch.nn.Linear.

    Example:
        >>> experts = fastattn.nn.Experts(4, 8, 16)
        >>> weights, ids = fastattn.route_top_k(torch.randn(5, 4), 2)
        >>> experts(torch.randn(5, 8), ids, weights).shape
        torch.Size([5, 8])
    """

    def __init__(
        self,
        experts: int,
        in_features: int,
        hidden_features: int,
        *,
        activation: Activation = "silu",
        bias: bool = False,
        interleaved: bool = False,
        transposed: bool = False,
        limit: float | None = None,
        alpha: float = 1.0,
        up_offset: float = 0.0,
        recompute: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_choice("Experts", "activation", activation, ACTIVATIONS)
        self.activation: Activation = activation
        self.interleaved = interleaved
        self.transposed = transposed
        self.limit = limit
        self.alpha = alpha
        self.up_offset = up_offset
        self.recompute = recompute

        def make(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(experts, *shape, device=device, dtype=dtype))

        width = 2 * hidden_features
        up, down = (width, in_features), (in_features, hidden_features)
        self.gate_up_proj = make(*(reversed(up) if transposed else up))
        self.down_proj = make(*(reversed(down) if transposed else down))
        self.gate_up_proj_bias = make(width) if bias else None
        self.down_proj_bias = make(in_features) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw each expert's parameters as torch.nn.Linear does."""
        pairs = (
            (self.gate_up_proj, self.gate_up_proj_bias),
            (self.down_proj, self.down_proj_bias),
        )
        for weight, bias in pairs:
            bound = 1.0 / math.sqrt(max(weight.shape[1 if self.transposed else 2], 1))
            nn.init.uniform_(weight, -bound, bound)
            if bias is not None:
                nn.init.uniform_(bias, -bound, bound)

    def mix(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return ops.mixture(
            x,
            ids,
            weights,
            self.gate_up_proj,
            self.down_proj,
            self.gate_up_proj_bias,
            self.down_proj_bias,
            activation=self.activation,
            interleaved=self.interleaved,
            transposed=self.transposed,
            limit=self.limit,
            alpha=self.alpha,
            up_offset=self.up_offset,
            recompute=self.recompute,
        )

    def extra_repr(self) -> str:
        """The sizes and the activation."""
        experts, *shape = self.down_proj.shape
        columns, inside = reversed(shape) if self.transposed else shape
        return f"{experts}, {columns}, {inside}, activation={self.activation!r}"


class MixtureOfExperts(nn.Module):
    """A router and its experts in the place of an MLP, dropless; also with shared experts.

    ```
    router = TopKRouter(64, experts=8, k=2)
    block = TransformerBlock(
        Attention(64, 4), MixtureOfExperts(router, Experts(8, 64, 128)), partial(RMSNorm, 64)
    )
    ```

    Its parts are `gate`, `experts`, `shared_experts` and `shared_expert_gate`, as in Hugging Face's
    models.

    Args:
        router: maps x to (weights, ids, ...) of each token, as `TopKRouter`.
        experts: called with (x, ids, weights), as `Experts` or `PlainExperts`.
        shared: a module that every token goes through as well, as a `GatedMLP`, or None.
        shared_gate: multiply what it gives by the sigmoid of one more linear layer of x, as
            Qwen2-MoE and Qwen3-Next do; the columns are those of the router's weight.

    Source: Dai et al., "DeepSeekMoE: Towards Ultimate Expert Specialization in Mixture-of-Experts
    Language Models" (2024).

    Example:
        >>> router, experts = fastattn.nn.TopKRouter(8, 4, 2), fastattn.nn.Experts(4, 8, 16)
        >>> fastattn.nn.MixtureOfExperts(router, experts)(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])
    """

    def __init__(
        self,
        router: nn.Module,
        experts: nn.Module,
        shared: nn.Module | None = None,
        shared_gate: bool = False,
    ) -> None:
        super().__init__()
        if shared_gate and shared is None:
            raise ValueError("MixtureOfExperts: shared_gate is of shared experts, got none")
        self.gate = router
        self.experts = experts
        self.shared_experts = shared
        self.shared_expert_gate: nn.Module | None = None
        if shared_gate:
            weight: Any = router.weight
            options = {"device": weight.device, "dtype": weight.dtype}
            self.shared_expert_gate = Linear(weight.shape[1], 1, bias=False, **options)

    @one_node
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., H) to (..., H)."""
        weights, ids, *_ = self.gate(x)
        y = self.experts(x, ids, weights)
        if self.shared_experts is None:
            return y
        shared = self.shared_experts(x)
        if self.shared_expert_gate is not None:
            shared = self.shared_expert_gate(x).sigmoid() * shared
        return y + shared
