"""SIM (Luo et al. 2024): a one-step generator by score divergences with any distance; here the pseudo-Huber one of the paper."""

from __future__ import annotations

from torch import Tensor

from distillbench.cards.card import Beats, Card, Integer, Paper, Real, Reported
from distillbench.problems.image_generation.matching import Matching
from distillbench.problems.image_generation.problem import ImageGeneration
from distillbench.training.data import Batch
from distillbench.training.run import Losses, Run
from distillbench.training.student import Student

CARD = Card(
    slug="sim",
    version=1,
    problem="image-generation",
    title="Score implicit matching",
    paper=Paper(
        title="One-Step Diffusion Distillation through Score Implicit Matching",
        year=2024,
        arxiv="2410.16794",
        catalogue="sim",
        row=6,
    ),
    objective="implicit_loss",
    equations={
        "implicit_loss": "L = d'(y)^T (f_psi - x),  y = f_phi - f_psi,  d'(y) = y / sqrt(|y|^2 + c^2),  f = f(x + sigma eps, sigma),  "
        "x = G(z); phi is the teacher, psi the fake score",
    },
    hyperparameters={
        "c": Real(0.01, gt=0, note="of the pseudo-Huber distance, in the unit of the data, for a row's whole length"),
        "generator_rate": Real(0.2, gt=0, note="times the track's learning rate; the paper has one rate for both"),
        "fake_rate": Real(1.0, gt=0, note="times the track's learning rate"),
        "beta1": Real(0.0, ge=0, lt=1, note="of both optimizers, as in the paper"),
        "fake_updates": Integer(2, ge=1, note="fake-score steps per generator step"),
        "start_sigma": Real(2.5, gt=0, note="noise level the generator is evaluated at, the paper's"),
        "high": Real(0.8, gt=0, le=1, note="largest noise level compared, as a position on the Karras schedule"),
        "average": Real(0.99, ge=0, lt=1, note="decay of the generator's average, which is exported; 0 exports the last weights"),
        "initial_share": Real(0.15, gt=0, lt=1, note="part of the budget for the initialisation, where weights cannot be copied"),
    },
    claims=[
        Beats("scratch", source="one step of the generator against one step of a denoiser"),
        Beats("teacher_one_step", source="abstract: one-step generation with almost no loss against the teacher"),
        Reported(suite="image-generation", setting="cifar10", metric="fid", value=2.06, source="abstract, unconditional"),
    ],
    deviations=[
        "The authors published inference code only: the loss is from the paper's equations, without a comparison with their code.",
        "The distance is taken between denoisers, y = f_phi - f_psi, not between scores (a factor sigma^2): c has the data's unit, and "
        "the weight of noise levels is that of positions uniform on the Karras schedule. The paper's value of c is not known to us.",
        "The exact teacher has no weights to copy: generator and fake score start from a regression onto its answers.",
        "The fake score takes two steps for each of the generator's, with a larger learning rate, because training is so short.",
        "The fake score learns at levels uniform on the Karras schedule, where the code base that the paper builds on draws ln sigma from "
        "N(-1.2, 1.2^2).",
    ],
)


def implicit_loss(generated: Tensor, real_answer: Tensor, fake_answer: Tensor, *, c: float) -> Tensor:
    """d'(y)^T (f_psi - x) of a row, with y = f_phi - f_psi and d(y) = sqrt(|y|^2 + c^2) - c, so d'(y) = y / sqrt(|y|^2 + c^2).

    The score-gradient theorem of the paper (section 3) in x_0 form: its minus sign, -d'(s_psi - s_phi)^T (s_psi - s_cond), is in y.
    With frozen networks its gradient through x and x_t is that of E d(y) at a frozen law of x_t. At the exact fake score the value
    averages to 0, however far the generator is. |y| is over the whole row.
    generated x, real_answer f_phi(x_t), fake_answer f_psi(x_t), with their graphs: (B, ...); returns (B,).
    """
    difference, residual = (real_answer - fake_answer).flatten(1), (fake_answer - generated).flatten(1)
    return (difference * residual).sum(1) / (difference.square().sum(1) + c**2).sqrt()


def distill(
    problem: ImageGeneration,
    run: Run,
    *,
    c: float,
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
        return run.loss(batch, implicit=implicit_loss(generated, real, fake, c=c))

    return game.train(
        generator_loss, generator_rate=generator_rate, fake_rate=fake_rate, fake_updates=fake_updates, beta1=beta1, average=average
    )
