"""Image generation: the judge of few-step generators distilled from a diffusion model."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distillbench.cards.card import Metric, Setting, SuiteCard
from distillbench.cards.reading import read_settings
from distillbench.cards.worlds import Worlds

if TYPE_CHECKING:
    from distillbench.problems.image_generation.problem import ImageGeneration
    from distillbench.runs.record import Measurement
    from distillbench.training.student import Student

WORLDS = Worlds(__name__, ("gaussians", "digits", "published"))
SHEET = 2000  # samples drawn for a picture, at most

CARD = SuiteCard(
    slug="image-generation",
    version=2,
    problem="image-generation",
    title="Image generation",
    summary="One diffusion model, one generator of few steps, one budget: how close to the data does each method come?",
    metrics=[
        Metric(
            name="mmd2",
            unit="squared kernel distance",
            better="lower",
            meaning="unbiased squared MMD to fresh real samples, Gaussian kernels; 0 in expectation for the data's distribution: "
            "may be negative",
        ),
        Metric(
            name="sliced_wasserstein",
            unit="data units",
            better="lower",
            range=(0, None),
            meaning="sliced Wasserstein-2 distance to as many real samples; hardly sees a mode that shrinks in place",
        ),
        Metric(
            name="spread_error",
            unit="nats",
            better="lower",
            range=(0, None),
            meaning="|ln| of the standard deviation within a mode over the true one; 0 is right. The raw ratio is shown as spread_ratio",
        ),
        Metric(
            name="between_modes",
            unit="fraction",
            better="lower",
            range=(0, 1),
            meaning="share of samples farther than 3 standard deviations from every mode (0.011 for true samples)",
        ),
        Metric(
            name="coverage",
            unit="fraction",
            better="higher",
            range=(0, 1),
            meaning="share of modes that get at least a fifth of their fair share of samples",
        ),
        Metric(
            name="fd_digits_cnn",
            unit="squared feature distance",
            better="lower",
            range=(0, None),
            meaning="Frechet distance of 1,000 samples to the real images of the split, in the penultimate features of the shipped digit "
            "classifier; 0.25 for the training images against the test images",
        ),
        Metric(
            name="kid_digits_cnn",
            unit="squared kernel distance",
            better="lower",
            meaning="unbiased kernel distance (cubic kernel) in the same features: may be negative",
        ),
        Metric(name="precision", unit="fraction", better="higher", range=(0, 1), meaning="share of samples among the real ones (k = 3)"),
        Metric(name="recall", unit="fraction", better="higher", range=(0, 1), meaning="share of real images among the samples (k = 3)"),
        Metric(
            name="diversity_error",
            unit="nats",
            better="lower",
            range=(0, None),
            meaning="|ln| of the mean distance of two samples of a class over that of two real images; 0 is right. The ratio is diversity",
        ),
        Metric(
            name="copied_fraction",
            unit="fraction",
            better="lower",
            range=(0, 1),
            meaning="share of samples as close to a training image as the closest real image in a hundred is",
        ),
        Metric(
            name="fid",
            unit="squared feature distance",
            better="lower",
            range=(0, None),
            meaning="Frechet distance of 50,000 samples to the published statistics of the training set in Inception's features",
        ),
        Metric(name="kid", unit="squared kernel distance", better="lower", meaning="unbiased kernel distance in the same features"),
        Metric(name="inception_score", unit="score", better="higher", range=(1, None), meaning="exp of the mean KL of p(y|x) to p(y)"),
        Metric(
            name="fd_inception_fidelity",
            unit="squared feature distance",
            better="lower",
            range=(0, None),
            meaning="Frechet distance of 50,000 samples to statistics in the features of torch-fidelity's Inception: close to FID, not it",
        ),
        Metric(
            name="kid_inception_fidelity",
            unit="squared kernel distance",
            better="lower",
            meaning="unbiased kernel distance in the features of torch-fidelity's Inception",
        ),
        Metric(
            name="inception_score_inception_fidelity",
            unit="score",
            better="higher",
            range=(1, None),
            meaning="exp of the mean KL of p(y|x) to p(y), by the classes of torch-fidelity's Inception",
        ),
        Metric(name="nfe", unit="evaluations", better="lower", range=(1, None), meaning="network evaluations per sample, counted"),
        Metric(
            name="spread_ratio",
            unit="ratio",
            better=None,
            range=(0, None),
            meaning="standard deviation within a mode over the true one; 1 is right",
        ),
        Metric(
            name="diversity",
            unit="ratio",
            better=None,
            range=(0, None),
            meaning="mean distance of two samples of a class over that of two real images; 1 is right",
        ),
        Metric(
            name="class_accuracy",
            unit="fraction",
            better=None,
            range=(0, 1),
            meaning="share of samples that the shipped digit classifier puts into their class: a blurred mean of a class always is",
        ),
        Metric(
            name="closer_to_training",
            unit="fraction",
            better=None,
            range=(0, 1),
            meaning="chance that a sample lies nearer to the training images than a real image of the split does; 0.5 is fair",
        ),
    ],
    primary="mmd2",
    controls=["scratch", "teacher", "teacher_one_step"],
    floor="scratch",
    ceiling="teacher",
    strongest=["scratch", "teacher_one_step"],
    settings=read_settings(__file__),
)

# Options that make a fingerprint small (see distillbench.checks.fingerprints): the arithmetic is the same, on fewer examples.
FINGERPRINT = {
    "gaussians": {"train": 500, "samples": 300},
    "gaussians-guided": {"train": 500, "samples": 100, "draws": 1},
    "digits": {"draws": 1, "samples": 300},
    "digits-few": {"draws": 1, "samples": 300},
}


def problem(
    name: str,
    setting: Setting,
    seeds: Mapping[str, int],
    *,
    split: str = "test",
    data: Path | None = None,
    cache: Path | None = None,
) -> ImageGeneration:
    """The problem of one setting for one set of seeds.

    Args:
        split: where the student will be judged; training is the same for either.
        data: the user's folder of data sets.  cache: not used; a denoiser is never asked twice about the same noisy sample.
    """
    from distillbench.problems.image_generation.oracle import DenoiserOracle
    from distillbench.problems.image_generation.problem import ImageGeneration
    from distillbench.suites.image_generation.nets import build
    from distillbench.training.nets import Architecture

    options, world = setting.options, WORLDS.of(setting)
    about = options["student"]
    levels = {k: float(options[k]) for k in ("sigma_min", "sigma_max", "sigma_data")}
    arguments = {"sigma_data": levels["sigma_data"], "sigma_min": levels["sigma_min"], **about["arguments"]}
    architecture = Architecture(about["name"], {k: list(v) if isinstance(v, tuple) else v for k, v in arguments.items()})
    batches, train = world.batches(setting, seeds, data)
    return ImageGeneration(
        setting=name,
        student=build(architecture, seeds["init"]),
        build=functools.partial(build, seed=seeds["init"]),
        teacher=DenoiserOracle(world.teacher(setting, data), guidance=float(options["guidance"])),
        batches=batches,
        steps=int(options["steps"]),
        teacher_steps=int(options["teacher_steps"]),
        train=train,
        **levels,
    )


def rebuild(student: Student) -> Any:
    """The network of an exported student, in evaluation mode. Raises UserError where weights and architecture do not fit."""
    from distillbench.suites.image_generation.nets import build
    from distillbench.training import student as students

    return students.rebuild(student, build)


def generate(
    student: Student,
    setting: Setting,
    seeds: Mapping[str, int],
    *,
    split: str = "test",
    data: Path | None = None,
    draws: int | None = None,
    samples: int | None = None,
) -> tuple[list[tuple[Any, Any]], float]:
    """What is judged: independent draws of (samples (N, ...), labels (N,)), and the network evaluations per sample.

    :func:`sampling.drawn` says how, and what it raises. ``draws`` and ``samples`` ask for fewer than the setting does.
    """
    from distillbench.suites.image_generation import sampling

    world = WORLDS.of(setting)
    return sampling.drawn(
        rebuild(student), student, setting, seeds, split, teacher=lambda: world.teacher(setting, data), draws=draws, samples=samples
    )


def exceeds(student: Student, setting: Setting) -> str | None:
    """By how much a student's recipe takes more evaluations than the setting allows, or None: only the teacher's weights get so far."""
    from distillbench.suites.image_generation import sampling

    used, allowed = sampling.evaluations(student.recipe, sigma_max=float(setting.options["sigma_max"])), int(setting.options["steps"])
    return f"nfe {used} of {allowed}" if used > allowed else None


def evaluate(
    student: Student, name: str, setting: Setting, seeds: Mapping[str, int], *, split: str = "test", data: Path | None = None
) -> list[Measurement]:
    """Judge plain weights on a split: samples from its evaluation noise, against real samples of that split.

    Every metric is the mean over independent draws, whose values the measurement keeps; raises UserError as :func:`generate`.
    Those without a direction on the card are measured wherever they make sense.
    """
    from distillbench.runs.record import Measurement

    draws, spent = generate(student, setting, seeds, split=split, data=data)
    return [*WORLDS.of(setting).measure(draws, setting, seeds, split, data), Measurement("nfe", spent, len(draws))]


def picture(student: Student, setting: Setting, seeds: Mapping[str, int], *, split: str = "test", data: Path | None = None) -> Any:
    """A sheet of samples of the first draw, in [0, 1], (H, W) grey or (H, W, 3) colour, from the noise that all methods share."""
    draws, _ = generate(student, setting, seeds, split=split, data=data, draws=1, samples=min(int(setting.options["samples"]), SHEET))
    return WORLDS.of(setting).pixels(draws, setting.options)
