"""The paper settings: EDM's data sets and teachers from the user's folder, judged by FID against published statistics."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distillbench.cards.card import Setting
from distillbench.errors import UserError
from distillbench.runs.record import Measurement
from distillbench.suites.image_generation.image_folders import EDMImages, FolderBatches
from distillbench.suites.image_generation.nets import build
from distillbench.suites.metrics.images.extractors import Extractor, frechet_name, nvidia_inception
from distillbench.suites.metrics.images.frechet import Moments, frechet_distance, load_reference, require_samples
from distillbench.suites.metrics.images.inception_score import inception_score
from distillbench.suites.metrics.images.kid import kid
from distillbench.suites.metrics.images.precision_recall import precision_recall
from distillbench.training.data import Arrays, Batches
from distillbench.training.student import Student


def place(setting: Setting, data: Path | None, role: str) -> Path:
    """Where the user's folder holds ``role``: the first of the card's places that is there. Raises UserError where none is."""
    places = [str(p) for p in setting.options[f"{role}_path"]]
    if data is None:
        raise UserError(f"name the folder that holds {' or '.join(places)} with --data DIR")
    if any(Path(p).is_absolute() or ".." in Path(p).parts for p in places):
        raise UserError(f"the setting looks for {role} outside the folder of data: {', '.join(places)}")
    there = [data / p for p in places if (data / p).exists()]
    if not there:
        raise UserError(f"{data / places[0]}: not found; docs/paper-settings.md says how the folder is laid out")
    return there[0]


def batches(setting: Setting, seeds: Mapping[str, int], data: Path | None) -> tuple[Batches, Arrays | None]:
    """Real images, streamed from disk. What the judge will need is looked for now, and not after days of training."""
    _judge(setting, data)
    options = setting.options
    return FolderBatches(
        _images(setting, data), setting.training.batch_size, seeds["order"], flip=bool(options["flip"]), workers=int(options["workers"])
    ), None


def _images(setting: Setting, data: Path | None) -> EDMImages:
    options = setting.options
    return EDMImages(place(setting, data, "data"), int(options["resolution"]), int(options["classes"]), int(options["channels"]))


def teacher(setting: Setting, data: Path | None) -> nn.Module:
    """The converted teacher. Raises UserError where the file is none."""
    path = place(setting, data, "teacher")
    student = Student.from_bytes(path.read_bytes(), str(path))
    net = build(student.architecture, 0)
    try:
        net.load_state_dict(student.weights)
    except RuntimeError as error:
        raise UserError(f"{path}: its weights do not fit its architecture {student.architecture.name}; convert it again") from error
    return net.eval()


def _judge(setting: Setting, data: Path | None) -> tuple[Extractor, Moments]:
    """The feature network and the reference statistics. Raises UserError where either is missing or not what it should be."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # The published hash and no other: a setting may come from somebody's record, and TorchScript is code.
    extractor = nvidia_inception(place(setting, data, "inception"), resize="tensorflow", device=device)
    reference = load_reference(place(setting, data, "reference"))
    return extractor, reference


def measure(
    draws: Sequence[tuple[Tensor, Tensor]], setting: Setting, seeds: Mapping[str, int], split: str, data: Path | None
) -> list[Measurement]:
    """Judge the draws: FID against the published statistics, and the others against the first real images of the data set.

    The statistics are those of the training set, as the protocol has it, for either split.

    Raises:
        UserError: fewer samples than the protocol asks for, or features of another dimension than the statistics.
    """
    extractor, reference = _judge(setting, data)
    options = setting.options
    images = _images(setting, data)
    count = min(int(options["compared"]), len(images), len(draws[0][0]))
    # A stride over the sorted names, which are ordered by class in some archives.
    rows = [i * len(images) // count for i in range(count)]
    real = torch.cat([extractor.features(torch.stack([images.image(r) for r in part])) for part in _parts(rows)])
    found: dict[str, list[float]] = {}
    for samples, _ in draws:
        seen = extractor.features(samples)
        require_samples(len(seen), seen.shape[1], minimum=int(options["samples"]))
        precision, recall = precision_recall(seen[:count], real)
        name = frechet_name(extractor.identity)
        scores = {
            # Another network than Inception is measured under its own name and leaves the card's fid unscored.
            name: frechet_distance(Moments.of(seen), reference),
            "inception_score": inception_score(extractor.probabilities(samples)),
            "kid": kid(seen, real, subset_size=min(1000, count)),
            "precision": precision,
            "recall": recall,
        }
        for metric, value in scores.items():
            found.setdefault(metric, []).append(value)
    return [Measurement.mean(metric, values) for metric, values in found.items()]


def _parts(rows: list[int], size: int = 256) -> list[list[int]]:
    stream = iter(rows)
    return list(iter(lambda: list(itertools.islice(stream, size)), []))


def pixels(draws: Sequence[tuple[Tensor, Tensor]], options: Mapping[str, Any]) -> Tensor:
    """The first samples as a sheet of four rows of eight, (4 S, 8 S, 3) in [0, 1]."""
    samples = draws[0][0][:32].expand(-1, 3, -1, -1)
    rows = torch.cat([torch.cat(list(r), dim=2) for r in samples.split(8) if len(r) == 8], dim=1)
    return (rows.permute(1, 2, 0).clamp(-1, 1) + 1) / 2
