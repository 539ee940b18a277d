"""Checkpoints: what is read, what is refused and how, and what is written."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastattn import models
from fastattn.models import CheckpointError, ConfigError
from fastattn.models.gpt2 import GPT2Config, GPT2LMHeadModel, GPT2Model
from fastattn.models.llama import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    MistralForCausalLM,
)
from fastattn.ops.core.backends import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="runs no kernel")
safetensors = pytest.importorskip("safetensors.torch")

SIZES: dict[str, Any] = {
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 8,
}
TOKENS = torch.arange(6)[None]


def llama(**options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **options}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of `llama()`."""
    llama().save_pretrained(tmp_path)
    return tmp_path


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = safetensors.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def shard(folder: Path) -> Path:
    """Split the tensors over two files, by turns, and return the second."""
    tensors = safetensors.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for file in set(places.values()):
        part = {name: tensor for name, tensor in tensors.items() if places[name] == file}
        safetensors.save_file(part, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder / "model-1.safetensors"


def same_parameters(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


def test_what_is_written_is_read(folder: Path) -> None:
    model = models.from_pretrained(folder)
    assert type(model) is LlamaForCausalLM
    assert same_parameters(model, llama())
    assert not model.training
    assert model.config == llama().config
    assert torch.equal(model(TOKENS).logits, llama()(TOKENS).logits)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_shards_are_read(folder: Path) -> None:
    shard(folder)
    assert same_parameters(models.from_pretrained(folder), llama())


def test_shards_of_transformers_are_read(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="2KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    found = models.from_pretrained(tmp_path)(TOKENS).logits
    torch.testing.assert_close(found, theirs(TOKENS).logits, rtol=1e-5, atol=1e-6)


def test_dtype_and_device_are_those_asked_for_or_stored(folder: Path) -> None:
    half = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert half.model.rotary_emb.cos.dtype is torch.float32
    half.save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert next(models.from_pretrained(folder).parameters()).dtype is torch.bfloat16
    with torch.device("meta"):
        nowhere = models.from_pretrained(folder)
    assert {tensor.device.type for tensor in nowhere.parameters()} == {"meta"}


def test_tied_weights_are_one_and_stored_once(tmp_path: Path) -> None:
    tied = llama(tie_word_embeddings=True)
    tied.save_pretrained(tmp_path)
    assert "lm_head.weight" not in safetensors.load_file(tmp_path / "model.safetensors")
    model = LlamaForCausalLM.from_pretrained(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert same_parameters(model, tied)

    def head_beside(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    change_tensors(tmp_path, head_beside)
    assert same_parameters(LlamaForCausalLM.from_pretrained(tmp_path), tied)
    change_tensors(tmp_path, lambda tensors: tensors.pop("model.embed_tokens.weight"))
    assert same_parameters(LlamaForCausalLM.from_pretrained(tmp_path), tied)

    def head_apart(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.embed_tokens.weight"] = tensors["lm_head.weight"] + 1

    change_tensors(tmp_path, head_apart)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight and .* are tied"):
        LlamaForCausalLM.from_pretrained(tmp_path)


def transposed(tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].t().contiguous()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: tensors.pop("model.norm.weight"),
            r"parameters that it lacks: model\.norm\.weight$",
        ),
        (
            lambda tensors: tensors.update({"model.layers.2.bias": torch.zeros(3)}),
            r"no parameters of the model: model\.layers\.2\.bias$",
        ),
        (transposed, r"up_proj\.weight is \(8, 12\) there and \(12, 8\) in the model$"),
    ],
)
def test_what_does_not_fit_is_named(folder: Path, change: Any, message: str) -> None:
    change_tensors(folder, change)
    for read in (models.from_pretrained, LlamaForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError, match=message):
            read(folder)


def test_files_that_cannot_be_read_are_named(folder: Path, tmp_path: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for length in (len(whole) - 1, 100, 4, 0):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged or cut short"):
            models.from_pretrained(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        models.from_pretrained(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is not JSON"):
        models.from_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"config\.json is not there"):
        models.from_pretrained(tmp_path / "nowhere")


def test_shards_that_do_not_fit_their_index_are_named(folder: Path) -> None:
    second = shard(folder)
    whole = second.read_bytes()
    second.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors is damaged or cut short"):
        models.from_pretrained(folder)
    second.unlink()
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors is not there"):
        models.from_pretrained(folder)
    safetensors.save_file({"stray": torch.zeros(1)}, second)
    with pytest.raises(
        CheckpointError, match=r"model-1\.safetensors and .* disagree about .*stray"
    ):
        models.from_pretrained(folder)


def test_configurations_of_others_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="type 'llama', not 'mistral'"):
        MistralForCausalLM.from_pretrained(folder)
    change_config(folder, model_type="mamba")
    with pytest.raises(ConfigError, match=r"model_type must be one of .*llama.*'mamba'"):
        models.from_pretrained(folder)
    change_config(folder, model_type="llama", architectures=["LlamaForQuestionAnswering"])
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM.*got \['LlamaForQuestionAnswering'\]"):
        models.from_pretrained(folder)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"attention_sinks": 4}, "attention_sinks=4"),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        ({"hidden_act": "quick_gelu"}, "hidden_act must be one of .*, got 'quick_gelu'"),
        ({"pretraining_tp": 2}, "pretraining_tp must be one of 1, got 2"),
        ({"rope_scaling": {"type": "longrope"}}, "rope_type must be one of .*'longrope'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"problem_type": "ranking"}, "problem_type must be one of"),
    ],
)
def test_what_would_change_the_maths_is_refused(
    folder: Path, values: dict[str, Any], message: str
) -> None:
    if "rope_scaling" in values:
        change_config(folder, rope_parameters=None)
    change_config(folder, **values)
    with pytest.raises(ConfigError, match=message):
        models.from_pretrained(folder)


def test_harmless_keys_find_the_way_back(folder: Path) -> None:
    kept = {"eos_token_id": [1, 2], "_name_or_path": "somewhere", "new_feature": False}
    change_config(folder, **kept, id2label={"0": "bad", "1": "good", "2": "best"})
    model = models.from_pretrained(folder)
    assert model.config.num_labels == 3
    model.save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    assert written.items() >= kept.items()
    assert written["id2label"]["2"] == "best"
    assert written["label2id"] == {"bad": 0, "good": 1, "best": 2}
    assert written["architectures"] == ["LlamaForCausalLM"]


def test_older_names_of_rotary_positions(folder: Path) -> None:
    scaling = {"type": "linear", "factor": 2.0}
    config = LlamaConfig.from_dict({**SIZES, "rope_theta": 500.0, "rope_scaling": scaling})
    assert config.rope_parameters == {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
    change_tensors(
        folder,
        lambda tensors: tensors.update(
            {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
        ),
    )
    assert same_parameters(models.from_pretrained(folder), llama())


def test_a_reward_model_of_a_language_model(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"lacks: score\.weight; .*: lm_head\.weight"):
        LlamaForSequenceClassification.from_pretrained(folder)
    model = LlamaForSequenceClassification.from_pretrained(folder, except_for=["score", "lm_head"])
    assert same_parameters(model.model, llama().model)
    assert 0 < model.score.weight.std() < 0.1
    assert torch.isfinite(model(TOKENS).logits).all()


def test_bodies_are_read_from_heads_and_heads_from_bodies(folder: Path, tmp_path: Path) -> None:
    body = LlamaModel.from_pretrained(folder, except_for=["lm_head"])
    assert same_parameters(body, llama().model)

    sizes = {"vocab_size": 16, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
    gpt2 = GPT2LMHeadModel(GPT2Config(**sizes))
    gpt2.transformer.save_pretrained(tmp_path / "gpt2")
    assert type(models.from_pretrained(tmp_path / "gpt2")) is GPT2Model

    def as_first_released(tensors: dict[str, torch.Tensor]) -> None:
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)

    change_tensors(tmp_path / "gpt2", as_first_released)
    change_config(tmp_path / "gpt2", architectures=["GPT2LMHeadModel"], n_ctx=8)
    assert same_parameters(models.from_pretrained(tmp_path / "gpt2"), gpt2)


def test_a_checkpoint_without_architectures_is_a_language_model(folder: Path) -> None:
    change_config(folder, architectures=None)
    assert type(models.from_pretrained(folder)) is LlamaForCausalLM


def test_writing_that_fails_leaves_what_was_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(safetensors, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        llama(hidden_size=16).save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_without_safetensors_the_extra_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for call in (lambda: models.from_pretrained(folder), lambda: llama().save_pretrained(folder)):
        with pytest.raises(ImportError, match=r'pip install "fastattn\[models\]"'):
            call()


def test_the_wrong_configuration_is_refused() -> None:
    with pytest.raises(TypeError, match="config must be a LlamaConfig, got GPT2Config"):
        LlamaForCausalLM(GPT2Config())  # type: ignore[arg-type]


def test_families_are_imported_when_asked_for() -> None:
    code = (
        "import sys, fastattn\n"
        "assert 'fastattn.models' not in sys.modules\n"
        "import fastattn.models\n"
        "assert 'fastattn.models.llama' not in sys.modules\n"
        "assert fastattn.models.Qwen3Config.model_type == 'qwen3'\n"
        "assert fastattn.models.gpt2.GPT2Config is fastattn.models.GPT2Config\n"
        "assert not hasattr(fastattn.models, 'LlamaForPoetry')\n"
        "assert 'safetensors' not in sys.modules\n"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)


@pytest.mark.parametrize("kind", models.FAMILIES)
def test_every_family_has_a_class_for_its_type(kind: str) -> None:
    chosen = models.model_class({"model_type": kind})
    assert chosen.config_class.model_type == kind
    assert getattr(models, chosen.__name__) is chosen
