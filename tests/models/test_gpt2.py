"""GPT-2 beside transformers' models of the same parameters."""

from pathlib import Path
from typing import Any

import pytest
import torch
from model_support import (
    BACKENDS,
    check_autocast,
    check_checkpointing,
    check_compiled,
    compare_training,
    compare_way_back,
    compare_with_transformers,
    counting_batch,
    made,
    token_batches,
)

from fastattn.models.gpt2 import GPT2Config, GPT2LMHeadModel
from fastattn.ops.core.backends import INTERPRETED

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "n_positions": 20,
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 2,
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", {}),
    "untied, other scales and activation": (
        "GPT2LMHeadModel",
        {
            "tie_word_embeddings": False,
            "scale_attn_weights": False,
            "scale_attn_by_inverse_layer_idx": True,
            "activation_function": "relu",
            "n_inner": 40,
        },
    ),
    "classifier": (
        "GPT2ForSequenceClassification",
        {"num_labels": 3, "pad_token_id": 0, "n_layer": 1},
    ),
    "reward": (
        "GPT2ForSequenceClassification",
        {"num_labels": 1, "pad_token_id": 0, "n_layer": 1},
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_and_gradients_are_those_of_transformers(
    variant: str, backend: str, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    name, options = VARIANTS[variant]
    config = transformers.GPT2Config(**{**SIZES, **options})
    theirs = made(lambda: getattr(transformers, name)(config))
    batches = token_batches(options.get("num_labels"))
    # Interpreted kernels take seconds for each.
    given = batches if backend == "reference" else batches[::2]
    model = compare_with_transformers(theirs, tmp_path / "theirs", given, backend)
    if backend == "reference":
        compare_way_back(model, theirs, tmp_path / "ours", batches[1])


@pytest.mark.kernels
@pytest.mark.slow
def test_training_through_kernels_follows_the_reference() -> None:
    # Both backends drop out the same elements only where PyTorch's dropout is not the faster one.
    dropped = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(**{**SIZES, **dropped, "n_embd": 16, "n_layer": 1})
    compare_training(lambda: GPT2LMHeadModel(config), counting_batch)


@pytest.mark.skipif(INTERPRETED, reason="runs the reference backend")
class TestReference:
    def test_checkpointed_blocks_drop_the_same_again(self) -> None:
        model, batch = GPT2LMHeadModel(GPT2Config(**SIZES)).train(), token_batches()[1]
        torch.manual_seed(1)
        first = model(**batch).loss
        torch.manual_seed(1)
        model.gradient_checkpointing = True
        again = model(**batch).loss
        assert torch.equal(first, again)
        gradients = (torch.autograd.grad(loss, list(model.parameters())) for loss in (first, again))
        for kept, computed in zip(*gradients, strict=True):
            assert torch.equal(kept, computed)
        assert not torch.equal(first, model(**batch).loss)

    def test_checkpointed_blocks(self) -> None:
        dropped = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        check_checkpointing(GPT2LMHeadModel(GPT2Config(**SIZES, **dropped)), token_batches()[1])

    @pytest.mark.slow
    def test_one_graph(self) -> None:
        check_compiled(GPT2LMHeadModel(GPT2Config(**SIZES)).eval(), token_batches()[2])

    def test_autocast(self) -> None:
        check_autocast(GPT2LMHeadModel(GPT2Config(**SIZES)).eval(), token_batches()[1])

    def test_initial_values(self) -> None:
        torch.manual_seed(0)
        sizes = {**SIZES, "n_embd": 128, "n_layer": 8}
        model = GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.1))
        for _ in range(2):
            block: Any = model.transformer.h[3]
            assert block.mlp.c_fc.weight.std().item() == pytest.approx(0.1, rel=0.05)
            assert block.mlp.c_proj.weight.std().item() == pytest.approx(0.1 / 4, rel=0.05)
            assert block.attn.c_proj.bias.abs().max() == 0
            assert model.lm_head.weight is model.transformer.wte.weight
            model.reset_parameters()
