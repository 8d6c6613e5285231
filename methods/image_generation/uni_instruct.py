"""Uni-Instruct (Wang et al. 2025): any f-divergence, as the score differences it is made of along the noise, made small."""

from __future__ import annotations

import math

from torch import Tensor

from distillbench.cards.card import Beats, Card, Choice, Integer, Paper, Real, Reported
from distillbench.problems.image_generation.adversarial import logistic_generator_loss
from distillbench.problems.image_generation.density_ratio import Discriminator, curvature, density_curvature
from distillbench.problems.image_generation.edm import per_row, row_mean
from distillbench.problems.image_generation.matching import Matching
from distillbench.problems.image_generation.problem import ImageGeneration
from distillbench.training.data import Batch
from distillbench.training.run import Losses, Run
from distillbench.training.student import Student

CARD = Card(
    slug="uni_instruct",
    version=1,
    problem="image-generation",
    title="Uni-Instruct",
    paper=Paper(
        title="Uni-Instruct: One-step Diffusion Model through Unified Diffusion Divergence Instruction",
        year=2025,
        arxiv="2505.20755",
        code="https://github.com/a-little-hoof/Uni_Instruct/blob/3cdf92e8962e66525d175df0d4d378dbd977e0d0/fsim_training/fsim_loss.py",
        catalogue="uni_instruct",
        row=97,
    ),
    objective=("uni_instruct_loss", "logistic_generator_loss"),
    equations={
        "uni_instruct_loss": "L = law/2 (C - r C') |d|^2 + C d . (x - D_fake),  d = D_fake - D_real at x_t,  C(r) = r^2 f''(r):  "
        "at law 1 the gradient of E 1/2 C |d|^2; D_f(teacher || student) = integral of E 1/2 C |d|^2 / sigma^4 over sigma^2",
        "density_ratio": "r = clamp(exp(mean over heads of D(x_t))), teacher's density over student's;  d ln r / dx_t = -d / sigma^2",
    },
    hyperparameters={
        "divergence": Choice(
            "forward_kl",
            options=(
                "reverse_kl",
                "forward_kl",
                "jensen_shannon",
                "softened_reverse_kl",
                "squared_hellinger",
                "jeffreys",
                "neyman",
                "pearson",
                "power",
            ),
            note="the authors' default; their code also has reverse KL, 0.4 forward + 0.6 reverse KL, Jensen-Shannon and Pearson",
        ),
        "power": Real(0.5, note="k of the power family, whose C is r^k; 0 is reverse KL, 1 forward KL"),
        "law": Real(
            1.0,
            note="how far the student's distribution counts: 1 is the divergence's gradient, 0 holds it (SIM), 2 (1 - alpha) is SiD's",
        ),
        "slope": Choice(
            "none",
            options=("none", "scores", "discriminator"),
            note="where the ratio's gradient by x_t comes from; 'scores' is exact; the authors' code takes none in the second term",
        ),
        "ratio_limit": Real(10.0, ge=1, note="the ratio is kept within 1 / limit and limit"),
        "warmup": Real(0.1, ge=0, le=1, note="part of the run in which the ratio is taken as 1; authors: 200,000 images"),
        "gan_weight": Real(1e-3, ge=0, note="of the generator's logistic loss; authors 1e-4 in these units"),
        "critic_weight": Real(0.01, gt=0, note="of the discriminator's loss beside the fake score's; authors 0.01"),
        "generator_rate": Real(0.5, gt=0, note="times the track's learning rate; chosen on the tune split"),
        "fake_rate": Real(1.0, gt=0, note="times the track's learning rate"),
        "beta1": Real(0.0, ge=0, lt=1, note="authors 0"),
        "fake_updates": Integer(2, ge=1, note="fake-score steps per generator step; authors 1"),
        "start_sigma": Real(2.5, gt=0, note="noise level the generator is evaluated at; authors' value"),
        "low": Real(0.0, ge=0, lt=1, note="smallest noise level matched, as a position on the Karras schedule"),
        "high": Real(0.8, gt=0, le=1, note="the largest one; authors' value"),
        "average": Real(0.99, ge=0, lt=1, note="decay of the generator's average, which is exported; 0 exports the last weights"),
        "initial_share": Real(0.15, gt=0, lt=1, note="part of the budget for the initialisation, where weights cannot be copied"),
    },
    claims=[
        Beats("scratch", source="one step of the generator against one step of a denoiser"),
        Beats("teacher_one_step", source="abstract: one-step generation that outperforms the 79-step teacher"),
        Reported(suite="image-generation", setting="imagenet64", metric="fid", value=1.02, source="abstract"),
        Reported(suite="image-generation", setting="cifar10", metric="fid", value=1.38, source="abstract, conditional"),
    ],
    deviations=[
        "The objective is the gradient of the diffusion expansion, derived anew and checked by quadrature; the paper's theorems were not "
        "read. The authors' code differs where its ratio enters: it takes -l / (1 - l) or l / (1 - l) of a scaled loss l, here exp(logit); "
        "its Jensen-Shannon and Chi-Square weigh by the norm of a whole batch; its Reverse-KL stops before a ratio is defined.",
        "The default slope 'none' holds the ratio fixed as the authors' code does, which is not the exact gradient where C varies with r.",
        "The generator learns from the first step, with ratio 1 at first; authors: it waits for 100,000 images, and the ratio for 200,000.",
        "Real and generated samples get noise and levels of their own, uniform on the Karras schedule; authors: shared and log-normal.",
        "Means over components instead of sums; no clipping of the fake score's gradient; the generator's logistic loss is not divided "
        "by |x - mu_real|; 2 fake-score steps per generator step.",
        "The discriminator sees real data: its ratio is that of the data, not of a guided teacher, to the student.",
        "The exact teacher has no weights to copy: generator and fake score start from a regression onto its answers.",
    ],
    notes="Tune split, one seed: fd_digits_cnn on digits 0.67, and 0.81 at generator_rate 0.2. With a tenth of the budget of gaussians "
    "and generator_rate 0.2, mmd2 is 0.083 with slope 'none' and 0.092 with the exact 'scores'; 0.045 at generator_rate 1.",
)


