"""SiD (Zhou et al. 2024): a one-step generator by the Fisher divergence to the teacher, whose gradient passes through both scores."""

from __future__ import annotations

from torch import Tensor

from distillbench.cards.card import Beats, Card, Integer, Paper, Real, Reported
from distillbench.problems.image_generation.edm import per_row, row_mean
from distillbench.problems.image_generation.matching import Matching
from distillbench.problems.image_generation.problem import ImageGeneration
from distillbench.training.data import Batch
from distillbench.training.run import Losses, Run
from distillbench.training.student import Student

CARD = Card(
    slug="sid",
    version=1,
    problem="image-generation",
    title="Score identity distillation",
    paper=Paper(
        title="Score identity Distillation: Exponentially Fast Distillation of Pretrained Diffusion Models for One-Step Generation",
        year=2024,
        arxiv="2404.04057",
        code="https://github.com/mingyuanzhou/SiD/blob/01fbb13cf18411e5f70d187c8fb2559567e5ae1c/training/sid_loss.py",
        catalogue="sid",
    ),
    objective="identity_loss",
    equations={
        "identity_loss": "L = sum (f_phi - f_psi) (f_phi - x - alpha (f_phi - f_psi)) / omega,  f = f(x + sigma eps, sigma),  x = G(z),  "
        "omega = sg mean |x - f_phi|; phi is the teacher, psi the fake score",
    },
    hyperparameters={
        "alpha": Real(1.2, ge=0, note="the paper's value for most data sets; 1.0 for AFHQ"),
        "generator_rate": Real(0.2, gt=0, note="times the track's learning rate; the paper has one rate for both"),
        "fake_rate": Real(1.0, gt=0, note="times the track's learning rate"),
        "beta1": Real(0.0, ge=0, lt=1, note="of both optimizers, as in the paper"),
        "fake_updates": Integer(2, ge=1, note="fake-score steps per generator step; the paper takes 1"),
        "start_sigma": Real(2.5, gt=0, note="noise level the generator is evaluated at, the paper's"),
        "high": Real(0.8, gt=0, le=1, note="largest noise level compared, as a position on the Karras schedule: t_max = 800 of 1000"),
        "average": Real(0.99, ge=0, lt=1, note="decay of the generator's average, which is exported; 0 exports the last weights"),
        "initial_share": Real(0.15, gt=0, lt=1, note="part of the budget for the initialisation, where weights cannot be copied"),
    },
    claims=[
        Beats("scratch", source="one step of the generator against one step of a denoiser"),
        Beats("teacher_one_step", source="abstract: one-step generation that approaches or passes the teacher"),
        Beats("diff_instruct", source="CIFAR-10 and ImageNet 64x64 tables"),
        Reported(
            suite="image-generation", setting="cifar10", metric="fid", value=1.923, source="README of the authors' code, unconditional"
        ),
        Reported(suite="image-generation", setting="imagenet64", metric="fid", value=1.524, source="README of the authors' code"),
    ],
    deviations=[
        "The exact teacher has no weights to copy: generator and fake score start from a regression onto its answers.",
        "The fake score takes two steps for each of the generator's, with a larger learning rate, because training is so short.",
        "The fake score learns at levels uniform on the Karras schedule; the paper draws ln sigma from N(-1.2, 1.2^2).",
        "The loss is not scaled by 100 (that is for half precision), and the generator's average has no ramp.",
        "A sample that is not finite ends the run, where the authors' code drops it.",
    ],
    notes="Tune split of gaussians, one seed: alpha 1.0 does as 1.2 (mmd2 0.010 and 0.011). At generator_rate 0.5 the run diverged at "
    "step 1178 of the match.",
)

SMALLEST = 1e-5  # of omega, as in the authors' code


def identity_loss(generated: Tensor, real_answer: Tensor, fake_answer: Tensor, *, alpha: float) -> Tensor:
    """sum (f_phi - f_psi) (f_phi - x - alpha (f_phi - f_psi)) / omega over a row, omega = sg mean |x - f_phi|.

    Section 3 of the paper: at the exact fake score the first product averages to |f_phi - f_psi|^2 too, so the value is
    (1 - alpha) of it and says nothing about convergence; alpha = 1/2 has the gradient of half the Fisher divergence.
    The gradient is to pass through x and through both denoisers to the sample: keep their graphs.
    generated x, real_answer f_phi(x_t), fake_answer f_psi(x_t): (B, ...); returns (B,).
    """
    difference, residual = real_answer - fake_answer, real_answer - generated
    size = row_mean(residual.detach().abs()).clamp(min=SMALLEST)
    return (difference * (residual - alpha * difference) / per_row(size, generated)).flatten(1).sum(1)


def distill(
    problem: ImageGeneration,
    run: Run,
    *,
    alpha: float,
    generator_rate: float,
    fake_rate: float,
    beta1: float,
    fake_updates: int,
    start_sigma: float,
    high: float,
    average: float,
    initial_share: float,
) -> Student:
    """Generator and fake score in turn; the generator's gradient passes through teacher and fake score."""
    game = Matching(problem, run, start=start_sigma, high=high, initial_share=initial_share)

    def generator_loss(batch: Batch) -> Losses:
        generated = game.generate(batch)
        noisy, sigma = game.perturb(batch, generated)
        real, fake = game.denoised(noisy, sigma, batch.condition, differentiable=True)
        return run.loss(batch, identity=identity_loss(generated, real, fake, alpha=alpha))

    return game.train(
        generator_loss, generator_rate=generator_rate, fake_rate=fake_rate, fake_updates=fake_updates, beta1=beta1, average=average
    )
