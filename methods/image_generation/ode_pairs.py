"""Noise-image pairs (Luhman and Luhman 2021): one step regresses onto where the teacher's deterministic sampler takes each noise."""

from __future__ import annotations

from torch import Tensor

from distillbench.cards.card import Beats, Card, Integer, Paper, Real
from distillbench.problems.image_generation.edm import row_mean
from distillbench.problems.image_generation.problem import ImageGeneration
from distillbench.problems.image_generation.start import initialise, ode_pairs, some_pairs
from distillbench.training.data import Batch
from distillbench.training.run import Losses, Run
from distillbench.training.student import Student

CARD = Card(
    slug="ode_pairs",
    version=1,
    problem="image-generation",
    title="Noise-image pairs",
    paper=Paper(
        title="Knowledge Distillation in Iterative Generative Models for Improved Sampling Speed",
        year=2021,
        arxiv="2101.02388",
        catalogue="ode_pairs",
    ),
    objective="pair_loss",
    equations={"pair_loss": "L = 1/2 mean (f_theta(s z, s) - Phi(z))^2,  Phi(z) where the teacher's ODE takes sigma_max z, labels alike"},
    hyperparameters={
        "pairs": Integer(7000, ge=1, note="noise-sample pairs made before training; 1.02 million for CIFAR-10"),
        "rate": Real(1.0, gt=0, note="times the track's learning rate"),
        "average": Real(0.99, ge=0, lt=1, note="decay of the student's average, which is exported; 0 exports the last weights"),
        "start_sigma": Real(80.0, gt=0, note="noise level the student is evaluated at, sigma_max at most; sigma_max in the paper"),
        "initial_share": Real(0.1, gt=0, lt=1, note="part of the budget for the initialisation, where weights cannot be copied"),
    },
    claims=[
        Beats("scratch", source="one step of the student against one step of a denoiser"),
        Beats("teacher_one_step", source="abstract: sampling in one step at a quality comparable to GANs"),
    ],
    deviations=[
        "Pairs by 18 Heun levels (the track's converged teacher) instead of 100 DDIM steps; guided where the track's teacher is.",
        "The exact teacher has no weights to copy: the student starts from a regression onto its answers.",
        "The labels of the pairs are those of real samples; the paper's networks have no classes.",
        "The track's AdamW with a falling rate; an average of decay 0.99 is exported.",
        "No code of the authors was run: the oracle and closed forms stand for it.",
    ],
    notes="Tune split of digits, one seed, fd_digits_cnn: 0.72 with 7,000 pairs, 0.70 with 14,000, 0.71 at twice the rate, 0.65 from "
    "noise level 2.5. On gaussians either level gives the same.",
)


def pair_loss(output: Tensor, target: Tensor) -> Tensor:
    """1/2 mean (f - y)^2 over a row: minus the log-likelihood of y under N(f, 1), for the mean over components.   (B, ...) -> (B,).

    Luhman and Luhman 2021, section 3. The paper sums over components: a factor that does not depend on anything trained.
    """
    return row_mean((output - target.detach()) ** 2) / 2


def distill(
    problem: ImageGeneration, run: Run, *, pairs: int, rate: float, average: float, start_sigma: float, initial_share: float
) -> Student:
    """Make the pairs, then regress. No real sample is looked at beside its label."""
    initialise(problem, run, share=initial_share)
    made = ode_pairs(problem, run, pairs)
    recipe = problem.recipe(1, start_sigma)
    [start] = problem.few_steps(1, start_sigma)

    def loss(batch: Batch) -> Losses:
        noise, target, condition = some_pairs(made, batch)
        answer = problem.student(start * noise, noise.new_full((len(noise),), start), condition)
        return run.loss(batch, pairs=pair_loss(answer, target))

    base = run.training.learning_rate
    with run.phase("regress"):
        return run.fit(problem.student, loss, problem.batches, ema=average or None, learning_rate=base * rate, recipe=recipe)
