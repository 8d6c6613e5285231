"""Diffusion in the variance-exploding form, x_t = x_0 + sigma eps: pure functions that several methods and suites share.

EDM is Karras et al. 2022 (arXiv 2206.00364), CM is Song et al. 2023 (arXiv 2303.01469). A denoiser is any function
``denoise(noisy, sigma) -> x_0 estimate`` with noisy (B, ...) and sigma (B,); the teacher's oracle meters each call of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from distillbench.training.trees import Tree

Denoise = Callable[[Tensor, Tensor], Tensor]


def per_row(values: Tensor, like: Tensor) -> Tensor:
    """``values`` (B,), or (B, F) for the F frames of each row, shaped so that they broadcast over ``like`` (B, ...) or (B, F, ...)."""
    return values.view(*values.shape, *[1] * (like.dim() - values.dim()))


def row_mean(values: Tensor) -> Tensor:
    """The mean over all but the first dimension.   (B, ...) -> (B,)."""
    return values.flatten(1).mean(1)


def guided(network: Callable[[Tensor, Tensor, Tree], Tensor], guidance: float) -> Callable[[Tensor, Tensor, Tree], Tensor]:
    """Classifier-free guidance: D_none + g (D_condition - D_none), with condition None for D_none.   Two evaluations per row.

    Ho and Salimans 2022 (arXiv 2207.12598), equation 6, in the convention where g = 1 is the conditional model alone.
    """

    def answer(noisy: Tensor, sigma: Tensor, condition: Tree) -> Tensor:
        free = network(noisy, sigma, None)
        return free + guidance * (network(noisy, sigma, condition) - free)

    return answer


# --- parameterisation -------------------------------------------------------------------------------------------


def edm_scalings(sigma: Tensor, *, sigma_data: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """EDM table 1: D(x; s) = c_skip x + c_out F(c_in x; c_noise).   sigma: (B,) > 0; returns c_skip, c_out, c_in, c_noise, (B,) each.

    c_skip = d^2 / (s^2 + d^2),  c_out = s d / sqrt(s^2 + d^2),  c_in = 1 / sqrt(s^2 + d^2),  c_noise = ln(s) / 4,  d = sigma_data.
    """
    total = sigma**2 + sigma_data**2
    return sigma_data**2 / total, sigma * sigma_data / total.sqrt(), 1 / total.sqrt(), sigma.log() / 4


def consistency_scalings(sigma: Tensor, *, sigma_data: float, sigma_min: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """CM appendix C: as :func:`edm_scalings`, with f(x, e) = x exactly at e = sigma_min.   sigma: (B,) >= e; returns (B,) each.

    c_skip = d^2 / ((s - e)^2 + d^2),  c_out = d (s - e) / sqrt(s^2 + d^2); the denominator of c_out has s, not s - e.
    """
    _, _, c_in, c_noise = edm_scalings(sigma, sigma_data=sigma_data)
    above = sigma - sigma_min
    return sigma_data**2 / (above**2 + sigma_data**2), sigma_data * above * c_in, c_in, c_noise


def edm_weight(sigma: Tensor, *, sigma_data: float) -> Tensor:
    """EDM table 1: lambda(s) = (s^2 + d^2) / (s d)^2 = 1/s^2 + 1/d^2 = 1/c_out^2.   (B,) -> (B,)."""
    return sigma**-2 + sigma_data**-2


def denoising_loss(denoised: Tensor, clean: Tensor, sigma: Tensor, *, sigma_data: float) -> Tensor:
    """EDM section 5: lambda(s) times the mean over components of (D(x_t; s) - x_0)^2.   (B, ...), (B, ...), (B,) -> (B,).

    A mean over components where EDM's own code sums them: a factor that does not depend on anything trained.
    """
    return edm_weight(sigma, sigma_data=sigma_data) * row_mean((denoised - clean.detach()) ** 2)


def pseudo_huber(difference: Tensor, *, c: float) -> Tensor:
    """sqrt(|d|^2 + c^2) - c over a row: |d|^2 / 2c where it is small, |d| - c where it is large.   (B, ...), c > 0 -> (B,).

    Charbonnier et al. 1997, as in Song and Dhariwal 2023 (arXiv 2310.14189), equation 8. |d|^2 is a sum over components.
    """
    squares = difference.flatten(1).square().sum(1)
    return squares / ((squares + c**2).sqrt() + c)  # the same value without the cancellation


# --- noise levels -----------------------------------------------------------------------------------------------


def karras_level(position: Tensor, *, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """EDM equation 5 at ``position`` in [0, 1]: 0 is sigma_max, 1 is sigma_min.   Any shape; returns the same shape.

    s(u) = (s_max^(1/rho) + u (s_min^(1/rho) - s_max^(1/rho)))^rho; the two ends are exact.
    """
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    level = (high + position * (low - high)) ** rho
    return torch.where(position == 0, sigma_max, torch.where(position == 1, sigma_min, level))


def karras_grid(count: int, *, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """EDM equation 5: ``count`` >= 2 levels from sigma_max down to sigma_min, both exact.   Returns (count,) float64."""
    if count < 2:
        raise ValueError(f"a grid needs two levels, not {count}")
    return karras_level(torch.arange(count, dtype=torch.float64) / (count - 1), sigma_min=sigma_min, sigma_max=sigma_max, rho=rho)


# --- the probability-flow ODE -----------------------------------------------------------------------------------


def euler_step(denoise: Denoise, noisy: Tensor, sigma: Tensor, after: Tensor) -> Tensor:
    """One Euler step of dx/ds = (x - D(x; s)) / s from ``sigma`` (B,) > 0 to ``after`` (B,) >= 0. One evaluation a row."""
    slope = (noisy - denoise(noisy, sigma)) / per_row(sigma, noisy)
    return noisy + per_row(after - sigma, noisy) * slope


def heun_step(denoise: Denoise, noisy: Tensor, sigma: Tensor, after: Tensor) -> Tensor:
    """One Heun step (EDM algorithm 1, without churn) from ``sigma`` (B,) to ``after`` (B,), both > 0. Two evaluations per row."""
    slope = (noisy - denoise(noisy, sigma)) / per_row(sigma, noisy)
    step = per_row(after - sigma, noisy)
    guess = noisy + step * slope
    return noisy + step * (slope + (guess - denoise(guess, after)) / per_row(after, noisy)) / 2


def heun_solve(denoise: Denoise, noisy: Tensor, sigmas: Sequence[float]) -> Tensor:
    """EDM algorithm 1 without churn: Heun steps along ``sigmas`` (decreasing, > 0), then an Euler step to 0.

    noisy: (B, ...) at noise level ``sigmas[0]``; returns (B, ...) at level 0. 2N - 1 evaluations per row for N levels.
    """
    levels = [noisy.new_full((noisy.shape[0],), s) for s in sigmas]
    for sigma, after in pairwise(levels):
        noisy = heun_step(denoise, noisy, sigma, after)
    return euler_step(denoise, noisy, levels[-1], torch.zeros_like(levels[-1]))


def euler_solve(denoise: Denoise, noisy: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Euler steps along ``sigmas`` (decreasing, > 0), the last one to 0: DDIM's steps.   (B, ...) at ``sigmas[0]`` -> (B, ...).

    The step is the same in every parameterisation that predicts x_0 on a line between data and noise: a rectified flow with
    x_t = (1 - t) x_0 + t z takes it too, with sigma = t / (1 - t). N evaluations per row for N levels.
    """
    for sigma, after in pairwise([*sigmas, 0.0]):
        noisy = euler_step(denoise, noisy, noisy.new_full((noisy.shape[0],), sigma), noisy.new_full((noisy.shape[0],), after))
    return noisy


def renoise(clean: Tensor, fresh: Tensor, sigma: Tensor, *, sigma_min: float) -> Tensor:
    """``clean`` (B, ...), itself at ``sigma_min``, with noise added up to level ``sigma`` (B,): CM algorithm 1.

    x + sqrt(s^2 - sigma_min^2) z with z = ``fresh`` standard normal (B, ...); levels below sigma_min add nothing.
    """
    return clean + per_row((sigma**2 - sigma_min**2).clamp(min=0).sqrt(), clean) * fresh
