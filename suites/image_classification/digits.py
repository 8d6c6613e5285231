"""The embedded settings: scikit-learn's 1,797 real handwritten digits (8x8), with a teacher shipped as safetensors."""

from __future__ import annotations

import copy
import gzip
import io
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import distillbench.suites.image_classification.memory as memory
from distillbench.errors import UserError
from distillbench.identity import derive_seed, sha256
from distillbench.problems.classification.problem import Classification
from distillbench.runs.suite import Context, JudgeContext, TrainContext
from distillbench.suites.image_classification.nets import rebuild
from distillbench.training.data import Arrays
from distillbench.training.nets import Architecture
from distillbench.training.student import Student, tensor_digest

TRAIN, TUNE, TEST = 1197, 200, 400
TEACHER = Path(__file__).parent / "digits_teacher.safetensors"


@dataclass(frozen=True)
class Options:
    """How many training images may be looked at, and how many of them have their label."""

    labelled: int
    transfer: int
    student: Architecture


def load(sha: str | None = None) -> tuple[Tensor, Tensor]:
    """All digits: images (1797, 1, 8, 8) in [-1, 1] and labels (1797,). Not kept: who trains holds its own rows of them and no others.

    Raises:
        UserError: scikit-learn is missing, or carries other bytes than the card pins.
    """
    package = find_spec("sklearn")  # its file alone: importing it takes longer than a training
    path = None if package is None or package.origin is None else Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
    if path is None or not path.is_file():
        raise UserError("the digits come with scikit-learn: pip install 'distillbench[train]'")
    blob = path.read_bytes()
    if sha is not None and sha256(blob) != sha:
        raise UserError("scikit-learn carries other digits than this setting pins; install another release of scikit-learn")
    rows = np.loadtxt(io.BytesIO(gzip.decompress(blob)), delimiter=",")
    images = torch.tensor(rows[:, :-1], dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    return images, torch.tensor(rows[:, -1], dtype=torch.int64)


def partition() -> dict[str, Tensor]:
    """Rows of ``train`` (1197), ``tune`` (200) and ``test`` (400): one fixed split, alike in every class, for all runs."""
    labels = load()[1].numpy()
    rng = np.random.default_rng(derive_seed("digits split", 0))
    order = rng.permutation(len(labels))
    # Deal every class out evenly: sort by (position within the class) so that any prefix is balanced.
    within = np.empty(len(labels), dtype=np.int64)
    for c in range(10):
        rows = np.flatnonzero(labels[order] == c)
        within[rows] = np.arange(len(rows))
    dealt = torch.tensor(order[np.argsort(within, kind="stable")].copy())
    return {"test": dealt[:TEST], "tune": dealt[TEST : TEST + TUNE], "train": dealt[TEST + TUNE :]}


def splits(options: Options, seed: int, sha: str | None, names: Collection[str] = ("train", "tune", "test")) -> dict[str, Arrays]:
    """The setting's splits called ``names``. The labelled and the transfer images are drawn from ``train`` with the run's data seed.

    ``labelled`` images have their label; ``transfer`` images in all (the labelled ones among them) may be looked at.
    """
    images, labels = load(sha)
    parts, made = partition(), {}
    for name in names:
        chosen = rows = parts[name].clone()
        labelled = torch.ones(len(rows), dtype=torch.bool)
        if name == "train":
            generator = torch.Generator().manual_seed(seed)
            shuffled = rows[torch.randperm(len(rows), generator=generator)]
            first = _balanced(labels[shuffled], options.labelled)
            rest = torch.ones(len(rows), dtype=torch.bool)
            rest[first] = False
            chosen = torch.cat([shuffled[first], shuffled[rest]])[: options.transfer]
            labelled = torch.arange(len(chosen)) < options.labelled
        digest = tensor_digest({"inputs": images[chosen], "labels": labels[chosen]})
        made[name] = Arrays(images[chosen], labels[chosen], labelled, digest)
    return made


def classifier(sha: str | None = None) -> nn.Module:
    """The shipped teacher as it was read, shared by all who only look at it. Raises UserError where the file is another one."""
    return _read(TEACHER, sha)


@cache
def _read(path: Path, sha: str | None) -> nn.Module:
    blob = path.read_bytes()
    if sha is not None and sha256(blob) != sha:
        raise UserError(f"{path}: not the teacher the card pins; restore it (git checkout) or reinstall distillbench")
    return rebuild(Student.from_bytes(blob, str(path)))


def _pinned(ctx: Context, role: str) -> str | None:
    asset = ctx.setting.assets.get(role)
    return asset.sha256 if asset is not None else None


def teacher(ctx: Context) -> nn.Module:
    """The shipped teacher. Raises UserError where its file is not the one the card pins."""
    return copy.deepcopy(classifier(_pinned(ctx, "teacher")))


def problem(ctx: TrainContext) -> Classification:
    """What a method gets."""
    options = ctx.options(Options)
    made = splits(options, ctx.seeds["data"], _pinned(ctx, "data"), memory.TUNING if ctx.tuning else memory.TRAINING)
    return memory.problem(ctx, options.student, teacher(ctx), made["train"], made.get("tune"))


def evaluation_batches(ctx: JudgeContext) -> Iterator[tuple[Tensor, Tensor]]:
    """The images of the split."""
    return memory.batches(splits(ctx.options(Options), ctx.seeds["data"], _pinned(ctx, "data"), [ctx.split])[ctx.split])


def _balanced(labels: Tensor, count: int) -> Tensor:
    """Positions of the first ``count`` examples, the same number of each class."""
    per_class = count // 10
    found = [torch.nonzero(labels == c).flatten()[:per_class] for c in range(10)]
    return torch.cat(found).sort().values
