"""rCM (Zheng et al. 2025): a continuous-time consistency model, kept sharp by the difference of two scores on its own samples."""

from __future__ import annotations

from torch import Tensor

from distillbench.cards.card import Beats, Card, Integer, Paper, Real
from distillbench.problems.image_generation.edm import per_row, row_mean
from distillbench.problems.image_generation.matching import Matching
from distillbench.problems.image_generation.problem import ImageGeneration
from distillbench.problems.image_generation.trigflow import draw, scm_loss, warm
from distillbench.training.data import Batch
from distillbench.training.run import Losses, Run
from distillbench.training.student import Student

CARD = Card(
    slug="rcm",
    version=1,
    passes=2,
    problem="image-generation",
    title="Score-regularised continuous-time consistency",
    paper=Paper(
        title="Large Scale Diffusion Distillation via Score-Regularized Continuous-Time Consistency",
        year=2025,
        arxiv="2510.08431",
        code="https://github.com/NVlabs/rcm/blob/5b41aa92c493d0627df8651996a04196e9de186f/rcm/models/t2v_model_distill_rcm.py",
        catalogue="rcm",
        row=166,
    ),
    objective=("scm_loss", "regulariser_gradient", "regulariser"),
    frozen={
        "scm_loss": ["tangent"],
        "regulariser_gradient": ["real_denoised", "fake_denoised", "return"],
        "regulariser": ["gradient"],
    },
    equations={
        "scm_loss": "L_sCM = mean (F - sg(F) - g / (|g| + c))^2,  g = cos(t) df/dt along the teacher's flow, by one JVP",
        "regulariser_gradient": "h = (x0_fake(x_t, t) - x0_teacher(x_t, t)) / mean |x - x0_teacher|,  x_t = x + sigma_t eps,  x = G(z)",
        "regulariser": "L_DMD = mean (x - sg(x - h))^2, dL/dx = 2 h / numel(x);   L = w_sCM L_sCM + w_DMD L_DMD",
    },
    hyperparameters={
        "consistency_weight": Real(1.0, ge=0, note="w_sCM; the authors take 100 at 2.1 million components per sample, see deviations"),
        "regulariser_weight": Real(1.0, ge=0, note="w_DMD; 0 is sCM alone, without a fake score's gradient"),
        "mean": Real(0.7, note="of ln tan t; the authors' for Wan 2.1"),
        "std": Real(1.6, gt=0, note="of ln tan t; the authors'"),
        "tangent_constant": Real(0.1, gt=0, note="c; the authors'"),
        "warmup": Real(0.1, ge=0, lt=1, note="part of the loop in which r rises to 1, without the regulariser"),
        "steps": Integer(0, ge=0, note="evaluations per sample; 0 is as many as the track allows"),
        "start_sigma": Real(80.0, gt=0, note="largest noise level of a sample, at most the track's; the authors' 80"),
        "generator_rate": Real(1.0, gt=0, note="times the track's learning rate"),
        "fake_rate": Real(1.0, gt=0, note="times the track's learning rate; the authors' is a fifth of the generator's"),
        "beta1": Real(0.0, ge=0, lt=1, note="the authors'"),
        "fake_updates": Integer(2, ge=1, note="fake-score steps per generator step; the authors take 4"),
        "average": Real(0.99, ge=0, lt=1, note="decay of the generator's average, which is exported; 0 exports the last weights"),
        "initial_share": Real(0.5, gt=0, lt=1, note="part of the budget for the initialisation, where weights cannot be copied"),
    },
    claims=[
        Beats("scratch", source="few steps of the consistency function against as many of a denoiser"),
        Beats("teacher_one_step", source="abstract: the teacher's quality in 1 to 4 steps"),
        Beats("dmd", source="abstract: matches or surpasses DMD2"),
    ],
    deviations=[
        "Both losses are means over components where the authors sum. The normalised tangent has length near 1 over a whole sample, so "
        "the authors' 100 to 1 at 2.1 million components balances like 0.6 to 1 at 64 and 0.1 to 1 at 2; here it is 1 to 1.",
        "The warm-up multiplies the whole second part of the tangent by r, as sCM does; the authors' code leaves the JVP out of it.",
        "Noise levels of the regulariser and the fake score are uniform on the Karras schedule (theirs: tan t = 5u / (1 - u)); its "
        "weight 1 / sin^2 t is theirs. The fake score also learns during the warm-up, and takes 2 steps where theirs takes 4.",
        "Generated inputs come from the fixed levels the student is sampled at (theirs: random levels, sorted).",
        "Data are the setting's real samples, theirs were synthetic videos of the teacher; the average has a fixed decay.",
        "The exact teacher has no weights to copy: half of the budget goes into a regression onto its answers.",
        "The objective was read from the authors' code; the paper's own formulas were not compared.",
    ],
    notes="Tune split, one seed: without the regulariser fd_digits_cnn on digits is 1.57 and not 0.74; on gaussians it gains little.",
)


def regulariser_gradient(generated: Tensor, real_denoised: Tensor, fake_denoised: Tensor) -> Tensor:
    """h = (x0_fake - x0_teacher) / max(mean |x - x0_teacher|, 1e-5): the reverse divergence's gradient, each row's own divisor.

    generated x, real_denoised, fake_denoised: (B, ...); returns (B, ...), without a graph. DMD's gradient, but for the floor.
    """
    size = row_mean((generated - real_denoised).abs()).clamp(min=1e-5)
    return ((fake_denoised - real_denoised) / per_row(size, generated)).detach()


def regulariser(generated: Tensor, gradient: Tensor) -> Tensor:
    """mean (x - sg(x - h))^2 over a row: its derivative by x is 2 h / numel(row).   (B, ...), (B, ...) -> (B,).

    Without the half of DMD's own loss, so twice its gradient.
    """
    return row_mean((generated - (generated - gradient).detach()) ** 2)


def distill(
    problem: ImageGeneration,
    run: Run,
    *,
    consistency_weight: float,
    regulariser_weight: float,
    mean: float,
    std: float,
    tangent_constant: float,
    warmup: float,
    steps: int,
    start_sigma: float,
    generator_rate: float,
    fake_rate: float,
    beta1: float,
    fake_updates: int,
    average: float,
    initial_share: float,
) -> Student:
    """The consistency of data with noise and the score difference on generated samples, in one update; then the fake score's."""
    game = Matching(problem, run, steps=steps, start=start_sigma, initial_share=initial_share)

    def loss(batch: Batch) -> Losses:
        r = warm(run.progress, warmup)
        velocity, tangent, _ = draw(problem, run, game.student, batch, mean=mean, std=std, warmup=r, c=tangent_constant)
        terms = {"consistency": consistency_weight * scm_loss(velocity, tangent)}
        if r == 1 and regulariser_weight:
            generated = game.generate(batch)
            noisy, sigma = game.perturb(batch, generated.detach())
            gradient = regulariser_gradient(generated, *game.denoised(noisy, sigma, batch.condition))
            terms["regulariser"] = regulariser_weight * regulariser(generated, gradient)
        return run.loss(batch, **terms)

    return game.train(loss, generator_rate=generator_rate, fake_rate=fake_rate, fake_updates=fake_updates, beta1=beta1, average=average)
