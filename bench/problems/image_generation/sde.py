"""Diffusion as a stochastic differential equation: the three SDEs of Song et al. 2020 (arXiv 2011.13456) and their samplers.

dx = -beta(t) x / 2 dt + g(t) dw,  so that x_t = a(t) x_0 + std(t) eps  (their section 3.4 and appendix B).  A denoiser of the form
x_0 + sigma eps knows the score of each of them: at sigma = std / a only the scale of x differs.  Times and levels are float64
scalars; samples keep their own type.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from distillbench.problems.image_generation.edm import Denoise

# --- the equations ----------------------------------------------------------------------------------------------


class SDE(ABC):
    """A forward process. ``t`` is time, any shape, 0 for data; what is said of it has its shape."""

    @abstractmethod
    def marginal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(a, std) of x_t = a x_0 + std eps."""

    @abstractmethod
    def shrinkage(self, t: Tensor) -> Tensor:
        """beta(t) >= 0: the drift of x is -beta x / 2."""

    @abstractmethod
    def variance_rate(self, t: Tensor) -> Tensor:
        """g(t)^2 >= 0: the variance that noise adds per unit of time."""

    @abstractmethod
    def time(self, sigma: Tensor) -> Tensor:
        """The t at which std / a is ``sigma`` > 0: the inverse of :meth:`level`."""

    def level(self, t: Tensor) -> Tensor:
        """std / a: the noise level sigma at which a denoiser of x_0 + sigma eps sees x_t / a."""
        scale, std = self.marginal(t)
        return std / scale


