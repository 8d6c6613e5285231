"""The curvatures of the f-divergences against their definitions, and the discriminator that estimates a density ratio."""

import numpy as np
import pytest
import torch

from distillbench.cards.card import Budget, Training
from distillbench.problems.image_generation.density_ratio import DIVERGENCES, Discriminator, curvature, density_curvature
from distillbench.problems.image_generation.matching import Matching
from distillbench.runs.identities import seeds_by_role
from distillbench.runs.suite import TrainContext
from distillbench.suites import image_generation as suite
from distillbench.training.run import Learner, Run
from tests.oracles.image_generation import density_ratio as oracle

R = torch.logspace(-1, 1.3, 24, dtype=torch.float64)
K = 1.7


@pytest.mark.parametrize("name", DIVERGENCES)
def test_curvature_is_r_squared_f_second(name):
    ours = curvature(R, divergence=name, power=K).numpy()
    assert np.allclose(ours, oracle.curvature(R.numpy(), name, K), rtol=1e-6, atol=1e-8)
    assert (ours > 0).all()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_density_curvature_is_c_less_r_times_its_slope(name):
    r = R.clone().requires_grad_()
    c = curvature(r, divergence=name, power=K)
    slope = torch.autograd.grad(c.sum(), r)[0] if c.requires_grad else torch.zeros_like(r)
    assert torch.allclose(density_curvature(R, divergence=name, power=K), (c - r * slope).detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_linear_term_in_f_changes_nothing(name):
    """Identity 3: f + c (r - 1) has the same curvature, so the other version of Jensen-Shannon has this one's weight."""
    there = oracle.curvature(R.numpy(), name, K, add=-2.5)
    assert np.allclose(curvature(R, divergence=name, power=K).numpy(), there, rtol=1e-6, atol=1e-8)


def test_values_at_equal_densities():
    """Identity 4."""
    one = torch.ones(1, dtype=torch.float64)
    known = {
        "reverse_kl": 1, "forward_kl": 1, "jensen_shannon": 0.5, "softened_reverse_kl": 0.5, "squared_hellinger": 0.25,
        "jeffreys": 2, "neyman": 2, "pearson": 2, "power": 1,
    }  # fmt: skip
    assert {n: float(curvature(one, divergence=n, power=K)) for n in DIVERGENCES} == known


def test_sums_and_duals():
    """Identities 5 and 6: r f(1/r) has the curvature r C(1/r)."""

    def c(name, r=R):
        return curvature(r, divergence=name, power=0.0)

    def dual(name):
        return R * c(name, 1 / R)

    def same(a, b):
        return torch.allclose(a, b, rtol=1e-12)

    assert same(c("jeffreys"), c("reverse_kl") + c("forward_kl"))
    assert same(c("jensen_shannon") + c("softened_reverse_kl"), torch.ones_like(R))
    assert same(dual("reverse_kl"), c("forward_kl"))
    assert same(dual("forward_kl"), c("reverse_kl"))
    for name in ("jensen_shannon", "squared_hellinger", "jeffreys"):
        assert same(dual(name), c(name))
    assert same(dual("neyman"), c("pearson"))
    assert same(dual("softened_reverse_kl"), R**2 / (1 + R))


def test_bounded_weights_and_which_way_they_go():
    """Identity 8, and the trap of the ratio's direction: forward KL weighs what the teacher has and the student lacks."""
    for name in ("jensen_shannon", "softened_reverse_kl"):
        weight = curvature(torch.logspace(-6, 6, 50, dtype=torch.float64), divergence=name, power=K)
        assert float(weight.min()) > 0
        assert float(weight.max()) < 1

    def slope(name):
        return float(curvature(R, divergence=name, power=K).diff().sign().mean())

    assert {n: slope(n) for n in DIVERGENCES} == {
        "reverse_kl": 0, "softened_reverse_kl": -1, "neyman": -1, **dict.fromkeys(("forward_kl", "jensen_shannon"), 1),
        **dict.fromkeys(("squared_hellinger", "jeffreys", "pearson", "power"), 1),
    }  # fmt: skip


def test_the_power_family_holds_the_others():
    for k, name, factor in ((0.0, "reverse_kl", 1), (1.0, "forward_kl", 1), (0.5, "squared_hellinger", 0.25), (2.0, "pearson", 2)):
        ours = factor * curvature(R, divergence="power", power=k)
        assert torch.allclose(ours, curvature(R, divergence=name, power=9.0), rtol=1e-12)


@pytest.mark.slow
def test_the_discriminators_logit_is_the_log_density_ratio():
    """A generator whose distribution is known: all at 0 once noise of level 1 is added, where the data's density is known too."""
    setting = suite.CARD.settings["gaussians"]
    seeds = seeds_by_role(0)
    training = Training(batch_size=256, optimizer="adamw", learning_rate=3e-3, schedule="cosine")
    problem = suite.SUITE.problem(TrainContext("gaussians", setting, seeds))
    run = Run(seeds=seeds, budget=Budget(student_examples=256 * 402), training=training, oracles=[problem.teacher])
    game = Matching(problem, run, initial_share=0.001)
    game.generate = lambda batch: torch.zeros_like(batch.inputs)
    asked = problem.teacher.meter.counts["teacher_examples"]
    discriminator = Discriminator(game)
    sigma = torch.ones(200)
    noisy = torch.randn(200, 2, generator=torch.Generator().manual_seed(1))

    def critic(batch):
        losses = discriminator.losses(game, batch, weight=1.0)
        assert set(losses) == {"fake", "critic"}
        return losses

    run.loop([Learner(game.fake, critic, counts=None, extra=[discriminator])], problem.batches, steps=400)
    with torch.no_grad():
        denoised, logits = discriminator.judge(game, noisy, sigma, torch.zeros(200, dtype=torch.int64))
    angle = 2 * np.pi * np.arange(8) / 8
    modes = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    squares = ((noisy.numpy()[:, None] - modes) ** 2).sum(2)
    log_data = np.log(np.exp(-squares / (2 * 1.01)).mean(1) / 1.01)
    log_ratio = log_data + (noisy.numpy() ** 2).sum(1) / 2
    ours = logits.mean(1).numpy()
    assert np.corrcoef(ours, log_ratio)[0, 1] > 0.9
    assert np.abs(ours - log_ratio).mean() < 0.35 * np.abs(log_ratio).mean()
    assert float(denoised.abs().mean()) < 0.15  # every generated sample is 0
    assert problem.teacher.meter.counts["teacher_examples"] == asked  # the ratio costs no teacher