def uni_instruct_loss(
    generated: Tensor,
    real_answer: Tensor,
    fake_answer: Tensor,
    ratio: Tensor,
    *,
    divergence: str,
    power: float,
    law: float,
) -> Tensor:
    """law/2 (C - r C') |d|^2 + C d . (x - D_fake), mean over components; d = D_fake(x_t, t) - D_real(x_t, t), C = r^2 f''(r).

    With both networks and r held as functions, and the gradient through x and x_t, its expectation has the gradient of
    sigma^4 E 1/2 C |s_student - s_teacher|^2 (at law 1), and the integral of that without sigma^4 over d sigma^2 is the
    f-divergence. The value is none: its second term is 0 in expectation where D_fake is exact.

    law 0 leaves out how the student's law answers: SIM's squared distance for reverse KL, where C = 1.

    generated x, real_answer D_real, fake_answer D_fake: (B, ...), with their graphs; ratio r = teacher / student at x_t: (B,) > 0, with a
    graph where its slope is to count.   Returns (B,).
    """
    difference = fake_answer - real_answer
    own = density_curvature(ratio, divergence=divergence, power=power) * row_mean(difference**2)
    return law / 2 * own + curvature(ratio, divergence=divergence, power=power) * row_mean(difference * (generated - fake_answer))


def density_ratio(logits: Tensor, noisy: Tensor, score_difference: Tensor, *, slope: str, limit: float) -> Tensor:
    """r = exp(mean logit) within [1/limit, limit], with the gradient by x_t that ``slope`` names.   Returns (B,).

    ``none``: no gradient. ``discriminator``: the logits' own. ``scores``: the value is the discriminator's, and the gradient of
    ln r is s_teacher - s_student, which is known without it. No gradient passes where r is at a limit.

    logits: (B, heads), positive for real.  noisy: (B, ...).  score_difference: s_student - s_teacher at ``noisy``, (B, ...).
    """
    log = logits.mean(1)
    if slope != "discriminator":
        log = log.detach()
    if slope == "scores":
        log = log - (score_difference.detach() * (noisy - noisy.detach())).flatten(1).sum(1)
    return log.clamp(-math.log(limit), math.log(limit)).exp()


def distill(
    problem: ImageGeneration,
    run: Run,
    *,
    divergence: str,
    power: float,
    law: float,
    slope: str,
    ratio_limit: float,
    warmup: float,
    gan_weight: float,
    critic_weight: float,
    generator_rate: float,
    fake_rate: float,
    beta1: float,
    fake_updates: int,
    start_sigma: float,
    low: float,
    high: float,
    average: float,
    initial_share: float,
) -> Student:
    """Generator against fake score and discriminator; the generator's gradient passes through both scores."""
    game = Matching(problem, run, start=start_sigma, low=low, high=high, initial_share=initial_share)
    discriminator = Discriminator(game)

    def generator_loss(batch: Batch) -> Losses:
        generated = game.generate(batch)
        noisy, sigma = game.perturb(batch, generated)
        real = problem.teacher.denoise(noisy, sigma, batch.condition, differentiable=True)
        fake, logits = discriminator.judge(game, noisy, sigma, batch.condition)
        limit = 1.0 if run.progress < warmup else ratio_limit
        ratio = density_ratio(logits, noisy, (fake - real) / per_row(sigma**2, noisy), slope=slope, limit=limit)
        size = row_mean((generated - real).abs()).detach().clamp(min=1e-5)  # the weight over noise levels, as in SiD
        loss = uni_instruct_loss(generated, real, fake, ratio, divergence=divergence, power=power, law=law)
        return run.loss(batch, divergence=loss / size, gan=gan_weight * logistic_generator_loss(logits))

    return game.train(
        generator_loss,
        generator_rate=generator_rate,
        fake_rate=fake_rate,
        fake_updates=fake_updates,
        beta1=beta1,
        average=average,
        fake_loss=lambda batch: discriminator.losses(game, batch, weight=critic_weight),
        extra=[discriminator],
    )
