"""Batches without sequences, and sequences without tokens.

A mean over no labels is NaN, as PyTorch's is and so transformers' losses are; gradients are 0.
"""

from typing import Any

import pytest
import torch
from model_support import BACKENDS, device_of
from small_models import CLASSES, CLASSIFIERS, LANGUAGE_MODELS, batch_of, small, unlabelled

import fastattn


def placed(name: str, backend: str, sequences: int, length: int) -> tuple[Any, Any]:
    device = device_of(backend)
    model = small(name).to(device)
    batch = batch_of(model, sequences, length)
    return model, {key: tensor.to(device) for key, tensor in batch.items()}


def check_nothing(model: Any, batch: dict[str, torch.Tensor], shape: tuple[int, ...]) -> None:
    output = model(**batch)
    assert output.last_hidden_state.shape[:2] == shape[:2]
    if "labels" not in batch:
        assert torch.isfinite(output.last_hidden_state).all()
        return
    assert output.loss.isnan()
    assert output.logits.shape == shape
    assert model(**unlabelled(model, batch)).logits.shape == shape
    output.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or not parameter.grad.any(), name


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("sequences", "length"), [(2, 0), (0, 4), (0, 0)])
def test_language_models(name: str, backend: Any, sequences: int, length: int) -> None:
    model, batch = placed(name, backend, sequences, length)
    with fastattn.backend(backend):
        check_nothing(model, batch, (sequences, length, model.config.vocab_size))


@pytest.mark.parametrize("name", [n for n in LANGUAGE_MODELS if n.startswith(("T5", "Bart"))])
@pytest.mark.parametrize("backend", BACKENDS)
def test_labels_without_tokens_of_an_input_with_some(name: str, backend: Any) -> None:
    model, batch = placed(name, backend, 2, 4)
    batch["labels"] = batch["labels"][:, :0]
    with fastattn.backend(backend):
        check_nothing(model, batch, (2, 0, model.config.vocab_size))


@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_classifiers(name: str, backend: Any) -> None:
    model, batch = placed(name, backend, 0, 4)
    with fastattn.backend(backend):
        output = model(**batch)
        assert output.loss.isnan()
        assert output.logits.shape == (0, model.config.num_labels)
        if "input_ids" not in batch:
            return
        model, batch = placed(name, backend, 2, 0)
        with pytest.raises(ValueError, match=r"input_ids must have tokens, .* length 0 in the sh"):
            model(**batch)


@pytest.mark.parametrize(
    "name", [n for n in CLASSES if n not in {**LANGUAGE_MODELS, **CLASSIFIERS}]
)
@pytest.mark.skipif("fastattn.ops.core.backends.INTERPRETED", reason="runs the reference backend")
def test_bodies(name: str) -> None:
    model, batch = placed(name, "reference", 0, 4)
    check_nothing(model, batch, (0, 5 if name == "ViTModel" else 4))
