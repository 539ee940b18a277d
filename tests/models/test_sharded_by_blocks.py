"""FSDP2 by blocks: a parameter is read in the forward of the unit that is sharded with it alone."""

import datetime
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from model_support import BACKENDS, device_of
from small_models import (
    CLASSES,
    LANGUAGE_MODELS,
    batch_of,
    blocks_of,
    gradients_of,
    loss_of,
    small,
    unlabelled,
)
from torch import nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fastattn
from fastattn import models

# FSDP2 says so of every block that gives a view, and nothing here changes one in place.
pytestmark = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")


@pytest.fixture(scope="module")
def mesh() -> Iterator[Any]:
    """One process: what is sharded is a DTensor, and whole only while its unit is called."""
    device = device_of("triton") if torch.cuda.is_available() else "cpu"
    dist.init_process_group(
        "gloo" if device == "cpu" else "nccl",
        rank=0,
        world_size=1,
        store=HashStore(),
        timeout=datetime.timedelta(seconds=60),
    )
    yield init_device_mesh(device, (1,))
    dist.destroy_process_group()


def shard(
    model: nn.Module, mesh: Any, units: Callable[[nn.Module], Any] = blocks_of, **options: Any
) -> Any:
    for unit in units(model):
        fully_shard(unit, mesh=mesh)
    fully_shard(model, mesh=mesh, **options)
    return model


def on(mesh: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.to(mesh.device_type) for name, tensor in batch.items()}


# Interpreted kernels take seconds for each, and the other classes of a family have its blocks.
ONE_EACH = (
    "BartForConditionalGeneration",
    "BertForMaskedLM",
    "Gemma2ForCausalLM",
    "GPT2LMHeadModel",
    "LlamaForCausalLM",
    "T5ForConditionalGeneration",
    "ViTForImageClassification",
)
CASES = [
    pytest.param(backend.values[0], name, marks=backend.marks)
    for backend, names in zip(BACKENDS, (CLASSES, ONE_EACH), strict=True)
    for name in names
]


@pytest.mark.parametrize(("backend", "name"), CASES)
def test_losses_and_gradients_are_those_of_the_whole_model(
    backend: Any, name: str, mesh: Any
) -> None:
    whole = small(name).to(mesh.device_type)
    sharded = shard(small(name).to(mesh.device_type), mesh)
    batch = on(mesh, batch_of(whole, *((1, 3) if backend == "triton" else ())))
    assert len(blocks_of(whole)) >= 2
    with fastattn.backend(backend):
        check_same(whole, sharded, batch)


def leaves_of(model: nn.Module) -> list[nn.Module]:
    """All modules with parameters of their own, inner ones first."""
    own = [m for m in model.modules() if m is not model and list(m.parameters(recurse=False))]
    return own[::-1]


@pytest.mark.skipif("fastattn.ops.core.backends.INTERPRETED", reason="runs the reference backend")
@pytest.mark.parametrize("name", CLASSES)
def test_every_module_may_be_a_unit(name: str, mesh: Any) -> None:
    # What is tied has to be one unit.
    options = {"tie_word_embeddings": False} if CLASSES[name].tied else {}
    whole = small(name, **options).to(mesh.device_type)
    sharded = shard(small(name, **options).to(mesh.device_type), mesh, leaves_of)
    batch = on(mesh, batch_of(whole))
    check_same(whole, sharded, batch)
    if name in LANGUAGE_MODELS:
        output = sharded(**batch)
        output.loss.backward()
        expected = whole(**unlabelled(whole, batch)).logits
        torch.testing.assert_close(output.logits, expected)


def check_same(whole: Any, sharded: Any, batch: dict[str, torch.Tensor]) -> None:
    losses = [loss_of(model, batch) for model in (whole, sharded)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-9, atol=0)
    expected, found = gradients_of(whole), gradients_of(sharded)
    assert found.keys() == expected.keys()
    assert sum(gradient is not None for gradient in expected.values()) > 10
    for parameter, gradient in expected.items():
        ours = found[parameter]
        assert (ours is None) == (gradient is None), parameter
        if ours is not None:
            torch.testing.assert_close(ours, gradient, rtol=1e-9, atol=1e-12, msg=parameter)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
@pytest.mark.skipif("fastattn.ops.core.backends.INTERPRETED", reason="runs the reference backend")
def test_logits_are_right_or_an_error_says_why_not(name: str, mesh: Any) -> None:
    model = small(name).to(mesh.device_type)
    batch = on(mesh, batch_of(model))
    expected = model(**unlabelled(model, batch)).logits
    model = shard(model, mesh)
    output = model(**batch)
    torch.testing.assert_close(output.logits, expected)
    torch.testing.assert_close(model(**unlabelled(model, batch)).logits, expected)
    output = model(**batch)
    output.loss.backward()
    with pytest.raises(RuntimeError, match="has been sharded again since the model was called"):
        _ = output.logits
    resharded = shard(small(name).to(mesh.device_type), mesh, reshard_after_forward=True)
    with pytest.raises(RuntimeError, match="has been sharded again since the model was called"):
        _ = resharded(**batch).logits


@pytest.mark.skipif("fastattn.ops.core.backends.INTERPRETED", reason="runs no kernel")
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_saving_says_how_to_gather(name: str, mesh: Any, tmp_path: Any) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    pytest.importorskip("safetensors")
    expected = small(name).state_dict()
    model = shard(small(name).to(mesh.device_type), mesh)
    with pytest.raises(ValueError, match=r"are sharded; gather them .*get_model_state_dict"):
        model.save_pretrained(tmp_path)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    model.save_pretrained(tmp_path, state_dict=get_model_state_dict(model, options=options))
    again = models.from_pretrained(tmp_path)
    assert type(again).__name__ == name
    assert again.state_dict().keys() == expected.keys()
    for key, tensor in again.state_dict().items():
        assert torch.equal(tensor, expected[key]), key


@pytest.mark.skipif("fastattn.ops.core.backends.INTERPRETED", reason="runs the reference backend")
@pytest.mark.parametrize("tied", [False, True])
def test_adapted_heads_are_merged_where_that_is_right(tied: bool, mesh: Any) -> None:
    """Whoever has sharded a weight that two layers share puts one tensor into both."""
    model: Any = small("LlamaForCausalLM", tie_word_embeddings=tied)
    fastattn.nn.apply_lora(model, "lm_head", rank=2)
    nn.init.normal_(model.lm_head.lora_B)
    model = shard(model.to(mesh.device_type), mesh)
    batch = on(mesh, unlabelled(model, batch_of(model)))
    before = model(**batch).logits
    model.reshard()
    if tied:
        with pytest.raises(RuntimeError, match=r"another layer shares .* merge before the model"):
            model.lm_head.merge()
        torch.testing.assert_close(model(**batch).logits, before)
        return
    model.lm_head.merge()
    torch.testing.assert_close(model(**batch).logits, before)
    model.reshard()
    model.lm_head.unmerge()
    torch.testing.assert_close(model(**batch).logits, before)
