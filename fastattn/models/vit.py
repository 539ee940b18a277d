"""ViT: images as sequences of patches, with norms before attention and feed-forward layers.

Every addition is one kernel with the norm that follows it, also across layers.

Source: Dosovitskiy et al., "An Image is Worth 16x16 Words" (2020).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..nn import Dropout, LayerNorm, Linear, PatchEmbedding, add_norm
from ..nn.block import Stream
from ..ops.linear import Activation
from ._base import Model
from ._config import Config, ConfigError
from ._layers import ACTIVATIONS, activate, attend, find_head_dim
from ._losses import sequence_loss
from ._outputs import Output


@dataclass(kw_only=True)
class ViTConfig(Config):
    """The fields of Hugging Face's `ViTConfig` that a model depends on, with its defaults."""

    model_type: ClassVar[str] = "vit"
    harmless: ClassVar[frozenset[str]] = frozenset({"encoder_stride"})

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    image_size: int | list[int] = 224
    patch_size: int | list[int] = 16
    num_channels: int = 3
    qkv_bias: bool = True
    pooler_output_size: int | None = None
    pooler_act: str = "tanh"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.supports("hidden_act", *ACTIVATIONS)
        self.supports("pooler_act", *ACTIVATIONS)
        find_head_dim(self, "hidden_size", "num_attention_heads")
        if self.pooler_output_size is None:
            self.pooler_output_size = self.hidden_size
        if self.image[0] % self.patch[0] or self.image[1] % self.patch[1]:
            raise ConfigError(
                f"ViTConfig: image_size must be made of whole patches, got {self.image_size} and "
                f"patch_size={self.patch_size}"
            )

    @property
    def image(self) -> tuple[int, int]:
        """Height and width of an image."""
        return _pair(self.image_size)

    @property
    def patch(self) -> tuple[int, int]:
        """Height and width of a patch."""
        return _pair(self.patch_size)

    @property
    def grid(self) -> tuple[int, int]:
        """The rows of patches in an image, and the patches of a row."""
        return self.image[0] // self.patch[0], self.image[1] // self.patch[1]


def _pair(size: int | list[int]) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    height, width = size
    return height, width


class ViTEmbeddings(nn.Module):
    """The class token and the patches of an image, each with its position."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        columns = config.hidden_size
        self.config = config
        rows, width = config.grid
        self.cls_token = nn.Parameter(torch.empty(1, 1, columns))
        self.patch_embeddings = PatchEmbedding(config.patch, config.num_channels, columns)
        self.position_embeddings = nn.Parameter(torch.empty(1, rows * width + 1, columns))
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the class token and the positions."""
        for parameter in (self.cls_token, self.position_embeddings):
            nn.init.trunc_normal_(parameter, std=self.config.initializer_range)

    def forward(self, pixel_values: torch.Tensor, interpolate: bool) -> torch.Tensor:
        """(B, num_channels, height, width) to (B, 1 + patches, hidden_size).

        Raises:
            ValueError: the image has another size than the configuration says, and positions are
                not to be interpolated.
        """
        size = tuple(pixel_values.shape[2:])
        if size != self.config.image and not interpolate:
            raise ValueError(
                f"pixel_values must be {' x '.join(map(str, self.config.image))} pixels, got the "
                f"shape {tuple(pixel_values.shape)}; interpolate_pos_encoding=True takes others"
            )
        patches = self.patch_embeddings(pixel_values.to(self.cls_token.dtype))
        first = self.cls_token.expand(patches.shape[0], -1, -1)
        x = torch.cat((first.to(patches.dtype), patches), dim=1)
        return self.dropout(x + self._positions(size))

    def _positions(self, size: tuple[int, ...]) -> torch.Tensor:
        """The positions in an image of this size, from those in one of the configured size."""
        if size == self.config.image:
            return self.position_embeddings
        height, width = self.config.patch
        first, places = self.position_embeddings[:, :1], self.position_embeddings[:, 1:]
        places = places.unflatten(1, self.config.grid).permute(0, 3, 1, 2)
        grid = size[0] // height, size[1] // width
        places = F.interpolate(places, size=grid, mode="bicubic", align_corners=False)
        return torch.cat((first, places.flatten(2).mT), dim=1)


class ViTSelfAttention(nn.Module):
    """Attention of the tokens to each other, without the projection of what it gives."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        columns, bias = config.hidden_size, config.qkv_bias
        self.head_dim = find_head_dim(config, "hidden_size", "num_attention_heads")
        self.dropout = config.attention_probs_dropout_prob
        self.query = Linear(columns, columns, bias)
        self.key = Linear(columns, columns, bias)
        self.value = Linear(columns, columns, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, S, hidden_size) to the same."""
        q, k, v = self.query(x), self.key(x), self.value(x)
        return attend(q, k, v, self.head_dim, dropout_p=self.dropout if self.training else 0.0)


