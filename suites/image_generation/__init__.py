"""Image generation: the judge of few-step generators distilled from a diffusion model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.card import Budget, Metric, Setting, SuiteCard, Training

if TYPE_CHECKING:
    from bench.problems.image_generation import ImageGeneration
    from bench.record import Measurement
    from bench.student import Student

CARD = SuiteCard(
    slug="image-generation",
    version=1,
    problem="image-generation",
    title="Image generation",
    summary="One diffusion model, one generator of few steps, one budget: how close does each method come to the data in one evaluation?",
    metrics=[
        Metric(
            name="mmd2",
            unit="squared kernel distance",
            better="lower",
            meaning="unbiased squared MMD to fresh real samples, Gaussian kernels; 0 in expectation for the data's law: may be negative",
        ),
        Metric(
            name="sliced_wasserstein",
            unit="data units",
            better="lower",
            range=(0, None),
            meaning="sliced Wasserstein-2 distance to as many fresh real samples; hardly sees a mode that shrinks in place",
        ),
        Metric(
            name="spread_error",
            unit="nats",
            better="lower",
            range=(0, None),
            meaning="|ln| of the standard deviation within a mode over the true one; 0 is right. The raw ratio is measured as spread_ratio",
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
        Metric(name="nfe", unit="evaluations", better="lower", range=(1, None), meaning="network evaluations a sample"),
    ],
    primary="mmd2",
    controls=["scratch", "teacher", "teacher_one_step"],
    settings={
        "gaussians": Setting(
            tier="analytic",
            summary="Eight Gaussian modes of std 0.1 on the unit circle; the teacher is their exact denoiser at any noise level. One step.",
            budget=Budget(student_examples=512000, teacher_examples=1024000),
            training=Training(batch_size=256, optimizer="adamw", learning_rate=0.003, schedule="cosine"),
            options={
                "modes": 8,
                "radius": 1.0,
                "std": 0.1,
                "train": 5000,
                "samples": 2000,
                "bandwidths": [0.05, 0.1, 0.2, 0.5, 1.0],
                "sigma_min": 0.01,
                "sigma_max": 10.0,
                "sigma_data": 0.714,
                "steps": 1,
                "teacher_steps": 18,
                "student": {"name": "denoiser-mlp", "arguments": {"shape": [2], "width": 64, "blocks": 2}},
            },
        ),
    },
)


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
        split: where the student will be judged; exact samples are fresh for either, so training is the same.
        data: the user's folder of data sets.  cache: not used; an exact teacher costs less than a look-up.
    """
    import torch

    from bench.data import Shuffled
    from bench.nets import Architecture
    from bench.oracle import DenoiserOracle
    from bench.problems.image_generation import ImageGeneration
    from suites.image_generation import gaussians
    from suites.image_generation.nets import build

    options = setting.options
    about = options["student"]
    levels = {k: float(options[k]) for k in ("sigma_min", "sigma_max", "sigma_data")}
    arguments = {"sigma_data": levels["sigma_data"], "sigma_min": levels["sigma_min"], **about["arguments"]}
    architecture = Architecture(about["name"], {k: list(v) if isinstance(v, tuple) else v for k, v in arguments.items()})
    train = gaussians.train(options, seeds["data"])
    return ImageGeneration(
        setting=name,
        student=build(architecture, seeds["init"]),
        build=lambda a: build(a, seeds["init"]),
        teacher=DenoiserOracle(_teacher(setting)),
        batches=Shuffled(train, torch.arange(len(train)), setting.training.batch_size, seeds["order"]),
        steps=int(options["steps"]),
        teacher_steps=int(options["teacher_steps"]),
        train=train,
        **levels,
    )


def _teacher(setting: Setting) -> Any:
    from bench.nets import Architecture
    from suites.image_generation import gaussians
    from suites.image_generation.nets import build

    arguments = {"means": gaussians.means(setting.options).tolist(), "std": float(setting.options["std"])}
    return build(Architecture("gaussian-mixture", arguments), 0).eval()


def rebuild(student: Student) -> Any:
    """The network of an exported student, in evaluation mode. Raises UserError where weights and architecture do not fit."""
    from bench.errors import UserError
    from suites.image_generation.nets import build

    net = build(student.architecture, 0)
    try:
        net.load_state_dict(student.weights)
    except RuntimeError as error:
        raise UserError(
            f"the weights do not fit architecture {student.architecture.name}: {str(error).splitlines()[-1].strip()}"
        ) from error
    return net.eval()


def generate(student: Student, setting: Setting, seeds: Mapping[str, int], *, split: str = "test") -> Any:
    """The samples (N, ...) that are judged: the suite draws them by the student's recipe, from noise all methods share.

    Raises:
        UserError: the student cannot be rebuilt, its recipe is none or takes more steps than the setting allows, a sample is
            not finite, or all samples are the same.
    """
    import torch

    from bench.errors import UserError
    from bench.record import derive_seed
    from suites.image_generation import sampling

    options = setting.options
    used = sampling.evaluations(student.recipe, sigma_max=float(options["sigma_max"]))
    net = rebuild(student)
    teacher = student.architecture == _teacher(setting).architecture  # only the teacher itself, the yardstick, may take more
    if used > int(options["steps"]) and not teacher:
        raise UserError(f"the recipe takes {used} evaluations a sample, this setting allows {options['steps']}")
    generator = torch.Generator().manual_seed(derive_seed(f"{split} noise", seeds["evaluation"]))
    noise = torch.randn(int(options["samples"]), 2, generator=generator)
    samples = sampling.sample(net, student.recipe, noise, generator, sigma_min=float(options["sigma_min"]))
    sampling.sound(samples)
    return samples


def evaluate(
    student: Student, name: str, setting: Setting, seeds: Mapping[str, int], *, split: str = "test", data: Path | None = None
) -> list[Measurement]:
    """Judge plain weights on a split: samples from its evaluation noise, against fresh exact samples of its own.

    Beside the card's metrics it measures ``spread_ratio``, for which neither more nor less is better.

    Raises:
        UserError: as :func:`generate`.
    """
    from bench.record import Measurement, derive_seed
    from suites.image_generation import gaussians, sampling
    from suites.metrics.mmd import mmd2
    from suites.metrics.modes import between_modes, coverage, spread_error, spread_ratio
    from suites.metrics.sliced_wasserstein import sliced_wasserstein

    options = setting.options
    samples = generate(student, setting, seeds, split=split)
    count = len(samples)
    real = gaussians.draw(options, count, derive_seed(f"{split} reference", seeds["evaluation"]))
    modes, std = gaussians.means(options), float(options["std"])
    ratio = spread_ratio(samples, modes, std)
    return [
        Measurement("mmd2", mmd2(samples, real, bandwidths=options["bandwidths"]), count),
        Measurement("sliced_wasserstein", sliced_wasserstein(samples, real), count),
        Measurement("spread_error", spread_error(ratio), count),
        Measurement("spread_ratio", ratio, count),
        Measurement.mean("between_modes", between_modes(samples, modes, std).double().tolist()),
        Measurement("coverage", coverage(samples, modes, std), count),
        Measurement("nfe", float(sampling.evaluations(student.recipe, sigma_max=float(options["sigma_max"]))), count),
    ]
