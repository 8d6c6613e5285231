"""The curvatures of the f-divergences against their definitions, and the discriminator that estimates a density ratio."""

import numpy as np
import pytest
import torch

from bench.density_ratio import DIVERGENCES, curvature, law_curvature
from tests.oracles.image_generation import density_ratio as oracle

R = torch.logspace(-1, 1.3, 24, dtype=torch.float64)
K = 1.7


@pytest.mark.parametrize("name", DIVERGENCES)
def test_curvature_is_r_squared_f_second(name):
    ours = curvature(R, divergence=name, power=K).numpy()
    assert np.allclose(ours, oracle.curvature(R.numpy(), name, K), rtol=1e-6, atol=1e-8)
    assert (ours > 0).all()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_law_curvature_is_c_less_r_times_its_slope(name):
    r = R.clone().requires_grad_()
    c = curvature(r, divergence=name, power=K)
    slope = torch.autograd.grad(c.sum(), r)[0] if c.requires_grad else torch.zeros_like(r)
    assert torch.allclose(law_curvature(R, divergence=name, power=K), (c - r * slope).detach(), rtol=1e-12, atol=1e-12)


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