class ViTDense(nn.Module):
    """activation(dense(x))."""

    def __init__(self, in_features: int, out_features: int, activation: str | None = None) -> None:
        super().__init__()
        self.dense = Linear(in_features, out_features)
        self.activation: Activation | None = None if activation is None else ACTIVATIONS[activation]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in_features) to (..., out_features)."""
        return (
            self.dense(x) if self.activation is None else activate(self.dense, x, self.activation)
        )


class ViTAttention(nn.Module):
    """Attention and the projection of what it gives."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.attention = ViTSelfAttention(config)
        self.output = ViTDense(config.hidden_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, S, hidden_size) to the same."""
        return self.output(self.attention(x))


class ViTLayer(nn.Module):
    """Attention and a feed-forward layer, each of a norm of the stream and added to it.

    Streams are pairs (branch, residual), see `fastattn.nn.TransformerBlock`; the branch still has
    to be dropped and added.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        columns, hidden = config.hidden_size, config.intermediate_size
        self.attention = ViTAttention(config)
        self.intermediate = ViTDense(columns, hidden, config.hidden_act)
        self.output = ViTDense(hidden, columns)
        self.layernorm_before = LayerNorm(columns, config.layer_norm_eps)
        self.layernorm_after = LayerNorm(columns, config.layer_norm_eps)
        self.dropout = config.hidden_dropout_prob

    def forward(self, stream: Stream) -> Stream:
        """A pair of (B, S, hidden_size) to such a pair."""
        dropout_p = self.dropout if self.training else 0.0
        x, residual = add_norm(*stream, self.layernorm_before, dropout_p)
        x, residual = add_norm(self.attention(x), residual, self.layernorm_after, dropout_p)
        return self.output(self.intermediate(x)), residual


class ViTEncoder(nn.Module):
    """The layers; `ViTModel` runs them."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(ViTLayer(config) for _ in range(config.num_hidden_layers))


class ViTPreTrained(Model):
    """What the body and the heads have in common.

    The names are those in checkpoints, which transformers 5 writes as well, although its modules
    have others.
    """

    config_class = ViTConfig
    base_prefix = "vit"

    def initialize(self, module: nn.Module) -> None:
        """As in every model, and the convolution as a linear layer."""
        super().initialize(module)
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, ViTEmbeddings):
            module.reset_parameters()


class ViTModel(ViTPreTrained):
    """The body, with or without the pooler."""

    def __init__(self, config: ViTConfig, *, pooler: bool = True) -> None:
        super().__init__(config)
        columns = config.hidden_size
        self.embeddings = ViTEmbeddings(config)
        self.encoder = ViTEncoder(config)
        self.layernorm = LayerNorm(columns, config.layer_norm_eps)
        size = config.pooler_output_size or columns
        self.pooler = ViTDense(columns, size, config.pooler_act) if pooler else None
        self.finish()

    def forward(
        self, pixel_values: torch.Tensor, *, interpolate_pos_encoding: bool = False
    ) -> Output:
        """Hidden states of the class token and of every patch, and the pooled class token.

        Args:
            pixel_values: (B, num_channels, height, width).
            interpolate_pos_encoding: take images of any size, with positions between those that
                were learned.
        """
        x = self.embeddings(pixel_values, interpolate_pos_encoding)
        stream: Stream = (x, None)
        for layer in self.encoder.layer:
            stream = self.run(layer, stream)
        dropout_p = self.config.hidden_dropout_prob if self.training else 0.0
        x, _ = add_norm(*stream, self.layernorm, dropout_p)
        pooled = None if self.pooler is None else self.pooler(x[:, 0])
        return Output(last_hidden_state=x, pooled=pooled)


class ViTForImageClassification(ViTPreTrained):
    """ViT with a linear classifier of the class token."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__(config)
        self.vit = ViTModel(config, pooler=False)
        self.classifier = Linear(config.hidden_size, config.num_labels)
        self.finish()

    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        *,
        interpolate_pos_encoding: bool = False,
    ) -> Output:
        """Logits (B, num_labels), and the loss of labels.

        Args:
            labels: (B,) classes, or as `fastattn.models._losses.sequence_loss` takes them.

        The others are those of `ViTModel`.
        """
        x = self.vit(
            pixel_values, interpolate_pos_encoding=interpolate_pos_encoding
        ).last_hidden_state
        logits = self.classifier(x[:, 0])
        loss = None if labels is None else sequence_loss(self.config, logits, labels)
        return Output(loss=loss, last_hidden_state=x, computed=logits)


MODELS: tuple[type[Model], ...] = (ViTForImageClassification, ViTModel)