@dataclass(frozen=True)
class VE(SDE):
    """Variance exploding: sigma(t) = sigma_min (sigma_max / sigma_min)^t, no drift. Equation 30; levels outside are extrapolated."""

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    @property
    def _growth(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    def marginal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """a = 1,  std = sigma(t), as the authors' code has it: their variance sigma(t)^2 - sigma(0)^2 takes data at level sigma(0)."""
        return torch.ones_like(t), self.sigma_min * (self._growth * t).exp()

    def shrinkage(self, t: Tensor) -> Tensor:
        """0."""
        return torch.zeros_like(t)

    def variance_rate(self, t: Tensor) -> Tensor:
        """d sigma^2 / dt = 2 ln(sigma_max / sigma_min) sigma(t)^2."""
        return 2 * self._growth * self.marginal(t)[1] ** 2

    def time(self, sigma: Tensor) -> Tensor:
        """ln(sigma / sigma_min) / ln(sigma_max / sigma_min)."""
        return (sigma / self.sigma_min).log() / self._growth


@dataclass(frozen=True)
class VP(SDE):
    """Variance preserving: beta(t) = beta_min + t (beta_max - beta_min), g^2 = beta. Equation 32; its limit of steps is DDPM."""

    beta_min: float = 0.1
    beta_max: float = 20.0

    def _log_scale(self, t: Tensor) -> Tensor:
        return -(t**2) * (self.beta_max - self.beta_min) / 4 - t * self.beta_min / 2

    def _time_at(self, decay: Tensor) -> Tensor:
        """The t at which -ln a is ``decay``: the positive root, in the form that does not cancel."""
        half = self.beta_min / 2
        return 2 * decay / (half + (half**2 + (self.beta_max - self.beta_min) * decay).sqrt())

    def marginal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """a = exp(-int beta / 2),  std^2 = 1 - a^2."""
        log_scale = self._log_scale(t)
        return log_scale.exp(), (-(2 * log_scale).expm1()).sqrt()

    def shrinkage(self, t: Tensor) -> Tensor:
        """beta(t)."""
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def variance_rate(self, t: Tensor) -> Tensor:
        """beta(t)."""
        return self.shrinkage(t)

    def time(self, sigma: Tensor) -> Tensor:
        """From sigma^2 = 1 / a^2 - 1."""
        return self._time_at(torch.log1p(sigma**2) / 2)


@dataclass(frozen=True)
class SubVP(VP):
    """Sub-VP: the drift of :class:`VP` and less noise, so that std, not its square, is 1 - a^2. Equation 34."""

    def marginal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """a = exp(-int beta / 2),  std = 1 - a^2."""
        log_scale = self._log_scale(t)
        return log_scale.exp(), -(2 * log_scale).expm1()

    def variance_rate(self, t: Tensor) -> Tensor:
        """beta(t) (1 - exp(-2 int beta)) = beta (1 - a^4)."""
        return self.shrinkage(t) * -(4 * self._log_scale(t)).expm1()

    def time(self, sigma: Tensor) -> Tensor:
        """From sigma = 1 / a - a = 2 sinh(-ln a)."""
        return self._time_at(torch.asinh(sigma / 2))


SDES: dict[str, SDE] = {"ve": VE(), "vp": VP(), "subvp": SubVP()}


def score(denoise: Denoise, noisy: Tensor, t: Tensor, sde: SDE) -> Tensor:
    """grad log p_t(x) = (a D(x / a; std / a) - x) / std^2, by Tweedie's formula.   noisy: (B, ...), t: () > 0 -> (B, ...)."""
    scale, std = sde.marginal(t)
    return (scale * _clean(denoise, noisy, t, sde) - noisy) / std**2


def _clean(denoise: Denoise, noisy: Tensor, t: Tensor, sde: SDE) -> Tensor:
    """E[x_0 | x_t]."""
    scale, _ = sde.marginal(t)
    return denoise(noisy / scale, noisy.new_full((len(noisy),), float(sde.level(t))))


def transition(sde: SDE, t: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """(r, G) of the forward step x_t = r x_after + G z from the cleaner time ``after`` to ``t``, exact for any step.

    r = a_t / a_after,  G^2 = std_t^2 - r^2 std_after^2. For VE that is appendix E's G^2 = sigma_i^2 - sigma_{i-1}^2, for VP DDPM's
    r^2 = 1 - G^2 with beta_i = G^2.
    """
    (scale, std), (scale_after, std_after) = sde.marginal(t), sde.marginal(after)
    ratio = scale / scale_after
    return ratio, (std**2 - (ratio * std_after) ** 2).clamp(min=0).sqrt()


# --- steps back in time, each with one score s = grad log p_t(x) and standard normal z (B, ...) -----------------------


def reverse_diffusion_step(noisy: Tensor, score: Tensor, fresh: Tensor, ratio: Tensor, growth: Tensor) -> Tensor:
    """Predictor of appendix E, equation 46: x - (r - 1) x + G^2 s + G z, with (r, G) of :func:`transition`.   (B, ...) -> (B, ...)."""
    return (2 - ratio) * noisy + growth**2 * score + growth * fresh


def ancestral_step(noisy: Tensor, score: Tensor, fresh: Tensor, ratio: Tensor, growth: Tensor, shrunk: Tensor) -> Tensor:
    """Predictor of appendix F: the Gaussian q(x_after | x_t, x_0) at x_0 = E[x_0 | x_t].   (B, ...) -> (B, ...).

    (x + G^2 s) / r + G (std_after / std_t) z, where ``shrunk`` is std_after / std_t: equation 47 for VE; for VP DDPM's step with
    the smaller of its two variances. In x / a it is the same step for every SDE.
    """
    return (noisy + growth**2 * score) / ratio + growth * shrunk * fresh


def langevin_step(noisy: Tensor, score: Tensor, fresh: Tensor, ratio: Tensor, *, snr: float) -> Tensor:
    """Corrector of appendix G, algorithms 4 and 5: x + e s + sqrt(2 e) z,  e = 2 r^2 (snr |z| / |s|)^2.   (B, ...) -> (B, ...).

    Norms are means over the rows, as in the authors' code: a single row's score may be 0. r^2 is their alpha_i, 1 for VE.
    """
    size = 2 * ratio**2 * (snr * _norm(fresh) / _norm(score)) ** 2
    return noisy + size * score + (2 * size).sqrt() * fresh


def _norm(values: Tensor) -> Tensor:
    """The mean of the rows' norms.   (B, ...) -> ()."""
    norms: Tensor = torch.linalg.vector_norm(values.flatten(1), dim=1)
    return norms.mean()


def flow_step(denoise: Denoise, noisy: Tensor, t: Tensor, after: Tensor, sde: SDE) -> Tensor:
    """One Heun step, in t, of the probability-flow ODE dx/dt = -beta x / 2 - g^2 s / 2 (equation 13). Two evaluations per row."""

    def slope(x: Tensor, t: Tensor) -> Tensor:
        return -(sde.shrinkage(t) * x + sde.variance_rate(t) * score(denoise, x, t, sde)) / 2

    step, first = after - t, slope(noisy, t)
    answer: Tensor = noisy + step * (first + slope(noisy + step * first, after)) / 2
    return answer


# --- sampling ---------------------------------------------------------------------------------------------------


def time_grid(sde: SDE, count: int, *, sigma_min: float, sigma_max: float) -> list[float]:
    """``count`` noise levels std / a from sigma_max down to sigma_min, both exact, evenly placed in the SDE's own time.

    Raises:
        ValueError: fewer than two.
    """
    if count < 2:
        raise ValueError(f"a grid needs two levels, not {count}")
    high, low = (sde.time(torch.tensor(s, dtype=torch.float64)) for s in (sigma_max, sigma_min))
    position = torch.arange(count, dtype=torch.float64) / (count - 1)
    return [sigma_max, *sde.level(high + position * (low - high))[1:-1].tolist(), sigma_min]


def sde_solve(
    denoise: Denoise, noise: Tensor, sigmas: Sequence[float], *, rule: str, sde: SDE, snr: float, draw: Callable[[], Tensor]
) -> Tensor:
    """Samples (B, ...) from unit ``noise`` (B, ...) along the noise levels ``sigmas`` (decreasing, > 0), read as times of ``sde``.

    Starts at a sigma_1 noise and ends with E[x_0 | x] at the last level, the paper's last step without noise. For N levels:
    ``reverse_diffusion`` and ``ancestral`` take N evaluations per row, ``predictor_corrector`` (at each level a Langevin step, then
    reverse diffusion to the next) 2 N, ``probability_flow`` 2 N - 1. ``draw`` gives fresh unit noise (B, ...).
    """
    times = [sde.time(torch.tensor(s, dtype=torch.float64)) for s in sigmas]
    noisy = sde.marginal(times[0])[1] * noise
    for t, after in pairwise([*times, torch.zeros_like(times[0])]):
        ratio, growth = transition(sde, t, after)
        if rule == "predictor_corrector":
            noisy = langevin_step(noisy, score(denoise, noisy, t, sde), draw(), ratio, snr=snr)
        if t is times[-1]:
            break
        if rule == "probability_flow":
            noisy = flow_step(denoise, noisy, t, after, sde)
            continue
        slope = score(denoise, noisy, t, sde)
        if rule == "ancestral":
            noisy = ancestral_step(noisy, slope, draw(), ratio, growth, sde.marginal(after)[1] / sde.marginal(t)[1])
        else:
            noisy = reverse_diffusion_step(noisy, slope, draw(), ratio, growth)
    return _clean(denoise, noisy, times[-1], sde)
