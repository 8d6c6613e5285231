"""Continuous-time consistency in TrigFlow (Lu and Song 2024, arXiv 2410.11081): what sCM and the methods built on it share.

TrigFlow is x_t = cos(t) x_0 + sin(t) z with z ~ N(0, d^2) and t in [0, pi/2). Our denoisers live in the variance-exploding form
x = x_0 + sigma eps. The two are one path in other units, exactly: tan t = sigma / d, x_t = cos(t) x, and with EDM's preconditioning
c_skip = cos^2 t, c_out = d sin t, c_in x = x_t / d. So the consistency function f(x_t, t) = cos(t) x_t - sin(t) d F(x_t / d, t) is
D(x; sigma) itself with F = -(EDM's raw network), and f(x, 0) = x holds for any weights. Nothing is converted but what is trained.

d is ``sigma_data`` throughout; noisy is in the variance-exploding form (B, ...); sigma is (B,) > 0; F has unit variance.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor, nn

from distillbench.problems.image_generation.edm import Denoise, per_row, row_mean
from distillbench.problems.image_generation.problem import ImageGeneration
from distillbench.training.data import Batch
from distillbench.training.run import Run

# torch's own forward-mode rules are scripted by a function that torch has deprecated.
warnings.filterwarnings("ignore", message=".*torch.jit.script.*is deprecated", category=FutureWarning)


def time(sigma: Tensor, *, sigma_data: float) -> Tensor:
    """t = atan(sigma / d) in (0, pi/2).   (B,) -> (B,)."""
    return torch.atan(sigma / sigma_data)


def velocity(denoised: Tensor, noisy: Tensor, sigma: Tensor, *, sigma_data: float) -> Tensor:
    """F = (cos(t) x_t - D) / (d sin t), with x_t = cos(t) x: the F of which ``denoised`` is the consistency function.   (B, ...).

    d F is also dx_t/dt along the probability flow of the model that answered ``denoised``.
    """
    t = per_row(time(sigma, sigma_data=sigma_data), noisy)
    return (t.cos() ** 2 * noisy - denoised) / (sigma_data * t.sin())


def tangent(student: Denoise, noisy: Tensor, sigma: Tensor, teacher: Tensor, *, sigma_data: float, warmup: float = 1.0) -> Tensor:
    """g = r cos(t) df/dt - (1 - r) cos^2(t) d (F - F_teacher): where the teacher's flow takes the student's answer.   (B, ...).

    df/dt is the derivative of f(x_t, t) along dx_t/dt = d F_teacher: one forward-mode pass of the network (the JVP), exact and
    without a graph. In the variance-exploding form cos(t) df/dt = sqrt(sigma^2 + d^2) dD/dsigma along dx/dsigma = (x - D_teacher)
    / sigma, which divides by no cosine. Multiplied out it is sCM's equation 6 and the warm-up of its algorithm 1,
    -cos^2(t) (d F - dx_t/dt) - r (cos(t) sin(t) x_t + d dF/dt cos(t) sin(t)).

    Args:
        student: the denoiser that learns, made of operations that have forward-mode derivatives.
        teacher: D_teacher(x; sigma), guided where it is (B, ...).
        warmup: r in [0, 1]; at 0 the answer is drawn to the teacher's own.
    """
    with torch.no_grad():
        speed = (sigma**2 + sigma_data**2).sqrt()
        slope = (noisy - teacher) / per_row(sigma, noisy)
        answer, along, *_ = torch.func.jvp(student, (noisy, sigma), (per_row(speed, noisy) * slope, speed))
        mine, theirs = (velocity(a, noisy, sigma, sigma_data=sigma_data) for a in (answer, teacher))
        cosine = per_row(time(sigma, sigma_data=sigma_data).cos(), noisy)
        g: Tensor = warmup * along - (1 - warmup) * cosine**2 * sigma_data * (mine - theirs)
        return g


def normalised(tangent: Tensor, *, c: float) -> Tensor:
    """g / (|g| + c), |g| over the whole sample, so that no level and no sample dominates.   (B, ...), c > 0 -> (B, ...)."""
    size = torch.linalg.vector_norm(tangent.flatten(1), dim=1)
    return tangent / per_row(size + c, tangent)


def scm_loss(velocity: Tensor, tangent: Tensor) -> Tensor:
    """mean (F - sg(F) - g)^2 over a row: its derivative by F is -2 g / numel(row), its value is mean g^2.   (B, ...) twice -> (B,).

    sCM's equation 8 with neither prior nor learnt weight. f falls where F rises, so a step takes f against df/dt.
    """
    return row_mean((velocity - velocity.detach() - tangent.detach()) ** 2)


def warm(progress: float, share: float) -> float:
    """r of the tangent: rises linearly from 0 to 1 over the first ``share`` of a loop; always 1 where ``share`` is 0."""
    return min(1.0, progress / share) if share else 1.0


def draw(
    problem: ImageGeneration, run: Run, student: nn.Module, batch: Batch, *, mean: float, std: float, warmup: float, c: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One draw of the consistency objective: F of the student with its graph (B, ...), its normalised tangent, and sigma (B,).

    The samples of ``batch`` get noise at ln tan t ~ N(mean, std^2), kept within the schedule. The teacher is asked once per sample.

    Args:
        warmup: r of :func:`tangent`.  c: of :func:`normalised`.
    """
    data = problem.sigma_data
    sigma = problem.lognormal_levels(batch, "consistency levels", mean=mean + math.log(data), std=std)
    noisy = batch.inputs + per_row(sigma, batch.inputs) * batch.noise(batch.inputs.shape, "consistency")
    teacher = problem.teacher.denoise(noisy, sigma, batch.condition)
    g = tangent(lambda x, s: student(x, s, batch.condition), noisy, sigma, teacher, sigma_data=data, warmup=warmup)
    return velocity(student(noisy, sigma, batch.condition), noisy, sigma, sigma_data=data), normalised(g, c=c), sigma
