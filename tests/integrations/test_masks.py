"""Compact masks see what transformers' own dense masks see, and are found wherever they can be."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache, StaticCache, masking_utils
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_bidirectional_sliding_window_mask,
    create_causal_mask,
    create_chunked_causal_mask,
    create_sliding_window_causal_mask,
)

from fastattn.integrations.transformers import CompactMask
from fastattn.ops.core.backends import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="launches nothing")

LENGTH = 12
PADDED = torch.arange(LENGTH) >= torch.tensor([[4], [0]])
RIGHT_PADDED = torch.arange(LENGTH) < torch.tensor([[7], [12]])
HOLED = torch.arange(LENGTH) % 5 != torch.tensor([[1], [7]])
PACKED = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3], [0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]])

CONFIG: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 5,
    "max_position_embeddings": 64,
}
MAKERS: dict[str, Callable] = {
    "causal": create_causal_mask,
    "window": create_sliding_window_causal_mask,
    "chunks": create_chunked_causal_mask,
    "both sides": create_bidirectional_mask,
    "window to both sides": create_bidirectional_sliding_window_mask,
}
PADDINGS = {
    "none": None,
    "ones": torch.ones(2, LENGTH),
    "left": PADDED,
    "right": RIGHT_PADDED,
    "holes": HOLED,
}


def masks(
    maker: Callable, *, attn: str = "fastattn", chunk: int = 4, **options: Any
) -> tuple[Any, torch.Tensor]:
    """The mask of ours, and transformers' dense one with nothing left out."""
    config = transformers.MistralConfig(**CONFIG)
    config.attention_chunk_size = chunk
    given: dict[str, Any] = {
        "inputs_embeds": torch.randn(2, LENGTH, 16),
        "attention_mask": None,
        "cache": None,
        **options,
    }
    config._attn_implementation = attn
    ours = maker(config=config, **given)
    config._attn_implementation = "eager"
    theirs = maker(config=config, **given)
    queries = given["inputs_embeds"].shape[1]
    if theirs is None:
        return ours, torch.ones(2, 1, queries, queries, dtype=torch.bool)
    return ours, theirs == 0


@pytest.mark.parametrize("padding", PADDINGS.values(), ids=PADDINGS)
@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)
def test_masks_of_training(maker: Callable, padding: torch.Tensor | None):
    ours, theirs = masks(maker, attention_mask=padding)
    plain = padding is None or bool(padding.all())
    if plain and maker in (create_causal_mask, create_bidirectional_mask):
        assert ours is None
        return
    assert type(ours) is CompactMask
    assert torch.equal(ours.dense(), theirs)


@pytest.mark.parametrize("maker", ["causal", "window"])
def test_masks_of_packed_documents(maker: str):
    ours, theirs = masks(MAKERS[maker], position_ids=PACKED)
    assert type(ours) is CompactMask
    assert ours.document_ids is not None
    assert torch.equal(ours.dense(), theirs)


def test_packed_chunks_are_dense():
    ours, theirs = masks(create_chunked_causal_mask, position_ids=PACKED)
    assert type(ours) is torch.Tensor
    assert torch.equal(ours, theirs)


def test_chunks_are_counted_from_the_first_token_of_all():
    config = transformers.MistralConfig(**CONFIG, layer_types=["sliding_attention"] * 2)
    cache = DynamicCache(config=config)
    states = torch.randn(2, 2, 9, 8)
    for layer in range(2):
        cache.update(states, states, layer)
    embeds = torch.randn(2, 2, 16)
    ours, theirs = masks(create_chunked_causal_mask, cache=cache, inputs_embeds=embeds, chunk=10)
    assert theirs.shape[3] == 6
    assert not theirs[0, 0, 1, :5].any()
    assert torch.equal(ours.dense(), theirs)


def test_what_a_window_or_chunk_holds_whole_needs_no_mask():
    assert masks(create_chunked_causal_mask, chunk=LENGTH)[0] is None
    short = torch.randn(2, 5, 16)
    assert masks(create_sliding_window_causal_mask, inputs_embeds=short)[0] is None
    longer = torch.randn(2, 6, 16)
    assert masks(create_sliding_window_causal_mask, inputs_embeds=longer)[0] is not None


