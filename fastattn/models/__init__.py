"""Families of models on fastattn's blocks, with Hugging Face's parameter names.

`from_pretrained(folder)` reads any of them from a local checkpoint; each family is a module of its
own (`fastattn.models.llama`, ...) with its configuration and its heads, which are also names of
this module. A family is imported when one of its names is first asked for.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch

from ._base import Model
from ._checkpoint import CheckpointError, read_config
from ._config import Config, ConfigError
from ._outputs import Output

FAMILIES = {
    "bart": "bart",
    "bert": "bert",
    "deepseek_v3": "deepseek",
    "gemma": "gemma",
    "gemma2": "gemma",
    "gpt2": "gpt2",
    "gpt_oss": "gpt_oss",
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "mixtral",
    "qwen2": "llama",
    "qwen3": "llama",
    "qwen3_moe": "mixtral",
    "switch_transformers": "switch",
    "t5": "t5",
    "vit": "vit",
}
"""The module of each model_type. Its `MODELS` are the classes that checkpoints are read into."""

__all__ = ["FAMILIES", "CheckpointError", "Config", "ConfigError", "Model", "Output"]
__all__ += ["from_pretrained", "model_class"]


def model_class(config: dict[str, Any]) -> type[Model]:
    """The class for the content of a config.json, by its model_type and its architectures.

    Raises:
        ConfigError: there is no such family or head here.
    """
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise ConfigError(f"model_type must be one of {', '.join(FAMILIES)}, got {kind!r}")
    models = import_module(f".{FAMILIES[kind]}", __name__).MODELS
    classes = {model.__name__: model for model in models if model.config_class.model_type == kind}
    names = config.get("architectures") or [next(iter(classes))]
    if len(names) != 1 or names[0] not in classes:
        raise ConfigError(
            f"architectures must be one of {', '.join(classes)} for {kind}, got {names!r}"
        )
    return classes[names[0]]


def from_pretrained(
    folder: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    except_for: Sequence[str] = (),
    ignore: Sequence[str] = (),
) -> Model:
    """Read the model in a folder, of the family and with the head that its config.json names.

    Arguments, result and errors are those of `Model.from_pretrained`.
    """
    chosen = model_class(read_config(folder))
    return chosen.from_pretrained(
        folder, device=device, dtype=dtype, except_for=except_for, ignore=ignore
    )


def __getattr__(name: str) -> Any:
    if name in FAMILIES.values():
        return import_module(f".{name}", __name__)
    for kind, family in FAMILIES.items():
        if name.lower().startswith(kind.replace("_", "")):
            module = import_module(f".{family}", __name__)
            if name in vars(module):
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
