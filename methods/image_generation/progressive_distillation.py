"""Progressive distillation (Salimans and Ho 2022): one step of the student learns two DDIM steps of the last one, and again."""

from __future__ import annotations

import torch
from torch import Tensor

from distillbench.cards.card import Beats, Card, Choice, Gains, Integer, Paper, Real, Reported
from distillbench.problems.image_generation.edm import Denoise, euler_step, karras_grid, per_row, row_mean
from distillbench.problems.image_generation.oracle import DenoiserOracle
from distillbench.problems.image_generation.problem import ImageGeneration
from distillbench.problems.image_generation.start import frozen, initialise
from distillbench.training.data import Batch
from distillbench.training.run import Losses, Run
from distillbench.training.student import Student

CARD = Card(
    slug="progressive_distillation",
    version=1,
    problem="image-generation",
    title="Progressive distillation",
    paper=Paper(
        title="Progressive Distillation for Fast Sampling of Diffusion Models",
        year=2022,
        arxiv="2202.00512",
        code="https://github.com/google-research/google-research/blob/1d4d2f1aa6f2883a790d2ae46a6ee8ab150d8f31/"
        "diffusion_distillation/diffusion_distillation/dpm.py",
        catalogue="progressive_distillation",
    ),
    objective="progressive_loss",
    frozen={"progressive_loss": ["target"]},
    equations={
        "two_step_target": "D* = (x'' - (s''/s) x) / (1 - s''/s),  x'' after two Euler steps of the teacher from s over s' to s''",
        "progressive_loss": "L = w(s) mean (D_theta(x, s) - D*)^2,  SNR = 1/s^2;  w = max(SNR, 1) (truncated), SNR + 1, SNR or 1",
    },
    hyperparameters={
        "steps": Integer(0, ge=0, note="evaluations per sample of the last student; 0 is as many as the track allows"),
        "rounds": Integer(4, ge=1, note="halvings: the first teacher takes steps * 2^rounds DDIM steps; 8192 steps in the paper"),
        "weight": Choice(
            "truncated", options=("truncated", "snr+1", "snr", "constant"), note="the paper compares the first two; their code has all four"
        ),
        "rate": Real(1.0, gt=0, note="times the track's learning rate; it falls to 0 in every round"),
        "initial_share": Real(0.25, gt=0, lt=1, note="part of the budget for the initialisation, where weights cannot be copied"),
    },
    claims=[
        Beats("scratch", source="one step of the last student against one step of a denoiser"),
        Beats("teacher_one_step", source="abstract: few steps without losing much quality"),
        Gains("steps", over=1, source="table 2: FID 4.51 in two steps, 9.12 in one"),
        Reported(suite="image-generation", setting="cifar10", metric="fid", value=9.12, source="one step, table 2"),
    ],
    deviations=[
        "In the variance-exploding form, where DDIM's step is Euler's: the same target and weights at sigma / alpha, which a test shows.",
        "Steps on the Karras schedule instead of evenly on the cosine one; the last goes to 0, where the consistency models' code stops at "
        "sigma_min.",
        "The first teacher takes 16 DDIM steps for a one-step student, not 1024 or more: the budget has 400 updates for all rounds.",
        "The network keeps EDM's parameterisation where the paper predicts x, v or both.",
        "A guided teacher's guidance is learnt in the first round (Meng et al. 2022 learn it in a stage of its own).",
        "The exact teacher has no weights to copy: the first student starts from a regression onto its answers.",
        "The track's AdamW and cosine to 0 in every round instead of Adam and a line; no gradient clipping.",
        "The authors' code needs jax and was not run: the oracle is their variance-preserving algorithm 2, the golden numbers are of the "
        "consistency models' implementation.",
    ],
    notes="Tune split of digits, one seed, fd_digits_cnn: 1.12 as it stands, 1.11 with weight snr+1, 1.22 at twice the rate.",
)


