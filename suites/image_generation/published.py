"""The paper settings: EDM's data sets and teachers from the user's folder, judged by FID against published statistics."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distillbench.errors import UserError, unknown
from distillbench.runs.record import Measurement
from distillbench.runs.suite import Context, JudgeContext, TrainContext
from distillbench.suites.image_generation.image_folders import EDMImages, FolderBatches
from distillbench.suites.image_generation.nets import build
from distillbench.suites.image_generation.sampling import Draws, Sampling
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
from distillbench.training.data import Arrays, Batch, Batches
from distillbench.training.student import Student


@dataclass(frozen=True, kw_only=True)
class Options(Sampling):
    """The data set's form, and how samples are judged.

    Attributes:
        workers: decoding processes.  flip: whether training images are mirrored at random.
        compared: real images that precision, recall and kid look at.
        extractor, resize: the feature network and its rule.
    """

    workers: int
    channels: int
    resolution: int
    flip: bool
    compared: int
    extractor: str = "inception_nvidia"
    resize: str = "tensorflow"


def batches(ctx: TrainContext) -> tuple[Batches[Batch], Arrays | None]:
    """Real images, streamed from disk. What the judge will need is looked for now, and not after days of training."""
    options = ctx.options(Options)
    extractor(ctx, "cpu")
    load_reference(ctx.place("reference"))
    size, order = ctx.setting.training.batch_size, ctx.seeds["order"]
    return FolderBatches(images_of(ctx), size, order, flip=options.flip, workers=options.workers), None


def images_of(ctx: Context) -> EDMImages:
    """The user's data set. Raises UserError where it is missing or not in EDM's format."""
    options = ctx.options(Options)
    return EDMImages(ctx.place("data"), options.resolution, options.classes, options.channels)


def teacher(ctx: Context) -> nn.Module:
    """The converted teacher. Raises UserError where the file is none."""
    path = ctx.place("teacher")
    student = Student.from_bytes(path.read_bytes(), str(path))
    net = build(student.architecture, 0)
    try:
        net.load_state_dict(student.weights)
    except RuntimeError as error:
        raise UserError(f"{path}: its weights do not fit its architecture {student.architecture.name}; convert it again") from error
    return net.eval()


def extractor(ctx: Context, device: str) -> Extractor:
    """The feature network that the setting's options name as ``extractor``, with their rule ``resize``.

    A number in its features is identified by what the record states: this name and rule, the digests of the network's file
    (``inception``) and of the statistics (``reference``), the number of ``samples``; images are rounded to uint8.

    Raises:
        UserError: an unknown network or rule, a file that is missing or not the published one, or a setting that pins another one.
    """
    options = ctx.options(Options)
    name = options.extractor
    if name not in PUBLISHED:  # a setting may come from somebody's record
        raise unknown("extractor", name, PUBLISHED)
    asset = ctx.setting.assets.get("inception")
    if asset is None or asset.sha256 != PUBLISHED[name]:
        stated = asset.sha256 if asset and asset.sha256 else "none"
        raise UserError(f"the setting pins SHA-256 {stated[:16]} for its feature network, where {name} has {PUBLISHED[name][:16]}")
    make = {"inception_nvidia": nvidia_inception, "inception_fidelity": fidelity_inception}[name]
    # The published hash and no other: TorchScript is code.
    return make(ctx.place("inception"), resize=options.resize, sha256=PUBLISHED[name], device=device)


def measure(draws: Draws, ctx: JudgeContext) -> list[Measurement]:
    """Judge the draws: a Frechet distance to the reference statistics, and the others against real images of the data set.

    In other features than those of NVIDIA's Inception every name but precision's and recall's says in which (:func:`feature_name`).

    The statistics are those of the training set, as the protocol has it, for either split.

    Raises:
        UserError: fewer samples than the protocol asks for, or features of another dimension than the statistics.
    """
    options = ctx.options(Options)
    network, reference = extractor(ctx, ctx.device), load_reference(ctx.place("reference"))
    images = images_of(ctx)
    count = min(options.compared, len(images), len(draws[0][0]))
    # A stride over the sorted names, which are ordered by class in some archives.
    rows = [i * len(images) // count for i in range(count)]
    real = torch.cat([network.features(part) for part in stacked(images, rows)])
    identity = network.identity
    found: dict[str, list[float]] = {}
    for samples, _ in draws:
        seen = network.features(samples)
        require_samples(len(seen), seen.shape[1], minimum=options.samples)
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


def pixels(draws: Draws, ctx: JudgeContext) -> Tensor:
    """The first samples as a sheet of four rows of eight, (4 S, 8 S, 3) in [0, 1]."""
    samples = draws[0][0][:32].expand(-1, 3, -1, -1)
    rows = torch.cat([torch.cat(list(r), dim=2) for r in samples.split(8) if len(r) == 8], dim=1)
    return (rows.permute(1, 2, 0).clamp(-1, 1) + 1) / 2
