"""Score SDE (Song et al. 2020): the teacher itself, sampled by the reverse of a stochastic differential equation or by its ODE."""

from __future__ import annotations

from distillbench.cards.card import Beats, Card, Choice, Integer, Paper, Real, Reported
from distillbench.problems.image_generation.problem import ImageGeneration
from distillbench.problems.image_generation.sde import (
    SDES,
    ancestral_step,
    flow_step,
    langevin_step,
    reverse_diffusion_step,
    score,
    time_grid,
    transition,
)
from distillbench.training.run import Run
from distillbench.training.student import Student

__all__ = ["ancestral_step", "distill", "flow_step", "langevin_step", "reverse_diffusion_step", "score", "transition"]

CARD = Card(
    slug="score_sde",
    version=1,
    trains=False,
    problem="image-generation",
    title="Score SDE samplers",
    control=True,
    paper=Paper(
        title="Score-Based Generative Modeling through Stochastic Differential Equations",
        year=2020,
        arxiv="2011.13456",
        catalogue="score_sde",
        row=62,
    ),
    equations={
        "score": "s(x, t) = (a D(x/a; std/a) - x) / std^2  for x_t = a x_0 + std eps: VE a = 1; VP std^2 = 1 - a^2; sub-VP std = 1 - a^2",
        "transition": "x_t = r x_t' + G z,  r = a_t / a_t',  G^2 = std_t^2 - r^2 std_t'^2",
        "reverse_diffusion_step": "x' = (2 - r) x + G^2 s + G z",
        "ancestral_step": "x' = (x + G^2 s) / r + G (std_t' / std_t) z",
        "langevin_step": "x' = x + e s + sqrt(2 e) z,  e = 2 r^2 (snr |z| / |s|)^2",
        "flow_step": "a Heun step of dx/dt = -beta x / 2 - g^2 s / 2",
    },
    hyperparameters={
        "sde": Choice(
            "ve", options=("ve", "vp", "subvp"), note="the paper's best FID is a VE model's, its best likelihood a sub-VP model's"
        ),
        "sampler": Choice(
            "predictor_corrector",
            options=("predictor_corrector", "reverse_diffusion", "ancestral", "probability_flow"),
            note="the paper's best samples are of the first",
        ),
        "steps": Integer(100, ge=4, note="evaluations per sample at most; the paper takes 1,000 to 2,000, about 140 for the flow"),
        "snr": Real(0.16, gt=0, note="of the corrector: 0.16 for the paper's VE models, 0.01 for its VP models"),
    },
    claims=[
        Beats("scratch", source="many evaluations against one"),
        Beats("teacher_one_step", source="many evaluations against one"),
        Reported(
            suite="image-generation", setting="cifar10", metric="fid", value=2.20, source="abstract; NCSN++ deep, VE, predictor-corrector"
        ),
    ],
    deviations=[
        "Nothing is trained and nothing distilled: the teacher's denoiser gives the score of all three SDEs, where the paper trains a "
        "network for each. It leaves with its own weights and takes more evaluations than a student may: a yardstick, never ranked.",
        "The forward steps are exact for any step size; for sub-VP the paper's are Euler's. Ancestral sampling, which the paper has for "
        "VE and VP, follows for sub-VP from the same Gaussian, and for VP takes the smaller of DDPM's two variances.",
        "alpha_i of the corrector is the exact r^2, for sub-VP too.",
        "The flow takes Heun steps in the time of the SDE, not an adaptive Runge-Kutta method; Euler-Maruyama is left out.",
        "Starts at the largest level of the setting with noise of its own std (the paper: N(0, I) for VP and sub-VP).",
        "The authors' code was not run: the tests compare with closed forms.",
    ],
    notes="Tune split, one seed. digits, VE, fd_digits_cnn: 0.482 by reverse diffusion, 0.482 ancestral, 0.493 predictor-corrector, "
    "0.560 by the flow; VP: 0.502 by reverse diffusion, 0.557 predictor-corrector. On gaussians predictor-corrector has the "
    "narrowest modes: 1.01 times too wide, 1.04 by reverse diffusion.",
)


def distill(problem: ImageGeneration, run: Run, *, sde: str, sampler: str, steps: int, snr: float) -> Student:
    """No training: the teacher's own weights with a recipe, evenly placed in the time of the SDE. Only they may take many steps."""
    count = {"predictor_corrector": steps // 2, "probability_flow": (steps + 1) // 2}.get(sampler, steps)
    levels = time_grid(SDES[sde], count, sigma_min=problem.sigma_min, sigma_max=problem.sigma_max)
    own = {"snr": snr} if sampler == "predictor_corrector" else {}
    recipe = {"rule": sampler, "sigmas": levels, "sde": sde, **own, **problem.guidance}
    return run.export(problem.teacher.trainable_copy(), recipe=recipe)