def two_step_target(denoise: Denoise, noisy: Tensor, sigma: Tensor, middle: Tensor, after: Tensor) -> Tensor:
    """The x_0 estimate with which one Euler step ends where two steps of the teacher do.   Returns (B, ...).

    D* = (x'' - (s''/s) x) / (1 - s''/s), with x' and x'' the teacher's Euler steps from ``noisy`` x (B, ...) at ``sigma`` s (B,) over
    ``middle`` s' to ``after`` s'', s > s' > s'' >= 0. At s'' = 0 it is x'', the teacher's second answer. Algorithm 2 and appendix G,
    with alpha = 1: an Euler step of the variance-exploding ODE is DDIM's step.
    """
    halfway = euler_step(denoise, noisy, sigma, middle)
    end = euler_step(denoise, halfway, middle, after)
    kept = per_row(after / sigma, noisy)
    return (end - kept * noisy) / (1 - kept)


def progressive_loss(denoised: Tensor, target: Tensor, sigma: Tensor, *, weight: str) -> Tensor:
    """w(s) times the mean over components of (D - D*)^2, at signal-to-noise ratio 1/s^2.   (B, ...), (B, ...), (B,) -> (B,).

    w = max(1/s^2, 1) (``truncated``: the larger of the errors of x_0 and of the noise), 1/s^2 + 1 (``snr+1``: the error of
    v = alpha eps - sigma x_0 for alpha^2 + sigma^2 = 1), 1/s^2 (``snr``: the noise's error) or 1 (``constant``). Section 4.
    """
    snr = sigma**-2
    weights = {"truncated": snr.clamp(min=1), "snr+1": snr + 1, "snr": snr, "constant": torch.ones_like(snr)}
    return weights[weight] * row_mean((denoised - target.detach()) ** 2)


def levels(problem: ImageGeneration, steps: int) -> Tensor:
    """Where ``steps`` DDIM steps start, and 0: (steps + 1,) float64. Those of half as many steps are every other one of them."""
    grid = karras_grid(steps + 1, sigma_min=problem.sigma_min, sigma_max=problem.sigma_max)
    grid[-1] = 0
    return grid


def halve(
    problem: ImageGeneration, run: Run, teacher: DenoiserOracle, count: int, *, updates: int | None, weight: str, rate: float
) -> None:
    """One round: a student of ``count`` steps learns from a teacher of twice as many, in ``updates`` steps (None: all that are left)."""
    grid = levels(problem, 2 * count).to(torch.get_default_dtype())

    def loss(batch: Batch) -> Losses:
        position = 2 * batch.integers(count, (len(batch),), "levels").cpu()
        sigma, middle, after = (grid[position + i].to(batch.inputs.device) for i in range(3))
        noisy = batch.inputs + per_row(sigma, batch.inputs) * batch.noise(batch.inputs.shape, "noise")
        target = two_step_target(lambda x, s: teacher.denoise(x, s, batch.condition), noisy, sigma, middle, after)
        return run.loss(batch, progressive=progressive_loss(problem.student(noisy, sigma, batch.condition), target, sigma, weight=weight))

    with run.phase(f"{count} steps"):
        run.fit(problem.student, loss, problem.batches, steps=updates, learning_rate=run.training.learning_rate * rate)


def distill(problem: ImageGeneration, run: Run, *, steps: int, rounds: int, weight: str, rate: float, initial_share: float) -> Student:
    """In every round the student has half the steps of its teacher, which is the student of the round before."""
    initialise(problem, run, share=initial_share)
    final = problem.few_steps(steps)
    counts = [len(final) * 2**k for k in reversed(range(rounds))]
    parts = [2 if count <= 2 else 1 for count in counts]
    updates = run.steps(problem.batches.batch_size)
    for count, part in zip(counts, parts, strict=True):
        teacher = problem.teacher if count == counts[0] else frozen(problem, problem.student)
        own = None if count == counts[-1] else max(1, updates * part // sum(parts))
        halve(problem, run, teacher, count, updates=own, weight=weight, rate=rate)
    return run.export(problem.student, recipe={"rule": "euler", "sigmas": final})
