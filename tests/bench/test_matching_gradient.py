"""What score-matching methods share: the matching gradient, its surrogate, and where a generator of few steps is evaluated."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from bench.card import Budget, Training
from bench.matching import Matching, matching_gradient, surrogate_loss
from bench.plan import seeds_by_role
from bench.run import Run
from suites import image_generation as suite
from tests.oracles.image_generation import dmd as oracle

M, S = 0.7, 0.5


def draw(seed, shape=(6, 2, 3)):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape) for _ in range(3)]


def tensors(*arrays):
    return [torch.tensor(a, dtype=torch.float64) for a in arrays]


def test_gradient_and_surrogate_match_the_independent_oracle():
    x, real, fake = draw(0)
    g = oracle.matching_gradient(x, real, fake)
    assert np.allclose(matching_gradient(*tensors(x, real, fake)).numpy(), g, rtol=1e-10)
    assert np.allclose(surrogate_loss(*tensors(x, g)).numpy(), oracle.surrogate_loss(x, g), rtol=1e-10)


def test_the_surrogate_hands_on_the_gradient_and_the_scores_get_none():
    x, real, fake = tensors(*draw(1))
    for t in (x, real, fake):
        t.requires_grad_(True)
    g = matching_gradient(x, real, fake)
    surrogate_loss(x, g).mean().backward()
    assert torch.allclose(x.grad, g / g.numel(), rtol=1e-12)
    assert real.grad is None
    assert fake.grad is None


def test_a_row_without_residual_gets_no_gradient():
    x, real, fake = tensors(*draw(2))
    real[0], fake[0] = x[0], x[0]
    g = matching_gradient(x, real, fake)
    assert float(g[0].abs().max()) == 0
    assert bool((g[1:] != 0).all())


class Sampler(nn.Module):
    """Draws exactly from N(M, S^2) out of pure noise at ``start``; notes what it was shown when gradients were on."""

    def __init__(self, start):
        super().__init__()
        self.start, self.seen = start, []

    def forward(self, noisy, sigma, labels):
        if torch.is_grad_enabled():
            self.seen.append((noisy, sigma))
        exact = M + S * noisy / self.start
        posterior = M + S**2 / (S**2 + sigma[:, None] ** 2) * (noisy - M)
        return torch.where((sigma == self.start)[:, None], exact, posterior)


def game(steps):
    setting = suite.CARD.settings["gaussians"]
    problem = dataclasses.replace(suite.problem("gaussians", setting, seeds_by_role(0)), steps=max(1, steps))
    training = Training(batch_size=256, optimizer="adamw", learning_rate=3e-3)
    run = Run(seeds=seeds_by_role(0), budget=Budget(student_examples=256 * 10), training=training, meter=problem.teacher.meter)
    found = Matching(problem, run, steps=steps, start=2.5, initial_share=0.1)
    found.student = Sampler(found.problem.noise(torch.zeros(1), torch.Generator()).new_tensor(found.sigmas[0]))
    return problem, found


def test_with_one_step_the_generator_sees_pure_noise_alone():
    problem, matching = game(1)
    batch = next(problem.batches.stream(0))
    matching.generate(batch)
    [(noisy, sigma)] = matching.student.seen
    fresh = torch.Generator().manual_seed(matching.run.generator("latents").initial_seed())
    assert torch.equal(noisy, 2.5 * problem.noise(batch.inputs, fresh))
    assert bool((sigma == 2.5).all())


def test_simulated_inputs_follow_the_law_of_inference():
    """A generator that is exact on N(m, s^2) is shown N(m, s^2 + sigma^2 - sigma_min^2) at its second step, half of the time."""
    problem, matching = game(2)
    stream = problem.batches.stream(0)
    for _ in range(80):
        matching.generate(next(stream))
    noisy, sigma = (torch.cat(t).double() for t in zip(*matching.student.seen, strict=True))
    second = matching.sigmas[1]
    at = torch.isclose(sigma, torch.tensor(second, dtype=torch.float64))
    assert float(at.double().mean()) == pytest.approx(0.5, abs=0.02)
    variance = S**2 + second**2 - problem.sigma_min**2
    shown = noisy[at].numpy()
    count = shown.size
    assert shown.mean() == pytest.approx(M, abs=5 * np.sqrt(variance / count))
    assert shown.var() == pytest.approx(variance, rel=5 * np.sqrt(2 / count))
