"""Data sets in EDM's format: a zip, or a folder, of PNG images with their labels in ``dataset.json``.

    imagenet-64x64.zip                 what NVlabs/edm's ``dataset_tool.py`` writes; the same tree unpacked is read as well
      00000/img00000000.png            images of one size, RGB or grey; their rows are their places in sorted order of names
      dataset.json                     {"labels": [["00000/img00000000.png", 5], ...]}, or {"labels": null}

Nothing is unpacked to disk, and nothing else may be in there. Whoever plans a run identifies a data set by its bytes
(:func:`files.digest_tree`).
"""

from __future__ import annotations

import io
import json
import os
import stat
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from distillbench.errors import UserError
from distillbench.identity import derive_seed
from distillbench.training.data import Batch, Batches, Request, epoch_rows

LABELS = "dataset.json"
MODES = {1: "L", 3: "RGB"}


class EDMImages:
    """The images of a zip or folder, decoded on demand. May be sent to other processes; each opens the zip for itself.

    Attributes:
        names: of the images, sorted.  labels: (N,) int64; 0 everywhere where ``classes`` is 0.

    Args:
        path: the zip or folder.  resolution: side of every image.  channels: 3 (RGB) or 1 (grey).
        classes: labels must lie below it; 0 for a data set used without labels.

    Raises:
        UserError: nothing is there, no zip, a name that leaves the folder, a link, a file that is neither image nor labels,
            no image, or an image without a label from 0 to ``classes`` - 1.
    """

    def __init__(self, path: Path, resolution: int, classes: int = 0, channels: int = 3) -> None:
        self.path, self.resolution, self.channels = path, resolution, channels
        self._zip: tuple[int, zipfile.ZipFile] | None = None
        self._packed = not path.is_dir()
        members = set(self._members())
        self.names = sorted(m for m in members if m != LABELS)
        if not self.names:
            raise UserError(f"{path}: no images in it; write it with EDM's dataset_tool.py")
        self.labels = self._labels(LABELS in members, classes) if classes else torch.zeros(len(self.names), dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.names)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_zip": None}

    def image(self, row: int) -> Tensor:
        """The pixels of one image, (C, S, S) uint8.

        Raises:
            UserError: it cannot be decoded, or has another size or mode; one line that names it.
        """
        name, side = self.names[row], self.resolution
        blob = self._read(name, 8 * side * side * self.channels + 2**16)
        try:
            with Image.open(io.BytesIO(blob), formats=["PNG"]) as image:
                size, mode = image.size, image.mode
                pixels = np.array(image) if (size, mode) == ((side, side), MODES[self.channels]) else None
        except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:  # decoders raise all of these
            raise UserError(f"{self.path}: {name} is not a readable PNG ({_line(error)}); write the data set again") from error
        if pixels is None:
            raise UserError(
                f"{self.path}: {name} is {size[0]}x{size[1]} {mode} where {side}x{side} {MODES[self.channels]} is expected; "
                f"write the data set with EDM's dataset_tool.py --resolution={side}x{side}"
            )
        return torch.from_numpy(pixels).view(side, side, self.channels).permute(2, 0, 1).contiguous()

    # --- files

    def _archive(self) -> zipfile.ZipFile:
        # A handle shared with a forked process would share its file position too.
        if self._zip is None or self._zip[0] != os.getpid():
            try:
                self._zip = os.getpid(), zipfile.ZipFile(self.path)
            except (OSError, zipfile.BadZipFile) as error:
                reason = getattr(error, "strerror", None) or error
                raise UserError(f"{self.path}: not a readable zip or folder ({_line(reason)}); put the data set there") from error
        return self._zip[1]

    def _members(self) -> Iterator[str]:
        """All files, checked one by one."""
        if self._packed:
            for info in self._archive().infolist():
                if not info.is_dir():
                    yield self._checked(info.filename, stat.S_ISLNK(info.external_attr >> 16), bool(info.flag_bits & 1))
            return
        waiting = [self.path]
        while waiting:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(Path(entry.path))
                    else:
                        yield self._checked(Path(entry.path).relative_to(self.path).as_posix(), entry.is_symlink(), False)

    def _checked(self, name: str, link: bool, encrypted: bool) -> str:
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts or "\\" in name or ":" in name:
            raise UserError(f"{self.path}: refused, its member {name!r} leaves the folder; write the data set with EDM's dataset_tool.py")
        if link or encrypted:
            raise UserError(f"{self.path}: refused, its member {name!r} is {'a link' if link else 'encrypted'}; put the file itself there")
        if name != LABELS and parts.suffix != ".png":
            raise UserError(f"{self.path}: refused, its member {name!r} is neither a .png image nor {LABELS}; remove it")
        return name

    def _read(self, name: str, limit: int) -> bytes:
        try:
            with self._archive().open(name) if self._packed else (self.path / name).open("rb") as stream:
                blob = stream.read(limit + 1)
        except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError) as error:
            raise UserError(f"{self.path}: {name} cannot be read ({_line(error)}); write the data set again") from error
        if len(blob) > limit:
            raise UserError(f"{self.path}: refused, {name} holds more than {limit} bytes; write the data set again")
        return blob

    def _labels(self, there: bool, classes: int) -> Tensor:
        where = f"{self.path}: {LABELS}"
        mend = f"write the data set with EDM's dataset_tool.py from a source with {classes} classes"
        if not there:
            raise UserError(f"{where} is missing, so there are no labels; {mend}")
        try:
            pairs = json.loads(self._read(LABELS, 2**30))["labels"]
            table = {str(name): label for name, label in pairs}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f'{where} is not {{"labels": [[name, class], ...]}}; {mend}') from error
        for name in self.names:
            label = table.get(name)
            if type(label) is not int or not 0 <= label < classes:
                raise UserError(f"{where} gives {name} the label {label!r}, not one from 0 to {classes - 1}; {mend}")
        return torch.tensor([table[name] for name in self.names])


