"""Images as sequences of patches."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn

from .. import ops
from ..ops.core.arguments import refuse_nested
from .block import calls_only_forward
from .tracing import one_node


class PatchEmbedding(nn.Module):
    """Cuts images into patches and projects each to a token, as in ViT.

    The parameters are those of a torch.nn.Conv2d whose stride is its kernel, as `projection`, which
    is their name in Hugging Face's `ViTPatchEmbeddings`, and start as that one's. As patches do not
    overlap, the convolution is one product with them. If another module has taken the place of
    `projection`, or if it has hooks, it is called.

    Args:
        patch_size: the pixels of a patch's side, or (height, width).
        in_channels: the channels of an image.
        embed_dim: the columns of a token.
        bias: whether the projection has one.
        device, dtype: as in torch.nn.Conv2d.

    Source: Dosovitskiy et al., "An Image is Worth 16x16 Words" (2020).

    Example:
        >>> fastattn.nn.PatchEmbedding(4, 3, 32)(torch.randn(2, 3, 8, 8)).shape
        torch.Size([2, 4, 32])
    """

    def __init__(
        self,
        patch_size: int | tuple[int, int],
        in_channels: int = 3,
        embed_dim: int = 768,
        *,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        size = (patch_size, patch_size) if isinstance(patch_size, int) else tuple(patch_size)
        if len(size) != 2 or min(size) < 1:
            raise ValueError(
                "PatchEmbedding: patch_size must be a positive number or a pair of them, "
                f"got {patch_size}"
            )
        self.patch_size = size
        self.in_channels = in_channels
        self.embed_dim = embed_dim
        self.projection = nn.Conv2d(
            in_channels, embed_dim, size, stride=size, bias=bias, device=device, dtype=dtype
        )

    @one_node
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, in_channels, height, width) to (B, patches, embed_dim), row by row.

        Raises:
            ValueError: the images do not have these channels, or are not made of whole patches.
        """
        if images.is_nested:
            refuse_nested("PatchEmbedding", "images")
        if images.dim() != 4 or images.shape[1] != self.in_channels:
            raise ValueError(
                f"PatchEmbedding: images must be (B, {self.in_channels}, height, width), got the "
                f"shape {tuple(images.shape)}"
            )
        height, width = self.patch_size
        if images.shape[2] % height or images.shape[3] % width:
            raise ValueError(
                f"PatchEmbedding: images must be whole multiples of patches of {height} x {width}, "
                f"got {images.shape[2]} x {images.shape[3]}"
            )
        projection = self.projection
        if type(projection) is not nn.Conv2d or not calls_only_forward(projection):
            return projection(images).flatten(2).mT
        rows, columns = images.shape[2] // height, images.shape[3] // width
        patches = images.unflatten(3, (columns, width)).unflatten(2, (rows, height))
        # (B, rows, columns, in_channels, height, width)
        patches = patches.permute(0, 2, 4, 1, 3, 5)
        return ops.linear(
            patches.flatten(3).flatten(1, 2), projection.weight.flatten(1), projection.bias
        )
