"""Folders as they are published: their configurations, dtypes, and what is wrong with some."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import CLASSES, SIZES, batch_of, small, unlabelled

from fastattn import models
from fastattn.models import CheckpointError, ConfigError
from fastattn.models.llama import LlamaConfig
from fastattn.nn.rotary import FREQUENCIES
from fastattn.ops.core.backends import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="runs the reference backend")
safetensors = pytest.importorskip("safetensors.torch")

# What others write into config.json beside what a model is made of.
PUBLISHED: dict[str, Any] = {
    "cache_implementation": "hybrid",
    "is_llama_config": True,
    "max_new_tokens": 40,
    "min_p": 0.1,
    "sentence_transformers": {"version": "4.1.0", "activation_fn": "torch.nn.Sigmoid"},
    "tokenizer_model_max_length": 2048,
    "tokenizer_padding_side": "right",
    "transformers.js_config": {"dtype": "q4", "kv_cache_dtype": {"fp16": "float16"}},
    "unsloth_fixed": True,
    "unsloth_version": "2026.1.1",
}
KINDS = {kind.config_class.model_type: kind for kind in reversed(CLASSES.values())}
kinds = pytest.mark.parametrize("kind", KINDS)


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    kept = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({name: value for name, value in kept.items() if value is not ...}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Llama in bfloat16."""
    small("LlamaForCausalLM", torch.bfloat16).save_pretrained(tmp_path)
    return tmp_path


@kinds
def test_keys_that_change_nothing(kind: str) -> None:
    config_class = KINDS[kind].config_class
    config = config_class.from_dict({**SIZES[kind], **PUBLISHED})
    assert config == config_class(**SIZES[kind])
    assert config.to_dict().items() >= PUBLISHED.items()


@kinds
def test_other_keys_are_refused_unless_they_are_ignored_by_name(kind: str, tmp_path: Path) -> None:
    model = small(KINDS[kind].__name__)
    model.save_pretrained(tmp_path)
    change_config(tmp_path, residual_multiplier=0.2, my_note="x", nothing=None)
    message = (
        r"may change what the model computes: my_note='x', residual_multiplier=0\.2\. If you know "
        r"that it does not: from_pretrained\(\.\.\., ignore=\['my_note', 'residual_multiplier'\]\)"
    )
    for read in (models.from_pretrained, KINDS[kind].from_pretrained):
        with pytest.raises(ConfigError, match=message):
            read(tmp_path)
        with pytest.raises(ConfigError, match=r"computes: residual_multiplier=0\.2\. If"):
            read(tmp_path, ignore="my_note")
        found = read(tmp_path, ignore=["my_note", "residual_multiplier", "not_there"])
        for name, tensor in model.state_dict().items():
            assert torch.equal(found.state_dict()[name], tensor)
        with pytest.raises(ConfigError, match="num_labels cannot be ignored, for the model"):
            read(tmp_path, ignore=["my_note", "residual_multiplier", "num_labels"])