@pytest.mark.parametrize("side", ["or_mask_function", "and_mask_function"])
def test_masks_of_ones_own_are_dense(side: str):
    def own(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return (key - query) % 3 == 1

    ours, theirs = masks(create_causal_mask, **{side: own})
    assert type(ours) is torch.Tensor
    assert torch.equal(ours, theirs)


def test_blocks_that_see_each_other_are_dense():
    blocks = torch.tensor([[-1, -1, 0, 0, 0, -1, 1, 1, -1, -1, -1, -1]] * 2)
    ours, theirs = masks(create_causal_mask, block_sequence_ids=blocks)
    assert type(ours) is torch.Tensor
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("maker", ["causal", "window", "chunks"])
@pytest.mark.parametrize("before", [0, 3, 7])
@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_masks_of_generation(kind: str, queries: int, before: int, maker: str, padding: str):
    config = transformers.MistralConfig(**CONFIG, layer_types=["sliding_attention"] * 2)
    if maker == "causal":
        config = transformers.LlamaConfig(**{n: CONFIG[n] for n in CONFIG if n != "sliding_window"})
    cache: Any = DynamicCache(config=config)
    if kind == "static":
        cache = StaticCache(config=config, max_cache_len=16)
    if before:
        states = torch.randn(2, 2, before, 8)
        for layer in range(2):
            cache.update(states, states, layer)
    given = PADDINGS[padding]
    if given is not None:
        given = given[:, : before + queries]
    embeds = torch.randn(2, queries, 16)
    ours, theirs = masks(MAKERS[maker], cache=cache, inputs_embeds=embeds, attention_mask=given)
    if ours is None:
        # One query sees all keys there are, several what stands before them.
        expected = torch.ones(queries, theirs.shape[3], dtype=torch.bool)
        expected = expected if queries == 1 else expected.tril()
        assert torch.equal(theirs, expected.expand_as(theirs))
        return
    assert queries > 1 or type(ours) is torch.Tensor
    assert torch.equal(torch.as_tensor(ours), theirs)


def test_a_compact_mask_is_a_tensor_for_everybody_else():
    ours, theirs = masks(create_sliding_window_causal_mask, attention_mask=PADDED)
    assert (ours.shape, ours.ndim, ours.dtype) == (theirs.shape, 4, torch.bool)
    assert (ours.size(-1), len(ours), ours.numel()) == (LENGTH, 2, theirs.numel())
    assert not ours.is_floating_point()
    assert torch.equal(ours[:, :, 2:, :7], theirs[:, :, 2:, :7])
    assert torch.equal(torch.cat((ours, theirs), -1), torch.cat((theirs, theirs), -1))
    assert torch.equal(torch.where(ours, 0.0, -1.0), torch.where(theirs, 0.0, -1.0))
    assert torch.equal(~ours, ~theirs)
    assert torch.equal(ours.float(), theirs.float())
    assert torch.equal(copy.deepcopy(ours), theirs)
    assert "True" in repr(ours)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    assert torch.equal(torch.load(file), theirs)


def test_a_compact_mask_stays_compact_where_it_is_moved():
    ours, theirs = masks(create_sliding_window_causal_mask, attention_mask=PADDED)
    for moved in (ours.to("cpu"), ours.detach(), ours.to(device="cpu", non_blocking=True)):
        assert type(moved) is CompactMask
        assert torch.equal(moved.dense(), theirs)
    assert ours.to("meta").document_ids[1].device.type == "meta"
    assert type(ours.to(torch.float32)) is torch.Tensor


def test_every_mask_function_of_transformers_is_known_or_dense():
    """A name that has changed would only cost memory, and nobody would notice."""
    makers = (
        "and_masks",
        "sliding_window_overlay",
        "sliding_window_bidirectional_overlay",
        "chunked_overlay",
        "packed_sequence_mask_function",
        "remap_positions_for_packed_sequence",
    )
    for name in makers:
        assert callable(getattr(masking_utils, name)), name
