"""The density ratio r = teacher / student: the f-divergences that weigh by it, and the discriminator that estimates it.

D_f = E_student f(r) with f convex and f(1) = 0. All that its gradient needs of f is the curvature C(r) = r^2 f''(r): f-distill
(arXiv 2502.15681) calls it h, Uni-Instruct (arXiv 2505.20755) integrates C |score difference|^2 over the noise levels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from distillbench.problems.image_generation.adversarial import Heads, logistic_critic_loss
from distillbench.problems.image_generation.edm import denoising_loss
from distillbench.problems.image_generation.matching import Matching
from distillbench.training.data import Batch
from distillbench.training.nets import staged
from distillbench.training.run import Losses
from distillbench.training.trees import Tree

DIVERGENCES: dict[str, tuple[Callable[[Tensor, float], Tensor], Callable[[Tensor, float], Tensor]]] = {
    # f(r) in the comment; C = r^2 f'' and C - r C' in the pair
    "reverse_kl": (lambda r, k: torch.ones_like(r), lambda r, k: torch.ones_like(r)),  # -log r
    "forward_kl": (lambda r, k: r, lambda r, k: torch.zeros_like(r)),  # r log r
    "jensen_shannon": (lambda r, k: r / (1 + r), lambda r, k: (r / (1 + r)) ** 2),  # r log r - (r + 1) log((r + 1) / 2)
    "softened_reverse_kl": (lambda r, k: 1 / (1 + r), lambda r, k: (1 + 2 * r) / (1 + r) ** 2),  # (r + 1) log((r + 1) / 2r)
    "squared_hellinger": (lambda r, k: r.sqrt() / 4, lambda r, k: r.sqrt() / 8),  # 1 - sqrt(r)
    "jeffreys": (lambda r, k: 1 + r, lambda r, k: torch.ones_like(r)),  # (r - 1) log r
    "neyman": (lambda r, k: 2 / r, lambda r, k: 4 / r),  # (1 - r)^2 / r
    "pearson": (lambda r, k: 2 * r**2, lambda r, k: -2 * r**2),  # (r - 1)^2
    "power": (lambda r, k: r**k, lambda r, k: (1 - k) * r**k),  # (r^k - 1 - k (r - 1)) / (k (k - 1)); the KLs at k = 0 and 1
}


def curvature(ratio: Tensor, *, divergence: str, power: float) -> Tensor:
    """C(r) = r^2 f''(r): the weight of a position where the teacher is ``ratio`` times as dense as the student.   (B,) > 0 -> (B,).

    It grows with r for divergences that seek all modes and falls for those that seek one; it is 1 for reverse KL.

    Args:
        divergence: a key of :data:`DIVERGENCES`.  power: k of the power family, not used by the others.
    """
    return DIVERGENCES[divergence][0](ratio, power)


def density_curvature(ratio: Tensor, *, divergence: str, power: float) -> Tensor:
    """C(r) - r C'(r): how E_student C(r) |..|^2 answers to a change of the student's density alone.   (B,) > 0 -> (B,).

    It is the derivative of p C(q / p) by p; 0 for forward KL, where p C(q / p) is the teacher's density q. Arguments as in
    :func:`curvature`.
    """
    return DIVERGENCES[divergence][1](ratio, power)


class Discriminator(Heads):
    """Heads on the features of a game's fake score that tell real samples from generated ones at every noise level.

    The fake score is trained along, so one pass gives its answer and the logit, and the teacher is not asked. At its optimum the
    logit is log p_data - log p_student of the noisy sample, given level and label.
    """

    def __init__(self, game: Matching) -> None:
        batch = next(game.problem.batches.stream(0)).to(next(game.fake.parameters()).device)
        with torch.no_grad():
            _, stages = staged(game.fake, batch.inputs, torch.ones_like(batch.inputs.flatten(1)[:, 0]), batch.condition)
        super().__init__(stages)
        self.to(batch.inputs.device)

    def judge(self, game: Matching, noisy: Tensor, sigma: Tensor, condition: Tree) -> tuple[Tensor, Tensor]:
        """What the fake score answers (B, ...), and the logits (B, heads), both with their graph."""
        denoised, stages = staged(game.fake, noisy, sigma, condition)
        return denoised, self(stages)

    def losses(self, game: Matching, batch: Batch, *, weight: float) -> Losses:
        """One step of the fake score and of the heads: denoising on generated samples, and ``weight`` times the logistic loss.

        Real samples get noise and levels of their own; the noisy generated samples serve both losses.
        """
        with torch.no_grad():
            generated = game.generate(batch)
        noisy, sigma = game.perturb(batch, generated, low=0.0, high=1.0, role="fake noise")
        denoised, fake = self.judge(game, noisy, sigma, batch.condition)
        _, real = self.judge(game, *game.perturb(batch, batch.inputs, low=0.0, high=1.0, role="real noise"), batch.condition)
        return game.run.loss(
            batch,
            fake=denoising_loss(denoised, generated, sigma, sigma_data=game.problem.sigma_data),
            critic=weight * logistic_critic_loss(real, fake),
        )
