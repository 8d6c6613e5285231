"""Diff-Instruct (Luo et al. 2023): a one-step generator by the integral KL divergence to the teacher, a difference of two scores."""

from __future__ import annotations

from torch import Tensor

from distillbench.cards.card import Beats, Card, Integer, Paper, Real, Reported
from distillbench.problems.image_generation.edm import per_row
from distillbench.problems.image_generation.matching import Matching
from distillbench.problems.image_generation.problem import ImageGeneration
from distillbench.training.data import Batch
from distillbench.training.run import Losses, Run
from distillbench.training.student import Student

CARD = Card(
    slug="diff_instruct",
    version=1,
    problem="image-generation",
    title="Diff-Instruct",
    paper=Paper(
        title="Diff-Instruct: A Universal Approach for Transferring Knowledge From Pre-trained Diffusion Models",
        year=2023,
        arxiv="2305.18455",
        code="https://github.com/pkulwj1994/diff_instruct/blob/0c37389fbfb1f5fc38708dec57d0dae257726460/training/di_loss.py",
        catalogue="diff_instruct",
    ),
    objective="instruct_loss",
    frozen={"instruct_loss": ["real_denoised", "fake_denoised"]},
    equations={
        "instruct_loss": "L = sum sg(f_psi - f_phi) x,  dL/dx = f_psi - f_phi = sigma^2 (s_psi - s_phi) at x + sigma eps,  x = G(z); "
        "phi is the teacher, psi the fake score",
    },
    hyperparameters={
        "generator_rate": Real(0.2, gt=0, note="times the track's learning rate; the authors have one rate for both"),
        "fake_rate": Real(1.0, gt=0, note="times the track's learning rate"),
        "beta1": Real(0.0, ge=0, lt=1, note="of both optimizers"),
        "fake_updates": Integer(2, ge=1, note="fake-score steps per generator step; the paper takes 1"),
        "start_sigma": Real(1.0, gt=0, note="noise level the generator is evaluated at, the authors' init_sigma"),
        "level_mean": Real(-1.2, note="mean of ln sigma where the scores are compared, the authors' P_mean"),
        "level_std": Real(1.2, gt=0, note="its standard deviation, the authors' P_std"),
        "average": Real(0.99, ge=0, lt=1, note="decay of the generator's average, which is exported; 0 exports the last weights"),
        "initial_share": Real(0.15, gt=0, lt=1, note="part of the budget for the initialisation, where weights cannot be copied"),
    },
    claims=[
        Beats("scratch", source="one step of the generator against one step of a denoiser"),
        Beats("teacher_one_step", source="abstract: knowledge of a diffusion model for a one-step generator"),
        Reported(suite="image-generation", setting="cifar10", metric="fid", value=4.53, source="table of CIFAR-10, unconditional"),
        Reported(suite="image-generation", setting="imagenet64", metric="fid", value=5.57, source="table of ImageNet 64x64"),
    ],
    deviations=[
        "The exact teacher has no weights to copy: generator and fake score start from a regression onto its answers.",
        "The fake score takes two steps for each of the generator's, with a larger learning rate, because training is so short.",
        "The fake score learns at levels uniform on the Karras schedule; the authors draw ln sigma from N(-1.2, 1.2^2) for it too.",
        "Both denoisers answer without dropout, where the authors' code leaves it on with one mask for the two.",
    ],
)


def instruct_loss(generated: Tensor, real_denoised: Tensor, fake_denoised: Tensor) -> Tensor:
    """sum sg(f_psi - f_phi) x over a row: its gradient by x is f_psi - f_phi = sigma^2 (s_psi - s_phi).

    The gradient of the integral KL divergence (section 3.2 of the paper) with weight sigma^2 times the density of the levels.
    The value has no meaning, not even a sign. Backpropagating through the denoisers would be another method.
    generated x, real_denoised f_phi(x_t), fake_denoised f_psi(x_t): (B, ...); returns (B,).
    """
    return ((fake_denoised - real_denoised).detach() * generated).flatten(1).sum(1)


def distill(
    problem: ImageGeneration,
    run: Run,
    *,
    generator_rate: float,
    fake_rate: float,
    beta1: float,
    fake_updates: int,
    start_sigma: float,
    level_mean: float,
    level_std: float,
    average: float,
    initial_share: float,
) -> Student:
    """Generator and fake score in turn; the difference of the two scores is the generator's gradient."""
    game = Matching(problem, run, start=start_sigma, initial_share=initial_share)

    def generator_loss(batch: Batch) -> Losses:
        generated = game.generate(batch)
        sigma = problem.lognormal_levels(batch, mean=level_mean, std=level_std)
        noisy = generated.detach() + per_row(sigma, generated) * batch.noise(generated.shape, "noise")
        return run.loss(batch, instruct=instruct_loss(generated, *game.denoised(noisy, sigma, batch.condition)))

    return game.train(
        generator_loss, generator_rate=generator_rate, fake_rate=fake_rate, fake_updates=fake_updates, beta1=beta1, average=average
    )