def _line(error: object) -> str:
    return " ".join(str(error).split())[:120]


# --- batches ----------------------------------------------------------------------------------------------------


def flipped(seed: int, epoch: int, row: int) -> bool:
    """Whether image ``row`` is mirrored in ``epoch``: a fair coin that depends on these three numbers alone."""
    return derive_seed(f"flip {epoch} {row}", seed) % 2 == 1


class _Views(Dataset[Any]):
    """Images by (epoch, row); a bad one comes back as a value, because a worker would wrap the raised one in its traceback."""

    def __init__(self, images: EDMImages, seed: int | None) -> None:
        self.images, self.seed = images, seed

    def __getitem__(self, wanted: tuple[int, int]) -> tuple[Tensor, int] | UserError:
        epoch, row = wanted
        try:
            pixels = self.images.image(row)
        except UserError as error:
            return UserError(str(error))  # without the cause, which may not be picklable
        return (pixels.flip(2) if self.seed is not None and flipped(self.seed, epoch, row) else pixels), row


def _collate(examples: list[tuple[Tensor, int] | UserError]) -> tuple[Tensor, Tensor] | UserError:
    good = []
    for example in examples:
        if isinstance(example, UserError):
            return example
        good.append(example)
    pixels, rows = zip(*good, strict=True)
    return torch.stack(pixels), torch.tensor(rows)


@dataclass(frozen=True)
class FolderBatches(Batches[Batch]):
    """Epochs over :class:`EDMImages`. Batches depend on (seed, position) alone, not on ``workers``.

    Each epoch is a permutation drawn from (seed, epoch); short tails are dropped. Inputs are float32 (B, C, S, S) in [-1, 1]:
    uint8 / 127.5 - 1.

    Attributes:
        batch_size: with fewer images than that, a batch holds all of them.
        flip: mirror each image with probability one half, see :func:`flipped`.
        workers: decoding processes, which read ahead; 0 decodes here.
        chosen: (M,) int64, the images to draw from; all by default.
    """

    images: EDMImages
    batch_size: int
    seed: int
    flip: bool = False
    workers: int = 0
    chosen: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    def __post_init__(self) -> None:
        if not len(self.chosen):
            object.__setattr__(self, "chosen", torch.arange(len(self.images)))
        object.__setattr__(self, "batch_size", min(self.batch_size, len(self.chosen)))

    def rows(self, position: int) -> Tensor:
        """Rows of the images."""
        return self.chosen[epoch_rows(len(self.chosen), self.batch_size, self.seed, position)]

    def take(self, request: Request) -> Batch:
        """One batch, decoded here. Raises UserError for an image that cannot be used."""
        return next(self._loaded(iter([request]), 0))

    def load(self, requests: Iterator[Request]) -> Iterator[Batch]:
        """Batches, decoded ahead. Raises UserError for an image that cannot be used."""
        return self._loaded(requests, self.workers)

    def _loaded(self, requests: Iterator[Request], workers: int) -> Iterator[Batch]:
        per_epoch = len(self.chosen) // self.batch_size
        loader = DataLoader(
            _Views(self.images, self.seed if self.flip else None),
            batch_sampler=([(r.position // per_epoch, row) for row in r.rows.tolist()] for r in requests),  # type: ignore[arg-type]
            num_workers=workers,
            collate_fn=_collate,
            generator=torch.Generator().manual_seed(0),  # else the loader draws its workers' base seed from the global generator
        )
        for found in loader:
            if isinstance(found, UserError):
                raise found
            pixels, rows = found
            yield Batch(pixels.float() / 127.5 - 1, self.images.labels[rows], rows, torch.ones(len(rows), dtype=torch.bool))
