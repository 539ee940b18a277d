"""torch.nn.MultiheadAttention on fastattn's kernels."""

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from .. import ops, reference
from ..ops.backends import use_triton
from .attention_masks import (
    attend,
    attend_with_weights,
    fused_is_better,
    masks_of,
    torch_may_fuse,
)


class MultiheadAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` on fastattn's kernels: same arguments, parameters, state_dict.

    With need_weights=False it is flash attention: no scores are in memory, masks are read where
    they lie, and is_causal=True skips what is masked wherever torch lets it stand for attn_mask. As
    in torch, need_weights=True has to hold the weights of all heads.

    It differs from torch's in evaluation, where that one takes another route with rules of its own:
    is_causal=True without attn_mask is an error here at all times, and a query whose keys are all
    masked gives 0 without weights (with weights NaN, as torch). Nested tensors go to torch's own
    computation, which takes them where no gradient is wanted.
    """

    @classmethod
    def sharing(cls, module: nn.MultiheadAttention) -> "MultiheadAttention":
        """A module on our kernels that has the parameters and settings of `module`, not copies."""
        ours = cls.__new__(cls)
        ours.__setstate__(module.__dict__)
        return ours

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
        if (
            query.is_nested
            or key.is_nested
            or value.is_nested
            or self._is_left_to_torch(
                query, key, value, key_padding_mask, attn_mask, need_weights, is_causal
            )
        ):
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
        _check_inputs(self, query, key, value)
        _check_masks(self, query, key, attn_mask, key_padding_mask)
        # torch lets the hint stand for the mask under these conditions only.
        causal = is_causal and key_padding_mask is None and not need_weights
        q, k, v = self._projected(query, key, value)
        k, v = self._with_added_keys(k, v)
        masks = masks_of(
            None if causal else attn_mask,
            key_padding_mask,
            self.num_heads,
            added_keys=k.shape[2] - key.shape[1 if self.batch_first and key.dim() == 3 else 0],
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
            o = attend(q, k, v, masks, causal, dropout_p)
        output = self._merged(o, batched=query.dim() == 3)
        linear = _linear_for(output)
        return linear(output, self.out_proj.weight, self.out_proj.bias), weights

    def _is_left_to_torch(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None,
        attn_mask: torch.Tensor | None,
        need_weights: bool,
        is_causal: bool,
    ) -> bool:
        """Whether torch's own forward is the reference: where it means the same and is faster."""
        if use_triton(query):
            return False
        if need_weights:
            return True
        fusible = query is key is value and query.dim() == 3 and self.batch_first
        if is_causal or not fusible or not torch_may_fuse(self, query):
            return False
        # With masks of floats torch takes the longer way, and ours is the faster one.
        masks = (attn_mask, key_padding_mask)
        if any(mask is not None and mask.dtype is not torch.bool for mask in masks):
            return False
        batch, length, _ = query.shape
        scores = batch * self.num_heads * length * length
        return fused_is_better(scores, attn_mask, key_padding_mask)

    def _projected(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values (B, H, L, D), of one product as far as they have one input."""
        size, weight, bias = self.embed_dim, self.in_proj_weight, self.in_proj_bias
        linear = _linear_for(query)
        if weight is not None and query is key and key is value:
            return self._heads(linear(query, weight, bias), 3)
        if weight is not None and key is value:
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
        x = x.view(*x.shape[:-1], parts, self.num_heads, self.head_dim)
        if x.dim() == 4:
            return x.permute(1, 2, 0, 3)[:, None].unbind()
        order = (2, 0, 3, 1, 4) if self.batch_first else (2, 1, 3, 0, 4)
        return x.permute(order).unbind()

    def _merged(self, o: torch.Tensor, batched: bool) -> torch.Tensor:
        """What _heads undoes: (B, H, L, D) laid out like the input, with all heads in a row."""
        if not batched:
            return o[0].transpose(0, 1).flatten(-2)
        o = o.transpose(1, 2) if self.batch_first else o.permute(2, 0, 1, 3)
        return o.flatten(-2)

    def _with_added_keys(
        self, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
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


def _linear_for(x: torch.Tensor) -> Any:
    """`fastattn.linear`; its reference where no kernels run, without the checks once more."""
    return ops.linear if use_triton(x) else reference.linear


def _check_inputs(
    module: nn.MultiheadAttention, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> None:
    """Shapes and dtypes of the inputs, with the types of error that torch has for each."""
    name = "MultiheadAttention"
    if query.dim() not in (2, 3) or key.dim() != query.dim() or value.dim() != query.dim():
        raise AssertionError(
            f"{name}: query, key and value must all have 3 dimensions, or all 2 without a batch, "
            f"got {query.dim()}, {key.dim()} and {value.dim()}"
        )
    widths = {"query": module.embed_dim, "key": module.kdim, "value": module.vdim}
    for (argument, width), x in zip(widths.items(), (query, key, value), strict=True):
        if x.shape[-1] != width:
            raise AssertionError(
                f"{name}: {argument} must have {width} features, got {x.shape[-1]}"
            )
    if key.shape[:-1] != value.shape[:-1]:
        raise AssertionError(
            f"{name}: key and value must have the same length and batch, "
            f"got {tuple(key.shape)} and {tuple(value.shape)}"
        )
    batch = 0 if module.batch_first else 1
    if query.dim() == 3 and query.shape[batch] != key.shape[batch]:
        raise RuntimeError(
            f"{name}: query and key must have the same batch size, "
            f"got {query.shape[batch]} and {key.shape[batch]}"
        )
    weight = module.out_proj.weight
    dtypes = {x.dtype for x in (query, key, value, weight)}
    if len(dtypes) > 1 and not torch.is_autocast_enabled(query.device.type):
        raise RuntimeError(
            f"{name}: query, key and value must have the parameters' dtype {weight.dtype}, "
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
    name = "MultiheadAttention"
    masks = {"attn_mask": attn_mask, "key_padding_mask": key_padding_mask}
    for argument, mask in masks.items():
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
