"""DMD (Yin et al. 2023): a one-step generator whose distribution is pulled to the teacher's by the difference of two scores."""

from __future__ import annotations

from distillbench.cards.card import Beats, Card, Integer, Paper, Real, Reported
from distillbench.problems.image_generation.edm import row_mean
from distillbench.problems.image_generation.matching import Matching, matching_gradient, surrogate_loss
from distillbench.problems.image_generation.problem import ImageGeneration
from distillbench.problems.image_generation.start import ode_pairs, some_pairs
from distillbench.training.data import Batch
from distillbench.training.run import Losses, Run
from distillbench.training.student import Student

CARD = Card(
    slug="dmd",
    version=2,
    passes=2,
    supersedes=1,
    problem="image-generation",
    title="Distribution matching distillation",
    paper=Paper(
        title="One-step Diffusion with Distribution Matching Distillation",
        year=2023,
        arxiv="2311.18828",
        code="https://github.com/tianweiy/DMD2/blob/8d8fa55633d47cfb81bbc7a892e7248f9518763f/main/edm/edm_guidance.py",
        catalogue="dmd",
    ),
    objective=("matching_gradient", "surrogate_loss"),
    frozen={"matching_gradient": ["real_denoised", "fake_denoised", "return"], "surrogate_loss": ["gradient"]},
    equations={
        "matching_gradient": "g = (mu_fake(x_t, t) - mu_real(x_t, t)) / mean |x - mu_real(x_t, t)|,  x_t = x + sigma_t eps,  x = G(z)",
        "surrogate_loss": "L_dm = 1/2 mean (x - sg(x - g))^2, dL/dx = g / numel(x);   L_G = L_dm + lambda_reg mean (G(z_ref) - y_ref)^2",
    },
    hyperparameters={
        "regression_weight": Real(5.0, ge=0, note="lambda_reg; the paper's value for CIFAR-10; 0 leaves the pairs out"),
        "pairs": Integer(4096, ge=1, note="noise-sample pairs of the teacher's ODE, made before training"),
        "generator_rate": Real(0.333, gt=0, note="times the track's learning rate"),
        "fake_rate": Real(0.333, gt=0, note="times the track's learning rate"),
        "beta1": Real(0.9, ge=0, lt=1),
        "fake_updates": Integer(1, ge=1, note="fake-score steps per generator step; DMD2 takes 5"),
        "start_sigma": Real(2.5, gt=0, note="noise level the generator is evaluated at"),
        "low": Real(0.02, ge=0, lt=1, note="smallest noise level matched, as a position on the Karras schedule"),
        "high": Real(0.98, gt=0, le=1),
        "average": Real(0.99, ge=0, lt=1, note="decay of the generator's average, which is exported; 0 exports the last weights"),
        "initial_share": Real(0.15, gt=0, lt=1, note="part of the budget for the initialisation, where weights cannot be copied"),
    },
    claims=[
        Beats("scratch", source="one step of the generator against one step of a denoiser"),
        Beats("teacher_one_step", source="abstract: one-step generation with the teacher's quality"),
        Reported(suite="image-generation", setting="imagenet64", metric="fid", value=2.62, source="abstract"),
    ],
    deviations=[
        "The exact teacher has no weights to copy: generator and fake score start from a regression onto its answers.",
        "The regression term is a mean squared error; LPIPS needs images.",
        "No weight decay, warm-up or gradient clipping; the learning rates were chosen on the tune split of gaussians.",
        "An average of decay 0.99 is exported; the authors export the last weights.",
        "The generator is evaluated at noise level 2.5, where the paper's EDM generator takes the largest level.",
    ],
    notes="The pairs' weight was chosen on the tune split of gaussians with 512,000 examples: mmd2 0.0096 at 0, 0.0025 at 1, 0.0004 at 5.",
)


def distill(
    problem: ImageGeneration,
    run: Run,
    *,
    regression_weight: float,
    pairs: int,
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
    """Generator and fake score in turn; the generator also regresses onto pairs of the teacher's ODE."""
    game = Matching(problem, run, start=start_sigma, low=low, high=high, initial_share=initial_share)
    references = ode_pairs(problem, run, pairs) if regression_weight else None

    def generator_loss(batch: Batch) -> Losses:
        generated = game.generate(batch)
        noisy, sigma = game.perturb(batch, generated.detach())
        gradient = matching_gradient(generated, *game.denoised(noisy, sigma, batch.condition))
        terms = {"matching": surrogate_loss(generated, gradient)}
        if references is not None:
            noise, target, condition = some_pairs(references, batch)
            answer = game.student(game.sigmas[0] * noise, noise.new_full((len(noise),), game.sigmas[0]), condition)
            terms["regression"] = regression_weight * row_mean((answer - target) ** 2)
        return run.loss(batch, **terms)

    return game.train(
        generator_loss, generator_rate=generator_rate, fake_rate=fake_rate, fake_updates=fake_updates, beta1=beta1, average=average
    )
