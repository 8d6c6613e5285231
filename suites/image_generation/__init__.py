"""Image generation: the judge of few-step generators distilled from a diffusion model."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Protocol

from distillbench.cards.card import Metric, SuiteCard
from distillbench.cards.reading import read_settings
from distillbench.cards.worlds import Worlds
from distillbench.runs.suite import Artifact, Context, JudgeContext, Judgement, Suite, TrainContext

if TYPE_CHECKING:
    from torch import Tensor, nn

    from distillbench.problems.image_generation.problem import ImageGeneration
    from distillbench.runs.record import Measurement
    from distillbench.suites.image_generation.sampling import Draws, Sampling
    from distillbench.training.data import Arrays, Batch, Batches
    from distillbench.training.student import Student

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
            meaning="fraction of samples farther than 3 standard deviations from every mode (0.011 for true samples)",
        ),
        Metric(
            name="coverage",
            unit="fraction",
            better="higher",
            range=(0, 1),
            meaning="fraction of modes that get at least a fifth of their fair number of samples",
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
        Metric(name="precision", unit="fraction", better="higher", range=(0, 1), meaning="fraction of samples among the real ones (k = 3)"),
        Metric(name="recall", unit="fraction", better="higher", range=(0, 1), meaning="fraction of real images among the samples (k = 3)"),
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
            meaning="fraction of samples as close to a training image as the closest real image in a hundred is",
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
            meaning="fraction of samples that the shipped digit classifier puts into their class: a blurred mean of a class always is",
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


class World(Protocol):
    """What a world's module has."""

    @property
    def Options(self) -> type[Sampling]:
        """The options of its settings."""
        ...

    def batches(self, ctx: TrainContext) -> tuple[Batches[Batch], Arrays | None]:
        """Real samples that may be looked at, and all of them where they are in memory."""
        ...

    def teacher(self, ctx: Context) -> nn.Module:
        """A teacher of the caller's own, in evaluation mode."""
        ...

    def measure(self, draws: Draws, ctx: JudgeContext) -> list[Measurement]:
        """Judge draws of samples: every metric but the number of evaluations."""
        ...

    def pixels(self, draws: Draws, ctx: JudgeContext) -> Tensor:
        """A sheet of the first draw's samples in [0, 1], (H, W) grey or (H, W, 3) colour."""
        ...


WORLDS: Worlds[World] = Worlds(__name__, ("gaussians", "digits", "published"))


class ImageGenerationSuite(Suite):
    """The judge of generators."""

    def problem(self, ctx: TrainContext) -> ImageGeneration:
        """As :meth:`Suite.problem`; training is the same for either split, and nothing is kept: no noisy sample is met twice."""
        from distillbench.problems.image_generation.oracle import DenoiserOracle
        from distillbench.problems.image_generation.problem import ImageGeneration
        from distillbench.suites.image_generation.nets import build

        world = WORLDS.of(ctx.setting)
        options = ctx.options(world.Options)
        batches, train = world.batches(ctx)
        return ImageGeneration(
            setting=ctx.name,
            student=build(options.architecture, ctx.seeds["init"]),
            build=functools.partial(build, seed=ctx.seeds["init"]),
            teacher=DenoiserOracle(world.teacher(ctx), guidance=options.guidance),
            batches=batches,
            steps=options.steps,
            teacher_steps=options.teacher_steps,
            train=train,
            sigma_min=options.sigma_min,
            sigma_max=options.sigma_max,
            sigma_data=options.sigma_data,
        )

    def rebuild(self, student: Student, ctx: Context) -> nn.Module:
        """As :meth:`Suite.rebuild`."""
        from distillbench.suites.image_generation.nets import rebuild

        return rebuild(student)

    def exceeds(self, student: Student, ctx: JudgeContext) -> str | None:
        """By how much a student's recipe takes more evaluations than the setting allows: only the teacher's weights get so far."""
        from distillbench.suites.image_generation import sampling

        options = ctx.options(WORLDS.of(ctx.setting).Options)
        used = sampling.evaluations(student.recipe, sigma_max=options.sigma_max)
        return f"nfe {used} of {options.steps}" if used > options.steps else None

    def evaluate(self, student: Student, ctx: JudgeContext) -> Judgement:
        """Samples from the split's evaluation noise against real samples of that split, and a sheet of the first of them.

        Every metric is the mean over independent draws, whose values its measurement keeps.

        Raises:
            UserError: as :func:`sampling.drawn`, or what the world's metrics refuse.
        """
        from distillbench.runs.record import Measurement
        from distillbench.suites.image_generation import sampling

        world = WORLDS.of(ctx.setting)
        options = ctx.options(world.Options)
        draw = functools.partial(sampling.drawn, self.rebuild(student, ctx), student, options, ctx, teacher=lambda: world.teacher(ctx))
        draws, spent = draw()
        found = [*world.measure(draws, ctx), Measurement("nfe", spent, len(draws))]
        # The sheet shows the noise that all methods share: the first draw, or a smaller one of its own where that is large.
        first = draws[:1] if options.samples <= SHEET else draw(draws=1, samples=SHEET)[0]
        return Judgement(found, {"picture": Artifact.png(world.pixels(first, ctx))})


SUITE = ImageGenerationSuite()
