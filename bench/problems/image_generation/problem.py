"""Image generation: a diffusion model, to be distilled into a generator of few steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from distillbench.problems.image_generation.edm import karras_grid, karras_level
from distillbench.problems.image_generation.examples import EXAMPLES
from distillbench.problems.image_generation.oracle import DenoiserOracle
from distillbench.training.data import Arrays, Batch, Batches
from distillbench.training.examples import Input
from distillbench.training.noise import Rows
from distillbench.training.problem import Problem
from distillbench.training.trees import Tree


@dataclass(frozen=True)
class ImageGeneration(Problem):
    """A denoiser to distil.

    ``student(noisy, sigma, condition=None)`` gives an x_0 estimate, as the teacher does: noisy (B, ...), sigma (B,) or (B, F), and a
    condition of B rows (see :mod:`training.trees`), here the labels (B,).
    A generator of few steps is that same network at a few noise levels. How it is sampled leaves with it as a recipe,
    ``{"rule": "denoise", "euler" or "heun", "sigmas": [...]}``, or a rule of :mod:`.sde` with its ``sde`` (and ``snr``); the
    suite samples, from noise that all methods share.

    Attributes:
        teacher: the denoiser, guided where the setting says so; every call is metered, a row an evaluation.
        batches: real samples; labels are 0 where the data has no classes.
        steps: network evaluations per sample that a student of this setting may use.
        teacher_steps: Heun steps at which the teacher is taken to be converged.
        train: the real samples in memory, or None where they are streamed from disk.
    """

    teacher: DenoiserOracle
    batches: Batches[Batch]
    sigma_min: float
    sigma_max: float
    sigma_data: float
    steps: int
    teacher_steps: int
    train: Arrays | None = None

    @classmethod
    def examples(cls) -> Mapping[str, Input]:
        """See :mod:`.examples`."""
        return EXAMPLES

    def call(self) -> tuple[Tree, ...] | None:
        """A noisy sample, its level, and its condition."""
        row = next(self.batches.stream(0)).part(0, 1)
        return row.inputs, torch.ones(1, dtype=row.inputs.dtype), row.condition

    def levels(self, batch: Rows, role: str = "levels", *, low: float = 0.0, high: float = 1.0) -> Tensor:
        """A noise level for every row of ``batch``: uniform in its position on the Karras schedule, rho 7.   Returns (B,).

        ``low`` and ``high`` bound the position, counted from sigma_min (0) to sigma_max (1); ``role`` names the draw.
        """
        position = 1 - (low + (high - low) * batch.uniform((len(batch),), role))
        return karras_level(position, sigma_min=self.sigma_min, sigma_max=self.sigma_max)

    def lognormal_levels(self, batch: Rows, role: str = "levels", *, mean: float, std: float) -> Tensor:
        """A noise level for every row of ``batch``: ln s ~ N(mean, std^2), kept within the schedule.   Returns (B,).

        EDM (arXiv 2206.00364), table 1, trains at mean -1.2, std 1.2.
        """
        return (mean + std * batch.noise((len(batch),), role)).exp().clamp(self.sigma_min, self.sigma_max)

    def few_steps(self, steps: int = 0, start: float | None = None) -> list[float]:
        """Noise levels of a generator of ``steps`` evaluations (0: as many as the setting allows), evenly placed on the schedule.

        The first is ``start``, sigma_max by default and at most; level i is Karras' schedule from there at position i / steps, which
        for one step is ``start`` alone.

        Raises:
            ValueError: more steps than the setting allows.
        """
        count, first = steps or self.steps, min(start or self.sigma_max, self.sigma_max)
        if count > self.steps:
            raise ValueError(f"{count} steps, where this setting allows {self.steps} evaluations per sample")
        return karras_grid(count + 1, sigma_min=self.sigma_min, sigma_max=first)[:-1].tolist()

    def recipe(self, steps: int = 0, start: float | None = None) -> dict[str, object]:
        """The recipe of a generator of few steps: x = f(s_1 z, s_1), then noise anew and f again at each of :meth:`few_steps`."""
        return {"rule": "denoise", "sigmas": self.few_steps(steps, start)}

    def heun(self, steps: int | None = None) -> dict[str, object]:
        """The recipe of the teacher's probability-flow ODE: Heun along ``steps`` Karras levels, guided as the teacher is."""
        grid = karras_grid(steps or self.teacher_steps, sigma_min=self.sigma_min, sigma_max=self.sigma_max)
        return {"rule": "heun", "sigmas": grid.tolist(), **self.guidance}

    @property
    def guidance(self) -> dict[str, object]:
        """What a recipe of the teacher's own network needs besides rule and levels: its guidance, where that is not 1."""
        return {} if self.teacher.guidance == 1.0 else {"guidance": self.teacher.guidance}
