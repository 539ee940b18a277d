"""The text that the demo trains on, as bytes, and the windows that are drawn from it."""

from __future__ import annotations

import contextlib
import random
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import DemoError

VALIDATION_SHARE = 0.05


@dataclass(frozen=True)
class Corpus:
    """Text gathered into one file: where it came from and how it is split.

    The last bytes of the file are kept for validation and never trained on. `prompt` is what a
    model of this text is asked to continue.
    """

    path: str
    source: str
    prompt: str
    files: int
    train_bytes: int
    validation_bytes: int


def gather_corpus(source: Path | None, target: Path, *, shortest_split: int) -> Corpus:
    """Write the text of `source` into the file `target`.

    Args:
        source: a file, taken as it is; a folder, of which every text file is taken; or None for
            the modules of Python's own standard library as installed here.
        target: the file to write.
        shortest_split: the number of bytes that training and validation each need.

    Raises:
        OSError: if the source cannot be read or the target cannot be written.
        DemoError: if there is too little text.
    """
    prompt, name = "\n", str(source)
    if source is None:
        prompt, name = "\n\nclass ", "Python's standard library"
        texts = _texts_in_folder(Path(sysconfig.get_path("stdlib")), "*.py")
    elif source.is_dir():
        texts = _texts_in_folder(source, "*")
    else:
        texts = iter([source.read_bytes()])

    files = total = 0
    with target.open("wb") as corpus:
        for text in texts:
            total += corpus.write(text)
            files += 1

    validation = int(total * VALIDATION_SHARE)
    if validation < shortest_split:
        needed = int(shortest_split / VALIDATION_SHARE) + 1
        raise DemoError(
            f"{name} has {total:,} bytes of text, and this context length needs {needed:,} at least"
        )
    return Corpus(str(target), name, prompt, files, total - validation, validation)


def _texts_in_folder(folder: Path, pattern: str) -> Iterator[bytes]:
    """Yield the readable text files below `folder` in an order that is always the same.

    The sorted files are shuffled with a fixed seed, because the end of the corpus is the
    validation split: in sorted order that would be one corner of the folder, unlike the rest.
    """
    outside = {"site-packages", "dist-packages", "__pycache__"}
    paths = [
        path
        for path in sorted(folder.rglob(pattern))
        if path.is_file() and outside.isdisjoint(path.relative_to(folder).parts)
    ]
    random.Random(0).shuffle(paths)
    for path in paths:
        with contextlib.suppress(PermissionError, UnicodeDecodeError):
            content = path.read_bytes()
            if "\0" not in content.decode("utf-8"):
                yield content


def load_splits(corpus: Corpus) -> tuple[Tensor, Tensor]:
    """Map the corpus into memory as two uint8 tensors, for training and for validation."""
    size = corpus.train_bytes + corpus.validation_bytes
    tokens = torch.from_file(corpus.path, shared=False, size=size, dtype=torch.uint8)
    return tokens[: corpus.train_bytes], tokens[corpus.train_bytes :]


class Windows:
    """Batches of random windows of a text, the same ones for the same seed.

    The generator is the object's own and lives on the CPU, so nothing that a model draws, and no
    choice of device, can change which windows come. A task may draw from it too.
    """

    def __init__(self, tokens: Tensor, context: int, batch: int, seed: int) -> None:
        self._tokens = tokens
        self._offsets = torch.arange(context)
        self._batch = batch
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self) -> Tensor:
        """Return windows of bytes, an int64 tensor of shape (batch, context)."""
        starts = len(self._tokens) - len(self._offsets) + 1
        start = torch.randint(starts, (self._batch, 1), generator=self.generator)
        return self._tokens[start + self._offsets].long()
