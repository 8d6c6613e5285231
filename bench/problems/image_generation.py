"""Image generation: a diffusion model, to be distilled into a generator of few steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.data import Arrays, Batches
from bench.diffusion import karras_grid, karras_level
from bench.oracle import DenoiserOracle
from bench.problems.base import Problem


@dataclass(frozen=True)
class ImageGeneration(Problem):
    """A denoiser to distil.

    ``student(noisy, sigma, labels=None)`` gives an x_0 estimate, as the teacher does: noisy (B, ...), sigma (B,), labels (B,).
    A generator of few steps is that same network at a few noise levels. How it is sampled leaves with it as a recipe,
    ``{"rule": "denoise" or "heun", "sigmas": [...]}``; the suite samples, from noise that all methods share.

    Attributes:
        teacher: the denoiser; every call is metered, a row an evaluation.
        batches: real samples; labels are 0 where the data has no classes.
        steps: network evaluations a sample that a student of this setting may use.
        teacher_steps: Heun steps at which the teacher is taken to be converged.
        train: the real samples in memory, or None where they are streamed from disk.
    """

    teacher: DenoiserOracle
    batches: Batches
    sigma_min: float
    sigma_max: float
    sigma_data: float
    steps: int
    teacher_steps: int
    train: Arrays | None = None

    def noise(self, like: Tensor, generator: torch.Generator) -> Tensor:
        """Standard normal noise of ``like``'s shape, type and device, from a stream of the run."""
        return torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)

    def levels(self, like: Tensor, generator: torch.Generator, *, low: float = 0.0, high: float = 1.0) -> Tensor:
        """A noise level for every row of ``like`` (B, ...): uniform in its place on the Karras schedule, rho 7.   Returns (B,).

        ``low`` and ``high`` bound the place, counted from sigma_min (0) to sigma_max (1).
        """
        place = 1 - (low + (high - low) * torch.rand(like.shape[0], generator=generator, dtype=like.dtype))
        return karras_level(place, sigma_min=self.sigma_min, sigma_max=self.sigma_max).to(like.device)

    def one_step(self, sigma: float | None = None) -> dict[str, object]:
        """The recipe of a one-step generator: x = f(sigma z, sigma), at sigma_max unless told otherwise."""
        return {"rule": "denoise", "sigmas": [self.sigma_max if sigma is None else sigma]}

    def heun(self, steps: int | None = None) -> dict[str, object]:
        """The recipe of the probability-flow ODE: Heun along ``steps`` Karras levels, the teacher's number by default."""
        grid = karras_grid(steps or self.teacher_steps, sigma_min=self.sigma_min, sigma_max=self.sigma_max)
        return {"rule": "heun", "sigmas": grid.tolist()}
