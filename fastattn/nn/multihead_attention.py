"""torch.nn.MultiheadAttention on fastattn's kernels."""

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from .. import functional
from ..ops.core.backends import use_triton
from ..ops.core.precision import is_autocast_on
from .attention_masks import attend, attend_with_weights, collect_masks
from .tracing import one_node


class MultiheadAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` on fastattn's kernels: same arguments, parameters, state_dict.

    With need_weights=False it is flash attention: no scores are in memory, masks are read where
    they lie, and is_causal=True skips what is masked wherever torch lets it stand for attn_mask. As
    in torch, need_weights=True has to hold the weights of all heads.

    It differs from torch's in evaluation, where that one takes another route with rules of its own:
    is_causal=True without attn_mask is an error here at all times, and a query whose keys are all
    masked gives 0 without weights (with weights NaN, as torch). Nested tensors go to torch's own
    computation, which takes them where no gradient is wanted.

    Example:
        >>> layer = fastattn.nn.MultiheadAttention(16, 2, batch_first=True)
        >>> x = torch.randn(1, 5, 16)
        >>> layer(x, x, x, need_weights=False)[0].shape
        torch.Size([1, 5, 16])
    """

    @classmethod
    def sharing(cls, module: nn.MultiheadAttention) -> "MultiheadAttention":
        """A module on our kernels that has the parameters and settings of `module`, not copies."""
        ours = cls.__new__(cls)
        ours.__setstate__(module.__dict__)
        return ours

    @one_node
    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend from query (L, B, E) to key (S, B, kdim) and value (S, B, vdim).

        Args:
            query, key, value: as above; with batch_first (B, L, E) and so on; without a batch
                (L, E) and so on.
            key_padding_mask: (B, S), or (S,) without a batch; booleans, True where a key is
                ignored, or floats, added to the scores.
            need_weights: whether to return the weights.
            attn_mask: (L, S) or (B * num_heads, L, S); booleans, True where a query does not see a
                key, or floats, added to the scores.
            average_attn_weights: whether the weights returned are the mean over the heads.
            is_causal: says that attn_mask is the causal mask, which is then not looked at unless
                key_padding_mask or need_weights ask for it.

        Returns:
            The output, shaped like query, and the weights after dropout: (B, L, S) or
            (B, num_heads, L, S), without B as the input; None unless need_weights.

        Raises:
            AssertionError, RuntimeError: an argument does not fit; torch's types of error.
        """
        if is_causal and attn_mask is None:
            raise RuntimeError(
                "MultiheadAttention: is_causal=True only says that attn_mask is the causal mask, "
                "so attn_mask must be given too: Transformer.generate_square_subsequent_mask makes "
                "one"
            )
        kernels = use_triton(query)
        # With weights torch's own forward is the reference.
        left_to_torch = need_weights and not kernels
        if left_to_torch or query.is_nested or key.is_nested or value.is_nested:
            return super().forward(
                query,
                key,
                value,
                key_padding_mask,
                need_weights,
                attn_mask,
                average_attn_weights,
                is_causal,
            )
        out_proj = self.out_proj
        out_weight = out_proj.weight
        _check_inputs(self, query, key, value, out_weight.dtype)
        _check_masks(self, query, key, attn_mask, key_padding_mask)
        # torch lets the hint stand for the mask under these conditions only.
        causal = is_causal and key_padding_mask is None and not need_weights
        q, k, v = self._project(query, key, value)
        added_keys = 0
        if self.bias_k is not None or self.add_zero_attn:
            keys = k.shape[2]
            k, v = self._add_keys(k, v)
            added_keys = k.shape[2] - keys
        masks = collect_masks(
            None if causal else attn_mask, key_padding_mask, self.num_heads, added_keys
        )
        dropout_p = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            o, weights = attend_with_weights(q, k, v, masks, dropout_p)
            if average_attn_weights:
                weights = weights.mean(1)
            if query.dim() == 2:
                weights = weights[0]
        else:
            o = attend(q, k, v, masks, causal, dropout_p, kernels)
        merged = self._merge_heads(o, query.dim() == 3)
        return functional.linear(merged, out_weight, out_proj.bias), weights

    def _project(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values (B, H, L, D), of one product as far as they have one input."""
        linear = functional.linear
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if query is key is value and weight is not None:
            return self._heads(linear(query, weight, bias), 3)
        if weight is not None and key is value:
            size = self.embed_dim
            weights = weight.split((size, 2 * size))
            biases = (None, None) if bias is None else bias.split((size, 2 * size))
            q = self._heads(linear(query, weights[0], biases[0]), 1)
            return q + self._heads(linear(key, weights[1], biases[1]), 2)
        if weight is None:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        else:
            weights = weight.chunk(3)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        products = map(linear, (query, key, value), weights, biases)
        return tuple(self._heads(product, 1)[0] for product in products)

    def _heads(self, x: torch.Tensor, parts: int) -> tuple[torch.Tensor, ...]:
        """As many views (B, H, L, D) of a product that is laid out like the input."""
        heads, dim = self.num_heads, self.head_dim
        if x.dim() == 2:
            x = x.view(x.shape[0], parts, heads, dim)
            return x.permute(1, 2, 0, 3)[:, None].unbind()
        first, second, _ = x.shape
        x = x.view(first, second, parts, heads, dim)
        if self.batch_first:
            return x.permute(2, 0, 3, 1, 4).unbind()
        return x.permute(2, 1, 3, 0, 4).unbind()

    def _merge_heads(self, o: torch.Tensor, batched: bool) -> torch.Tensor:
        """What _heads undoes: (B, H, L, D) laid out like the input, with all heads in a row."""
        if not batched:
            return o[0].transpose(0, 1).flatten(-2)
        o = o.transpose(1, 2) if self.batch_first else o.permute(2, 0, 1, 3)
        return o.flatten(-2)

    def _add_keys(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values with those of add_bias_kv and add_zero_attn at their end."""
        if self.bias_k is not None and self.bias_v is not None:
            shape = (1, self.num_heads, 1, self.head_dim)
            k, v = (
                torch.cat((x, added.to(x.dtype).view(shape).expand(x.shape[0], -1, -1, -1)), 2)
                for x, added in ((k, self.bias_k), (v, self.bias_v))
            )
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        return k, v


def _check_inputs(
    module: nn.MultiheadAttention,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dtype: torch.dtype,
) -> None:
    """Shapes and dtypes of the inputs, with the types of error that torch has for each."""
    name = "MultiheadAttention"
    dim = query.dim()
    if dim not in (2, 3) or key.dim() != dim or value.dim() != dim:
        raise AssertionError(
            f"{name}: query, key and value must all have 3 dimensions, or all 2 without a batch, "
            f"got {dim}, {key.dim()} and {value.dim()}"
        )
    for argument, x, width in (
        ("query", query, module.embed_dim),
        ("key", key, module.kdim),
        ("value", value, module.vdim),
    ):
        if x.shape[-1] != width:
            raise AssertionError(
                f"{name}: {argument} must have {width} features, got {x.shape[-1]}"
            )
    if key is not value and key.shape[:-1] != value.shape[:-1]:
        raise AssertionError(
            f"{name}: key and value must have the same length and batch, "
            f"got {tuple(key.shape)} and {tuple(value.shape)}"
        )
    batch = 0 if module.batch_first else 1
    if query is not key and dim == 3 and query.shape[batch] != key.shape[batch]:
        raise RuntimeError(
            f"{name}: query and key must have the same batch size, "
            f"got {query.shape[batch]} and {key.shape[batch]}"
        )
    alike = query.dtype is dtype and key.dtype is dtype and value.dtype is dtype
    if not alike and not is_autocast_on(query.device.type):
        raise RuntimeError(
            f"{name}: query, key and value must have the parameters' dtype {dtype}, "
            f"got {query.dtype}, {key.dtype} and {value.dtype}"
        )


def _check_masks(
    module: nn.MultiheadAttention,
    query: torch.Tensor,
    key: torch.Tensor,
    attn_mask: torch.Tensor | None,
    key_padding_mask: torch.Tensor | None,
) -> None:
    """Masks, with the types of error that torch has for each."""
    if attn_mask is None and key_padding_mask is None:
        return
    name = "MultiheadAttention"
    for argument, mask in (("attn_mask", attn_mask), ("key_padding_mask", key_padding_mask)):
        if mask is not None and mask.dtype is not torch.bool and not mask.is_floating_point():
            raise AssertionError(f"{name}: {argument} must be boolean or float, got {mask.dtype}")
    batched = query.dim() == 3
    length = 1 if module.batch_first and batched else 0
    batch = query.shape[1 - length] if batched else 1
    queries, keys = query.shape[length], key.shape[length]
    if attn_mask is not None:
        if attn_mask.dim() not in (2, 3):
            raise AssertionError(
                f"{name}: attn_mask must have 2 or 3 dimensions, got {attn_mask.dim()}"
            )
        wanted = (queries, keys)
        if attn_mask.dim() == 3:
            wanted = (batch * module.num_heads, *wanted)
        if attn_mask.shape != wanted:
            kind: Any = RuntimeError if batched or attn_mask.dim() == 2 else AssertionError
            raise kind(
                f"{name}: attn_mask must have the shape {wanted}, got {tuple(attn_mask.shape)}"
            )
    if key_padding_mask is not None:
        wanted = (batch, keys) if batched else (keys,)
        if key_padding_mask.shape != wanted:
            raise AssertionError(
                f"{name}: key_padding_mask must have the shape {wanted}, "
                f"got {tuple(key_padding_mask.shape)}"
            )