MAX_POSITIONS = 16
SCALINGS: dict[str, dict[str, Any]] = {
    "dynamic with its length": {
        "type": "dynamic",
        "factor": 2.0,
        "original_max_position_embeddings": 8,
    },
    "linear with its length": {
        "type": "linear",
        "factor": 4.0,
        "original_max_position_embeddings": 4,
    },
    "yarn, finetuned": {
        "type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 4,
        "finetuned": True,
    },
    "yarn with what is not set": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 4,
        "attention_factor": None,
        "long_factor": None,
        "finetuned": False,
    },
    "yarn without its length": {"rope_type": "yarn", "factor": 4.0},
    "yarn with no length": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": MAX_POSITIONS,
    },
    "default with a factor": {"type": "default", "factor": 1.0},
}


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2"])
def test_scaled_rotary_positions_are_those_of_transformers(
    name: str, scaling: dict[str, Any], tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    model: Any = small(f"{name}ForCausalLM", torch.float32)
    model.save_pretrained(tmp_path)
    older = {"rope_parameters": ..., "rope_theta": 500.0, "rope_scaling": copy.deepcopy(scaling)}
    change_config(tmp_path, **older)
    ours: Any = models.from_pretrained(tmp_path)
    theirs = getattr(transformers, f"{name}ForCausalLM").from_pretrained(tmp_path).eval()
    # Within what the tables are for, and beyond it, where dynamic scaling begins.
    for length in (6, 40):
        rotary, found = theirs.model.rotary_emb, ours.model.rotary_emb
        rotary(torch.zeros(1), torch.arange(length)[None])
        frequencies, factor = FREQUENCIES[found.scaling["rope_type"]](
            found.dim, found.base, found.scaling, found.max_positions, length
        )
        assert torch.equal(frequencies, rotary.inv_freq)
        assert factor == rotary.attention_scaling
        ids = unlabelled(ours, batch_of(ours, length=length))
        with torch.no_grad():
            expected = theirs(**ids).logits
            torch.testing.assert_close(ours(**ids).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "default", "factor": 2.0}, "default scaling has no factor"),
        ({"rope_type": "linear", "factor": 2.0, "stretch": 3}, "linear scaling has no stretch"),
        ({"rope_type": "yarn"}, "yarn scaling needs factor"),
    ],
)
def test_scalings_that_may_be_mathematics_are_refused(
    scaling: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        models.LlamaForCausalLM(LlamaConfig(**SIZES["llama"], rope_parameters=scaling))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes_by_name(dtype: torch.dtype, folder: Path) -> None:
    for given in (dtype, str(dtype), str(dtype).removeprefix("torch.")):
        model = models.from_pretrained(folder, dtype=given)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        expected = models.from_pretrained(folder).to(dtype).state_dict()
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, expected[name]), name


def test_the_dtype_that_is_written_or_stored(folder: Path) -> None:
    def dtypes(**options: Any) -> set[torch.dtype]:
        return {p.dtype for p in models.from_pretrained(folder, **options).parameters()}

    assert dtypes() == {torch.bfloat16}
    assert dtypes(dtype="auto") == {torch.bfloat16}
    change_config(folder, dtype="float16")
    assert dtypes() == {torch.bfloat16}
    assert dtypes(dtype="auto") == {torch.float16}
    change_config(folder, dtype=..., torch_dtype="float32")
    assert dtypes(dtype="auto") == {torch.float32}
    change_config(folder, torch_dtype=...)
    assert dtypes(dtype="auto") == {torch.bfloat16}
    for wrong in ("half precision", torch.int8, "int8", 16):
        with pytest.raises(ValueError, match=r"dtype must be None, 'auto' or one of bfloat16, .*"):
            dtypes(dtype=wrong)


def test_folders_that_are_none(folder: Path, tmp_path: Path) -> None:
    for file in (folder / "model.safetensors", folder / "config.json"):
        with pytest.raises(CheckpointError, match=rf"{file.name} is a file; give the folder"):
            models.from_pretrained(file)
        with pytest.raises(CheckpointError, match=rf"{file.name} is a file; give the folder"):
            models.LlamaForCausalLM.from_pretrained(file)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(CheckpointError, match=r"empty/config\.json is not there"):
        models.from_pretrained(empty)
    shutil.copy(folder / "config.json", empty)
    with pytest.raises(CheckpointError, match=r"empty has neither model\.safetensors nor .*json$"):
        models.from_pretrained(empty)
    (empty / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin can be converted by transf"):
        models.from_pretrained(empty)


def test_one_name_to_be_excepted(folder: Path) -> None:
    model = models.LlamaForSequenceClassification.from_pretrained(
        folder, except_for=["score", "lm_head"]
    )
    body = models.LlamaModel.from_pretrained(folder, except_for="lm_head")
    assert torch.equal(body.norm.weight, model.model.norm.weight)
