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
    """Text in one file, of which the last bytes are kept for validation and never trained on.

    `prompt` is what a model of this text is asked to continue.
    """

    path: str
    source: str
    prompt: str
    files: int
    train_bytes: int
    validation_bytes: int


def gather_corpus(source: Path | None, target: Path, *, shortest_split: int) -> Corpus:
    """Write text into the file `target`: a file's, a folder's, or that of Python's own modules.

    Training and validation need `shortest_split` bytes each.
    """
    prompt, name = "\n", str(source)
    if source is None:
        prompt, name = "\n\nclass ", "Python's standard library"
        texts = read_texts(Path(sysconfig.get_path("stdlib")), "*.py")
    else:
        texts = read_texts(source, "*") if source.is_dir() else iter([source.read_bytes()])
    with target.open("wb") as corpus:
        sizes = [corpus.write(text) for text in texts]

    total = sum(sizes)
    validation = int(total * VALIDATION_SHARE)
    if validation < shortest_split:
        needed = int(shortest_split / VALIDATION_SHARE) + 1
        raise DemoError(
            f"{name} has {total:,} bytes of text, and this context length needs {needed:,} at least"
        )
    return Corpus(str(target), name, prompt, len(sizes), total - validation, validation)


def read_texts(folder: Path, pattern: str) -> Iterator[bytes]:
    """The text files below a folder that can be read, in an order that is always the same."""
    outside = {"site-packages", "dist-packages", "__pycache__"}
    paths = [
        path
        for path in sorted(folder.rglob(pattern))
        if path.is_file() and outside.isdisjoint(path.relative_to(folder).parts)
    ]
    # Sorted, the last files, which validate, would be one corner of the folder, unlike the rest.
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
    """Batches of random windows of a text, the same ones for the same seed on every device.

    A task may draw from the generator too, which is the object's own.
    """

    def __init__(self, tokens: Tensor, context: int, batch: int, seed: int) -> None:
        self._tokens, self._offsets, self._batch = tokens, torch.arange(context), batch
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self) -> Tensor:
        """Windows of bytes, int64 (batch, context)."""
        starts = len(self._tokens) - len(self._offsets) + 1
        start = torch.randint(starts, (self._batch, 1), generator=self.generator)
        return self._tokens[start + self._offsets].long()
