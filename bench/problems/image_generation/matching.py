"""A generator of few steps and the fake score that follows it: the loop that score-matching distillation methods share.

The generator's distribution is smoothed by noise and compared with the teacher's at every noise level. The teacher's score is known; the
generator's is learnt by a second denoiser, the fake score, trained on generated samples in turn with the generator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from distillbench.problems.image_generation.edm import denoising_loss, per_row, renoise, row_mean
from distillbench.problems.image_generation.problem import ImageGeneration
from distillbench.problems.image_generation.start import initialise, twin
from distillbench.training.data import Batch
from distillbench.training.noise import Rows
from distillbench.training.run import Learner, Losses, Run
from distillbench.training.student import Student
from distillbench.training.trees import Tree


def matching_gradient(generated: Tensor, real_denoised: Tensor, fake_denoised: Tensor) -> Tensor:
    """g = (mu_fake - mu_real) / mean|x - mu_real|: what distribution matching adds to a sample's gradient.

    The x_0 form of w_t (s_fake - s_real), Yin et al. 2023 (arXiv 2311.18828), equations 7 and 8; the divisor is each row's own.
    A row that the teacher leaves exactly where it is has no divisor and gets 0, as in the authors' code.
    generated x, real_denoised mu_real(x_t, t), fake_denoised mu_fake(x_t, t): (B, ...); returns (B, ...), without a graph.
    """
    size = row_mean((generated - real_denoised).abs())
    return torch.nan_to_num((fake_denoised - real_denoised) / per_row(size, generated)).detach()


def surrogate_loss(generated: Tensor, gradient: Tensor) -> Tensor:
    """1/2 mean (x - sg(x - g))^2 over a row: its derivative by x is g / numel(row).   (B, ...), (B, ...) -> (B,).

    The value is half the mean square of ``gradient``; it is no divergence and may rise while training improves.
    """
    return row_mean((generated - (generated - gradient).detach()) ** 2) / 2


class Matching:
    """The two networks, and what is drawn for them.

    Args:
        steps: evaluations per sample; 0 is as many as the setting allows.  start: the noise level of the first one.
        low, high: bounds of the noise levels that are compared, as positions on the Karras schedule from sigma_min (0) to
            sigma_max (1); the fake score learns at all of them.
        initial_share: part of the budget for the initialisation where weights cannot be copied.

    Raises:
        ValueError: more steps than the setting allows, before anything is spent.
    """

    def __init__(
        self,
        problem: ImageGeneration,
        run: Run,
        *,
        steps: int = 1,
        start: float | None = None,
        low: float = 0.0,
        high: float = 1.0,
        initial_share: float,
    ) -> None:
        self.problem, self.run = problem, run
        self.steps, self.start = steps, start
        self.sigmas = problem.few_steps(steps, start)
        initialise(problem, run, share=initial_share)
        self.student = problem.student
        self.fake = twin(problem, problem.student)
        self.low, self.high = low, high

    def generate(self, batch: Batch) -> Tensor:
        """Samples (B, ...) for the condition of ``batch``, with the graph of the generator's last evaluation.

        Call it at most once per loss: a second call would draw the same numbers, which a batch refuses.
        With several steps each row stops after a number of them drawn uniformly, so that every evaluation learns on the
        inputs it will meet (the simulated inputs of DMD2, arXiv 2405.14867, section 4.5).
        """
        problem, count = self.problem, len(self.sigmas)
        levels = batch.inputs.new_tensor(self.sigmas)
        noisy = levels[0] * batch.noise(batch.inputs.shape, "latents")
        stop = batch.integers(count, (len(batch),), "steps")
        with torch.no_grad():
            state = noisy
            for i in range(1, count):
                clean = self.student(state, levels[i - 1].expand(len(batch)), batch.condition)
                fresh = batch.noise(batch.inputs.shape, f"latents {i}")
                state = renoise(clean, fresh, levels[i].expand(len(batch)), sigma_min=problem.sigma_min)
                noisy = torch.where(per_row(stop == i, state), state, noisy)
        generated: Tensor = self.student(noisy, levels[stop], batch.condition)
        return generated

    def perturb(
        self, batch: Rows, clean: Tensor, *, low: float | None = None, high: float | None = None, role: str = "noise"
    ) -> tuple[Tensor, Tensor]:
        """``clean`` (B, ...) with noise, and its levels (B,): uniform positions on the Karras schedule between ``low`` and ``high``."""
        low, high = self.low if low is None else low, self.high if high is None else high
        sigma = self.problem.levels(batch, f"{role} levels", low=low, high=high)
        return clean + per_row(sigma, clean) * batch.noise(clean.shape, role), sigma

    def denoised(self, noisy: Tensor, sigma: Tensor, condition: Tree, *, differentiable: bool = False) -> tuple[Tensor, Tensor]:
        """What teacher and fake score answer.   (B, ...), (B,), (B,) -> (B, ...) twice, without a graph.

        ``differentiable`` keeps the graph from ``noisy``, for losses whose gradient passes through both networks; their weights
        learn nothing from it, because the loop freezes the fake score while the generator learns.
        """
        with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
            real = self.problem.teacher.denoise(noisy, sigma, condition, differentiable=differentiable)
            return real, self.fake(noisy, sigma, condition)

    def fake_loss(self, batch: Batch, generated: Tensor) -> Tensor:
        """The fake score's own denoising loss on ``generated`` (B, ...), at all noise levels.   Returns (B,)."""
        generated = generated.detach()
        noisy, sigma = self.perturb(batch, generated, low=0.0, high=1.0, role="fake noise")
        return denoising_loss(self.fake(noisy, sigma, batch.condition), generated, sigma, sigma_data=self.problem.sigma_data)

    def train(
        self,
        generator_loss: Callable[[Batch], Losses],
        *,
        generator_rate: float,
        fake_rate: float,
        fake_updates: int,
        beta1: float,
        average: float = 0.0,
        fake_loss: Callable[[Batch], Losses] | None = None,
        extra: Sequence[nn.Module] = (),
        after: Callable[[dict[str, Tensor]], object] | None = None,
    ) -> Student:
        """The loop: one generator step, then ``fake_updates`` steps of the fake score. Exports the generator, or its average.

        Args:
            generator_rate, fake_rate: times the track's learning rate.
            average: decay of the generator's average, which is then exported; 0 exports its last weights.
            fake_loss: in place of the denoising loss alone; ``extra`` are networks that it trains along (discriminator heads).
            after: called after every update of the generator.
        """
        base, betas = self.run.training.learning_rate, (beta1, 0.999)

        def denoise(batch: Batch) -> Losses:
            with torch.no_grad():
                generated = self.generate(batch)
            return self.run.loss(batch, fake=self.fake_loss(batch, generated))

        generator = Learner(
            self.student, generator_loss, learning_rate=base * generator_rate, betas=betas, ema=average or None, after=after
        )
        critic = Learner(
            self.fake, fake_loss or denoise, counts=None, updates=fake_updates, learning_rate=base * fake_rate, betas=betas, extra=extra
        )
        with self.run.phase("match"):
            self.run.loop([generator, critic], self.problem.batches)
        recipe = self.problem.recipe(self.steps, self.start)
        module = self.student if generator.average is None else generator.average
        return self.run.export(module, recipe=recipe, averaged=average > 0)
