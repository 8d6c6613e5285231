"""Score distillation keeps the spread of a mode where SDS loses it: particles on the exact mixture, exact scores, no training.

The distribution of N particles, smoothed by noise, is itself a mixture of Gaussians; so the fake score of the particles is known exactly at
every step. SDS (Poole et al. 2022, arXiv 2209.14988) is the same descent without a fake score: each particle answers itself.
"""

import dataclasses
import math

import pytest
import torch

from distillbench.cards.options import options_of
from distillbench.methods.image_generation.diff_instruct import instruct_loss
from distillbench.methods.image_generation.sid import identity_loss
from distillbench.methods.image_generation.sim import implicit_loss
from distillbench.problems.image_generation.matching import matching_gradient, surrogate_loss
from distillbench.suites import image_generation as suite
from distillbench.suites.image_generation import gaussians
from distillbench.suites.image_generation.nets import GaussianMixture
from distillbench.suites.metrics.modes import coverage, spread_ratio

OPTIONS = options_of(suite.CARD.settings["gaussians"], gaussians.Options)
MEANS, STD = gaussians.means(OPTIONS), OPTIONS.std
PARTICLES, STEPS, RATE = 320, 250, 0.2
LOW, HIGH = 0.02, 0.3  # noise levels: a mode is 0.1 wide and 0.77 from the next, so they look at one mode at a time

# loss(x, teacher's answer, fake score's answer), scaled so that one rate fits all, and whether the gradient passes through both.
LOSSES = {
    "sds": (lambda x, real, fake: instruct_loss(x, real, x.detach()), False),
    "diff_instruct": (instruct_loss, False),
    "dmd": (lambda x, real, fake: 0.1 * surrogate_loss(x, matching_gradient(x, real, fake)), False),
    "sid": (lambda x, real, fake: 0.05 * identity_loss(x, real, fake, alpha=1.0), True),
    "sim": (lambda x, real, fake: 0.1 * implicit_loss(x, real, fake, c=0.05), True),
}


def descend(kind, width=1.0):
    """Particles drawn from the mixture, their modes ``width`` times as wide, after the descent.   Returns (N, 2)."""
    loss, through = LOSSES[kind]
    teacher = GaussianMixture(MEANS.tolist(), STD)
    generator = torch.Generator().manual_seed(0)
    x = gaussians.draw(dataclasses.replace(OPTIONS, std=width * STD), PARTICLES, 1)[0].double()
    for step in range(STEPS):
        x.requires_grad_(True)
        sigma = LOW * (HIGH / LOW) ** torch.rand(PARTICLES, generator=generator, dtype=torch.float64)
        noisy = x + sigma[:, None] * torch.randn(x.shape, generator=generator, dtype=torch.float64)
        noisy = noisy if through else noisy.detach()
        fake = GaussianMixture(x.detach().tolist(), 0.0)
        [slope] = torch.autograd.grad(loss(x, teacher(noisy, sigma), fake(noisy, sigma)).sum(), x)
        x = (x - RATE * (1 + math.cos(math.pi * step / STEPS)) / 2 * slope).detach()
    return x.float()


def test_sds_collapses_within_a_mode():
    particles = descend("sds")
    assert spread_ratio(particles, MEANS, STD) < 0.4
    assert coverage(particles, MEANS, STD) == 1  # what counts modes alone does not see it


@pytest.mark.parametrize("kind", ["dmd", "diff_instruct", "sid", "sim"])
def test_it_does_not_collapse_within_a_mode_as_sds_does(kind):
    particles = descend(kind)
    assert 0.9 < spread_ratio(particles, MEANS, STD) < 1.15
    assert coverage(particles, MEANS, STD) == 1


@pytest.mark.parametrize("kind", ["dmd", "diff_instruct", "sid", "sim"])
def test_modes_that_are_too_narrow_widen(kind):
    assert spread_ratio(descend(kind, width=0.5), MEANS, STD) > 0.7
