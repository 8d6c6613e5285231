"""Image generation: the judge of few-step generators distilled from a diffusion model."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distillbench.assets import Asset
from distillbench.cards.card import Budget, Metric, Setting, SuiteCard, Training, Variant
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
            meaning="unbiased squared MMD to fresh real samples, Gaussian kernels; 0 in expectation for the data's law: may be negative",
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
        Metric(name="nfe", unit="evaluations", better="lower", range=(1, None), meaning="network evaluations a sample, counted"),
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
    settings={
        "gaussians": Setting(
            tier="analytic",
            summary="Eight Gaussian modes of std 0.1 on the unit circle; the teacher is their exact denoiser at any noise level. One step.",
            budget=Budget(student_examples=256000, teacher_examples=1280000),
            training=Training(batch_size=256, optimizer="adamw", learning_rate=0.003, schedule="cosine"),
            metrics=["mmd2", "sliced_wasserstein", "spread_error", "between_modes", "coverage", "nfe"],
            options={
                "world": "gaussians",
                "modes": 8,
                "classes": 0,
                "guidance": 1.0,
                "radius": 1.0,
                "std": 0.1,
                "train": 5000,
                "draws": 2,
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
        "digits": Setting(
            tier="embedded",
            summary="Real 8x8 handwritten digits, by class; the teacher is a diffusion model of 1.2M parameters. One step.",
            budget=Budget(student_examples=51200, teacher_examples=512000),
            training=Training(batch_size=128, optimizer="adamw", learning_rate=0.001, schedule="cosine"),
            data=Asset(
                name="digits",
                source="scikit-learn load_digits",
                licence="CC BY 4.0",
                sha256="09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22",
            ),
            teacher=Asset(
                name="digits_teacher",
                source="shipped; made by suites/image_generation/train_digits_teacher.py",
                licence="Apache-2.0",
                sha256="365f09225cc5392d71e385ae851a3d76526e47515299f87b86115b949b061a82",
            ),
            metrics=["fd_digits_cnn", "kid_digits_cnn", "precision", "recall", "diversity_error", "copied_fraction", "nfe"],
            options={
                "world": "digits",
                "classes": 10,
                "guidance": 1.0,
                "draws": 5,
                "samples": 1000,
                "sigma_min": 0.02,
                "sigma_max": 80.0,
                "sigma_data": 0.75,
                "steps": 1,
                "teacher_steps": 18,
                "student": {
                    "name": "denoiser-mlp",
                    "arguments": {"shape": [1, 8, 8], "width": 256, "blocks": 3, "classes": 10, "expansion": 2, "normalise": True},
                },
            },
        ),
        "cifar10": Setting(
            tier="paper",
            summary="CIFAR-10 by class; the teacher is EDM's DDPM++ (VP), 56M parameters. One step. Optimizer and length are SiD's.",
            budget=Budget(student_examples=500000000, teacher_examples=1500000000),
            training=Training(batch_size=256, optimizer="adam", learning_rate=1e-05, betas=(0.0, 0.999)),
            data=Asset(
                name="CIFAR-10 in EDM's format",
                source="dataset_tool.py of NVlabs/edm on cifar-10-python.tar.gz",
                licence="not stated by its authors",
            ),
            teacher=Asset(
                name="edm-cifar10-32x32-cond-vp as safetensors",
                source="NVlabs/edm, converted by distillbench.suites.image_generation.convert_edm",
                licence="CC BY-NC-SA 4.0",
            ),
            others={
                "reference": Asset(name="cifar10's reference statistics", source="fid-refs of NVlabs/edm", licence="not stated"),
                "inception": Asset(
                    name="Inception",
                    source="inception-2015-12-05.pt of NVlabs/stylegan3",
                    licence="Apache-2.0",
                    sha256="f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
                ),
            },
            metrics=["fid", "kid", "inception_score", "precision", "recall", "nfe"],
            requires=["cleanfid", "torch_fidelity"],
            options={
                "world": "published",
                "workers": 2,
                "data_path": ["cifar10/train.zip", "cifar10/train"],
                "teacher_path": ["cifar10/teacher.safetensors"],
                "reference_path": ["cifar10/reference.npz"],
                "inception_path": ["inception-2015-12-05.pt"],
                "channels": 3,
                "guidance": 1.0,
                "draws": 3,
                "samples": 50000,
                "compared": 10000,
                "flip": False,
                "sigma_min": 0.002,
                "sigma_max": 80.0,
                "sigma_data": 0.5,
                "steps": 1,
                "teacher_steps": 18,
                "resolution": 32,
                "classes": 10,
                "student": {
                    "name": "edm-unet",
                    "arguments": {
                        "network": "song",
                        "img_resolution": 32,
                        "channels": 3,
                        "classes": 10,
                        "augment_dim": 9,
                        "model_channels": 128,
                        "channel_mult": [2, 2, 2],
                    },
                },
            },
        ),
        "imagenet64": Setting(
            tier="paper",
            summary="ImageNet at 64x64 by class; the teacher is EDM's ADM, 296M parameters. One step. Optimizer and length are DMD2's.",
            budget=Budget(student_examples=30800000, teacher_examples=92400000),
            training=Training(
                batch_size=280, optimizer="adamw", learning_rate=2e-06, weight_decay=0.01, warmup=0.005, clip=10.0, precision="bfloat16"
            ),
            data=Asset(
                name="ImageNet-1k at 64x64 in EDM's format",
                source="dataset_tool.py --resolution=64x64 --transform=center-crop of NVlabs/edm",
                licence="ImageNet terms of access",
            ),
            teacher=Asset(
                name="edm-imagenet-64x64-cond-adm as safetensors",
                source="NVlabs/edm, converted by distillbench.suites.image_generation.convert_edm",
                licence="CC BY-NC-SA 4.0",
            ),
            others={
                "reference": Asset(name="imagenet64's reference statistics", source="fid-refs of NVlabs/edm", licence="not stated"),
                "inception": Asset(
                    name="Inception",
                    source="inception-2015-12-05.pt of NVlabs/stylegan3",
                    licence="Apache-2.0",
                    sha256="f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
                ),
            },
            metrics=["fid", "kid", "inception_score", "precision", "recall", "nfe"],
            requires=["cleanfid", "torch_fidelity"],
            options={
                "world": "published",
                "workers": 8,
                "data_path": ["imagenet64/train.zip", "imagenet64/train"],
                "teacher_path": ["imagenet64/teacher.safetensors"],
                "reference_path": ["imagenet64/reference.npz"],
                "inception_path": ["inception-2015-12-05.pt"],
                "channels": 3,
                "guidance": 1.0,
                "draws": 3,
                "samples": 50000,
                "compared": 10000,
                "flip": False,
                "sigma_min": 0.002,
                "sigma_max": 80.0,
                "sigma_data": 0.5,
                "steps": 1,
                "teacher_steps": 40,
                "resolution": 64,
                "classes": 1000,
                "student": {
                    "name": "edm-unet",
                    "arguments": {
                        "network": "dhariwal",
                        "img_resolution": 64,
                        "channels": 3,
                        "classes": 1000,
                        "model_channels": 192,
                        "channel_mult": [1, 2, 3, 4],
                    },
                },
            },
        ),
    },
    variants={
        "gaussians-guided": Variant(
            of="gaussians",
            metrics=["mmd2", "sliced_wasserstein", "nfe"],
            summary="Eight modes in four classes; the teacher is their exact denoiser with classifier-free guidance 3. One step.",
            options={
                "classes": 4,
                "guidance": 3.0,
                "student": {"name": "denoiser-mlp", "arguments": {"shape": [2], "width": 64, "blocks": 2, "classes": 4}},
            },
        ),
        "digits-few": Variant(of="digits", summary="The digits, with up to two evaluations a sample.", options={"steps": 2}),
        "cifar10-fidelity": Variant(
            of="cifar10",
            summary="CIFAR-10 by class, judged in the features of torch-fidelity's Inception, which every number there has in its name.",
            metrics=[
                "fd_inception_fidelity",
                "kid_inception_fidelity",
                "inception_score_inception_fidelity",
                "precision",
                "recall",
                "nfe",
            ],
            others={
                "inception": Asset(
                    name="Inception as pytorch-fid and torch-fidelity have it",
                    source="weights-inception-2015-12-05-6726825d.pth of toshas/torch-fidelity",
                    licence="Apache-2.0",
                    sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
                ),
            },
            options={
                "extractor": "inception_fidelity",
                "resize": "tensorflow",
                "inception_path": ["weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth"],
                "reference_path": ["cifar10/reference-fidelity.npz"],
            },
        ),
        "cifar10-uncond": Variant(
            of="cifar10",
            summary="CIFAR-10 without classes; the teacher is EDM's unconditional DDPM++ (VP).",
            options={
                "classes": 0,
                "teacher_path": ["cifar10-uncond/teacher.safetensors"],
                "student": {
                    "name": "edm-unet",
                    "arguments": {
                        "network": "song",
                        "img_resolution": 32,
                        "channels": 3,
                        "classes": 0,
                        "augment_dim": 9,
                        "model_channels": 128,
                        "channel_mult": [2, 2, 2],
                    },
                },
            },
        ),
    },
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
