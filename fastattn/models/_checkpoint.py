"""Checkpoints as Hugging Face's models have them: a folder with config.json and safetensors."""

from __future__ import annotations

import importlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SAME = "fastattn.same"
"""The key under which a file's metadata has the tensors that were one, as JSON."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be read as it is; the message names the file and what is wrong."""


class Packed(NamedTuple):
    """A tensor that a checkpoint does not have as it is, but others that it is made of."""

    parts: dict[str, Path]
    """Their names, and the files that hold them."""
    restore: Callable[..., torch.Tensor]
    """Called with the parts, in this order, and with the dtype."""
    dtype: torch.dtype
    """The dtype, if none is asked for."""


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a folder, of which nothing but names and shapes has been read.

    Attributes:
        folder: where they are.
        files: the name of each tensor, and the file that holds it.
        shapes: the name of each tensor, and its shape.
        same: names of tensors that were one with another when they were written, and of that one.
        packed: the names of tensors that have to be restored when they are read.
    """

    folder: Path
    files: dict[str, Path]
    shapes: dict[str, tuple[int, ...]]
    same: dict[str, str] = field(default_factory=dict)
    packed: dict[str, Packed] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Checkpoint:
        """Look into `model.safetensors`, or into the files of `model.safetensors.index.json`.

        Raises:
            ImportError: safetensors is not installed.
            CheckpointError: a file is missing, damaged, or not what the index says.
        """
        folder = Path(folder)
        if (folder / WEIGHTS).exists():
            shapes = _read_shapes(folder / WEIGHTS)
            files = dict.fromkeys(shapes, folder / WEIGHTS)
            return cls(folder, files, shapes, _read_same(folder / WEIGHTS))
        if not (folder / INDEX).exists():
            others = ", ".join(sorted(path.name for path in folder.glob("*.bin")))
            found = f"; {others} can be converted by transformers" if others else ""
            raise CheckpointError(f"{folder} has neither {WEIGHTS} nor {INDEX}{found}")
        places = _read_json(folder / INDEX).get("weight_map")
        if not isinstance(places, dict):
            raise CheckpointError(f"{folder / INDEX} has no weight_map")
        shapes: dict[str, tuple[int, ...]] = {}
        for name in sorted(set(places.values())):
            path = folder / name
            inside = _read_shapes(path)
            expected = {tensor for tensor, file in places.items() if file == name}
            if inside.keys() != expected:
                wrong = ", ".join(sorted(inside.keys() ^ expected))
                raise CheckpointError(f"{path} and {INDEX} disagree about {wrong}")
            shapes |= inside
        return cls(folder, {name: folder / file for name, file in places.items()}, shapes)

    def read(
        self, wanted: Mapping[str, str], device: torch.device, dtype: torch.dtype | None
    ) -> dict[str, torch.Tensor]:
        """Read tensors onto a device, in the dtype given or else as they are stored.

        Args:
            wanted: the name that each tensor is to have, by its name in the checkpoint. Several
                may have one name, and are then to be equal.

        Raises:
            CheckpointError: a file is damaged, or tensors that are to have one name differ.
        """
        found: dict[str, torch.Tensor] = {}
        for path in sorted({self.files[stored] for stored in wanted}):
            with _open(path) as tensors:
                for stored, name in wanted.items():
                    if self.files[stored] == path:
                        if stored in self.packed:
                            tensor = self._restore(stored, path, tensors, device, dtype)
                        else:
                            tensor = tensors.get_tensor(stored).to(device)
                        floats = dtype is not None and tensor.is_floating_point()
                        tensor = tensor.to(dtype) if floats else tensor
                        earlier = found.setdefault(name, tensor)
                        if earlier is not tensor and not torch.equal(earlier, tensor):
                            raise CheckpointError(
                                f"{path}: {stored} differs from another tensor that is {name} too"
                            )
        return found

    def refuse(self, model: str, faults: Mapping[str, list[str]]) -> None:
        """Raise CheckpointError if anything is wrong with it for a model, kind by kind."""
        told = [f"{what}: {', '.join(sorted(which))}" for what, which in faults.items() if which]
        if told:
            raise CheckpointError(f"{self.folder} does not fit {model}: {'; '.join(told)}")

    def _restore(
        self, name: str, path: Path, tensors: Any, device: torch.device, dtype: torch.dtype | None
    ) -> torch.Tensor:
        """A tensor made of its parts, of which those of the file at `path` are in `tensors`."""
        packed, parts = self.packed[name], list[torch.Tensor]()
        for part, file in packed.parts.items():
            if file == path:
                parts.append(tensors.get_tensor(part).to(device))
                continue
            with _open(file) as others:
                parts.append(others.get_tensor(part).to(device))
        try:
            return packed.restore(*parts, dtype or packed.dtype)
        except TypeError as error:
            raise CheckpointError(f"{path}: {name} cannot be restored: {error}") from error


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of a folder's config.json.

    Raises:
        CheckpointError: there is none, or it is no JSON object.
    """
    if Path(folder).is_file():
        raise CheckpointError(f"{folder} is a file; give the folder that it is in")
    return _read_json(Path(folder) / CONFIG)


def write(
    folder: str | os.PathLike[str],
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    same: Mapping[str, str],
) -> None:
    """Write config.json and model.safetensors, each replaced only by a complete new file.

    Args:
        folder: where to.
        config: the content of config.json.
        tensors: those to write. Of memory that several of them share, each gets a copy.
        same: names of tensors that are one with another, and of that one.

    Raises:
        ImportError: safetensors is not installed.
        OSError: a file cannot be written, as on a full disk.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    safetensors = _safetensors()
    stored: dict[str, torch.Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        stored[name] = tensor.detach().cpu().contiguous()
        storage = stored[name].untyped_storage().data_ptr()
        if storage in storages:
            stored[name] = stored[name].clone()
        storages.add(storage)
    # transformers does not read a file that does not say which framework wrote it.
    metadata = {"format": "pt", **({SAME: json.dumps(dict(same))} if same else {})}
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=folder) as scratch:
        try:
            safetensors.torch.save_file(stored, Path(scratch) / WEIGHTS, metadata=metadata)
        except safetensors.SafetensorError as error:
            raise OSError(f"{folder / WEIGHTS} cannot be written: {error}") from error
        text = json.dumps(dict(config), indent=2, sort_keys=True) + "\n"
        (Path(scratch) / CONFIG).write_text(text, encoding="utf-8")
        for name in (WEIGHTS, CONFIG):
            os.replace(Path(scratch) / name, folder / name)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is not there") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return content


def _safetensors() -> Any:
    """The package, which the library does without until a checkpoint is read or written."""
    try:
        importlib.import_module("safetensors.torch")
    except ImportError as error:
        raise ImportError(
            'checkpoints need the package safetensors: pip install "fastattn[models]"'
        ) from error
    return importlib.import_module("safetensors")


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(path, framework="pt") as tensors:
            yield tensors
    except FileNotFoundError:
        raise CheckpointError(f"{path} is not there") from None
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is damaged or cut short: {error}") from error


def _read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    with _open(path) as tensors:
        names: list[str] = tensors.keys()
        return {name: tuple(tensors.get_slice(name).get_shape()) for name in names}


def _read_same(path: Path) -> dict[str, str]:
    """The names that `write` was given as `same`."""
    with _open(path) as tensors:
        return json.loads((tensors.metadata() or {}).get(SAME, "{}"))
