"""The paper settings: EDM's data sets and teachers from the user's folder, judged by FID against published statistics."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distillbench.cards.card import Setting
from distillbench.errors import UserError, unknown
from distillbench.runs.record import Measurement
from distillbench.suites.image_generation.image_folders import EDMImages, FolderBatches
from distillbench.suites.image_generation.nets import build
from distillbench.suites.metrics.images.extractors import (
    PUBLISHED,
    Extractor,
    feature_name,
    fidelity_inception,
    frechet_name,
    nvidia_inception,
)
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
        images_of(setting, data), setting.training.batch_size, seeds["order"], flip=bool(options["flip"]), workers=int(options["workers"])
    ), None


def images_of(setting: Setting, data: Path | None) -> EDMImages:
    """The user's data set. Raises UserError where it is missing or not in EDM's format."""
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


def extractor(setting: Setting, data: Path | None) -> Extractor:
    """The feature network that the setting's options name as ``extractor``, with their rule ``resize``.

    A number in its features is identified by what the record states: this name and rule, the digests of the network's file
    (``inception``) and of the statistics (``reference``), the number of ``samples``; images are rounded to uint8.

    Raises:
        UserError: an unknown network or rule, a file that is missing or not the published one, or a setting that pins another one.
    """
    name, resize = str(setting.options.get("extractor", "inception_nvidia")), str(setting.options.get("resize", "tensorflow"))
    if name not in PUBLISHED:  # a setting may come from somebody's record
        raise unknown("extractor", name, PUBLISHED)
    asset = setting.others.get("inception")
    if asset is None or asset.sha256 != PUBLISHED[name]:
        stated = asset.sha256 if asset and asset.sha256 else "none"
        raise UserError(f"the setting pins SHA-256 {stated[:16]} for its feature network, where {name} has {PUBLISHED[name][:16]}")
    make = {"inception_nvidia": nvidia_inception, "inception_fidelity": fidelity_inception}[name]
    # The published hash and no other: TorchScript is code.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return make(place(setting, data, "inception"), resize=resize, sha256=PUBLISHED[name], device=device)


def _judge(setting: Setting, data: Path | None) -> tuple[Extractor, Moments]:
    """The feature network and the reference statistics. Raises UserError where either is missing or not what it should be."""
    return extractor(setting, data), load_reference(place(setting, data, "reference"))


def measure(
    draws: Sequence[tuple[Tensor, Tensor]], setting: Setting, seeds: Mapping[str, int], split: str, data: Path | None
) -> list[Measurement]:
    """Judge the draws: a Frechet distance to the reference statistics, and the others against real images of the data set.

    In other features than those of NVIDIA's Inception every name but precision's and recall's says in which (:func:`feature_name`).

    The statistics are those of the training set, as the protocol has it, for either split.

    Raises:
        UserError: fewer samples than the protocol asks for, or features of another dimension than the statistics.
    """
    network, reference = _judge(setting, data)
    options = setting.options
    images = images_of(setting, data)
    count = min(int(options["compared"]), len(images), len(draws[0][0]))
    # A stride over the sorted names, which are ordered by class in some archives.
    rows = [i * len(images) // count for i in range(count)]
    real = torch.cat([network.features(part) for part in stacked(images, rows)])
    identity = network.identity
    found: dict[str, list[float]] = {}
    for samples, _ in draws:
        seen = network.features(samples)
        require_samples(len(seen), seen.shape[1], minimum=int(options["samples"]))
        precision, recall = precision_recall(seen[:count], real)
        scores = {
            frechet_name(identity): frechet_distance(Moments.of(seen), reference),
            feature_name("inception_score", identity): inception_score(network.probabilities(samples)),
            feature_name("kid", identity): kid(seen, real, subset_size=min(1000, count)),
            "precision": precision,
            "recall": recall,
        }
        for metric, value in scores.items():
            found.setdefault(metric, []).append(value)
    return [Measurement.mean(metric, values) for metric, values in found.items()]


def stacked(images: EDMImages, rows: Sequence[int], size: int = 256) -> Iterator[Tensor]:
    """The images of ``rows`` in stacks of at most ``size``, (n, C, S, S) each."""
    stream = iter(rows)
    while part := list(itertools.islice(stream, size)):
        yield torch.stack([images.image(r) for r in part])


def pixels(draws: Sequence[tuple[Tensor, Tensor]], options: Mapping[str, Any]) -> Tensor:
    """The first samples as a sheet of four rows of eight, (4 S, 8 S, 3) in [0, 1]."""
    samples = draws[0][0][:32].expand(-1, 3, -1, -1)
    rows = torch.cat([torch.cat(list(r), dim=2) for r in samples.split(8) if len(r) == 8], dim=1)
    return (rows.permute(1, 2, 0).clamp(-1, 1) + 1) / 2
