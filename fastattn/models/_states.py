"""What is asked of parameters before they are written, and of a dtype before they are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn as nn

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)
}
"""What parameters may be cast to, by name."""


def choose_dtype(
    dtype: torch.dtype | str | None, config: Mapping[str, Any] | None = None
) -> torch.dtype | None:
    """The dtype that an argument names, by the content of a config.json if that is "auto".

    Raises:
        ValueError: it names none that parameters can have.
    """
    if dtype == "auto":
        config = config or {}
        dtype = config.get("dtype") or config.get("torch_dtype")
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype must be None, 'auto' or one of {', '.join(DTYPES)}, got {dtype!r}")
    return DTYPES[name]


def find_class(model: nn.Module) -> type:
    """The class that a model was made of, also where FSDP2 has derived one from it."""
    return next(kind for kind in type(model).__mro__ if not kind.__module__.startswith("torch."))


def check_writable(model: Any, state: Mapping[str, torch.Tensor]) -> None:
    """A file can hold these tensors, and whoever reads it makes the same model of them.

    Raises:
        ValueError: parameters are sharded, or not those of a model of this configuration.
    """
    adapted = sorted({n.rpartition(".")[0] for n in state if n.endswith((".lora_A", ".lora_B"))})
    if adapted:
        raise ValueError(
            f"save_pretrained: {', '.join(adapted)} are adapted by LoRA; merge them first by "
            "fastattn.nn.merge_lora(model), or save fastattn.nn.lora_state_dict(model)"
        )
    sharded = sorted(name for name, tensor in state.items() if hasattr(tensor, "full_tensor"))
    if sharded:
        raise ValueError(
            f"save_pretrained: {', '.join(sharded[:3])} and others are sharded; gather them on "
            "all ranks by torch.distributed.checkpoint.state_dict.get_model_state_dict(model, "
            "options=StateDictOptions(full_state_dict=True, cpu_offload=True)), and pass what it "
            "gives to save_pretrained(folder, state_dict=...) on the first"
        )
    kind = find_class(model)
    with torch.device("meta"):
        fresh = kind(model.config)
    own = {name: tuple(tensor.shape) for name, tensor in fresh.state_dict().items()}
    faults = [
        name if name not in own else f"{name} of shape {tuple(tensor.shape)}, not {own[name]}"
        for name, tensor in state.items()
        if own.get(name) != tuple(tensor.shape)
    ]
    if faults:
        raise ValueError(
            f"save_pretrained: a {kind.__name__} of this configuration does not have "
            f"{'; '.join(faults)}. What has been replaced or resized must be such as the "
            "configuration says, or be saved by torch.save(model.state_dict(), ...)"
        )


def same_tensors(model: nn.Module) -> dict[str, str]:
    """Names of parameters that are one with an earlier one, and that one's name."""
    named = model.named_parameters(remove_duplicate=False)
    identities = {name: _identity(parameter) for name, parameter in named}
    first: dict[Any, str] = {}
    for name, identity in identities.items():
        first.setdefault(identity, name)
    return {name: first[one] for name, one in identities.items() if first[one] != name}


def _identity(tensor: torch.Tensor) -> Any:
    """What two names have in common that are one tensor, also through `.data`."""
    if type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.is_meta or not tensor.numel():
        return id(tensor)
    return tensor.data_ptr(), tensor.dtype, tensor.device, tuple(tensor.shape), tensor.stride()
