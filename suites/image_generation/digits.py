"""The embedded settings: scikit-learn's 1,797 real handwritten digits (8x8), with a class-conditional diffusion model as the teacher."""

from __future__ import annotations

import copy
import math
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from distillbench.errors import UserError
from distillbench.identity import sha256
from distillbench.runs.record import Measurement
from distillbench.runs.suite import Context, JudgeContext, TrainContext
from distillbench.suites.image_classification import digits as images
from distillbench.suites.image_generation.nets import rebuild
from distillbench.suites.image_generation.sampling import Draws, Sampling
from distillbench.suites.metrics.images.diversity import diversity
from distillbench.suites.metrics.images.frechet import frechet_from_samples
from distillbench.suites.metrics.images.kid import polynomial_mmd2
from distillbench.suites.metrics.images.memorisation import memorisation
from distillbench.suites.metrics.images.precision_recall import precision_recall
from distillbench.training.data import Arrays, Batch, Batches, Shuffled
from distillbench.training.nets import outputs_of
from distillbench.training.student import Student, tensor_digest

TEACHER = Path(__file__).parent / "digits_teacher.safetensors"
CLASSES = 10
Options = Sampling


def split(name: str, sha: str | None = None) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 8, 8) in [-1, 1] and labels (N,) of ``train`` (1197), ``tune`` (200) or ``test`` (400)."""
    pixels, labels = images.load(sha)
    rows = images.partition()[name]
    return pixels[rows], labels[rows]


def batches(ctx: TrainContext) -> tuple[Batches[Batch], Arrays | None]:
    """All training images with their labels: the same for every seed, in the order of the run's."""
    inputs, labels = split("train", asset.sha256 if (asset := ctx.setting.assets.get("data")) else None)
    train = Arrays(inputs, labels, torch.ones(len(inputs), dtype=torch.bool), tensor_digest({"inputs": inputs, "labels": labels}))
    return Shuffled(train, torch.arange(len(train)), ctx.setting.training.batch_size, ctx.seeds["order"]), train


@cache
def _read(path: Path, sha: str | None) -> nn.Module:
    blob = path.read_bytes()
    if sha is not None and sha256(blob) != sha:
        raise UserError(f"{path.name} is not the file that this setting pins; install distillbench again")
    return rebuild(Student.from_bytes(blob, path.name))


def teacher(ctx: Context) -> nn.Module:
    """The shipped teacher. Raises UserError where its file is not the one the card pins."""
    asset = ctx.setting.assets.get("teacher")
    return copy.deepcopy(_read(TEACHER, asset.sha256 if asset else None))


@torch.no_grad()
def features(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """The shipped digit classifier's penultimate features (N, 74) and decisions (N,) of images (N, 1, 8, 8)."""
    seen = outputs_of(images.classifier(), pixels)
    return seen.embedding, seen.logits.argmax(1)


def measure(draws: Draws, ctx: JudgeContext) -> list[Measurement]:
    """Judge the draws (samples, labels): the mean over draws of each metric, against the real images of the split.

    Features are those of :func:`features`; copying is told in pixels, where real images of the split are the yardstick.

    Raises:
        UserError: more than half of the samples lie as close to a training image as one real image in a hundred does.
    """
    found: dict[str, list[float]] = {}
    (seen_images, _), (held_out, classes) = split("train"), split(ctx.split)
    real, _ = features(held_out)
    for samples, labels in draws:
        seen, decisions = features(samples)
        copies = memorisation(samples.flatten(1), seen_images.flatten(1), held_out.flatten(1))
        if copies.copied_fraction > 0.5:
            raise UserError(f"the generator copies its training set: {copies.copied_fraction:.0%} of its samples are a training image")
        # As many samples as there are real images: precision and recall depend on both sizes.
        precision, recall = precision_recall(seen[: len(real)], real)
        spread = diversity(samples.flatten(1), labels, held_out.flatten(1), classes)
        scores = {
            "fd_digits_cnn": frechet_from_samples(seen, real),
            "kid_digits_cnn": polynomial_mmd2(seen, real),
            "precision": precision,
            "recall": recall,
            "diversity": spread,
            "diversity_error": abs(math.log(max(spread, 1e-3))),
            "copied_fraction": copies.copied_fraction,
            "closer_to_training": copies.closer_fraction,
            "class_accuracy": float((decisions == labels).double().mean()),
        }
        for name, value in scores.items():
            found.setdefault(name, []).append(value)
    return [Measurement.mean(name, values) for name, values in found.items()]


def pixels(draws: Draws, ctx: JudgeContext) -> Tensor:
    """The first ten samples of each class as a sheet (89, 89) of grey values in [0, 1]: a row a class, ink dark."""
    samples, labels = draws[0]
    sheet = torch.ones(CLASSES * 9 - 1, CLASSES * 9 - 1)
    for c in range(CLASSES):
        for i, image in enumerate(samples[labels == c][:10]):
            sheet[9 * c : 9 * c + 8, 9 * i : 9 * i + 8] = (1 - image[0].clamp(-1, 1)) / 2
    return sheet
