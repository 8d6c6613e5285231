"""Diff-Instruct: its identities on one Gaussian, its relation to DMD and to SDS, an oracle, and the authors' own numbers."""

import json
from pathlib import Path

import numpy as np
import torch

from distillbench.methods.image_generation.diff_instruct import instruct_loss
from distillbench.problems.image_generation.matching import matching_gradient
from tests.oracles.differences import gradient
from tests.oracles.image_generation import diff_instruct as oracle
from tests.oracles.image_generation.gaussian_pair import SIGMA, A, B, M, S, exact, quadrature, slope

GOLDEN = json.loads((Path(__file__).parents[2] / "goldens" / "diff_instruct.json").read_text())


def arrays(seed=0, shape=(6, 2, 3)):
    return np.random.default_rng(seed).standard_normal((3, *shape))


def slope_by_sample(x, real, fake):
    x = x.clone().requires_grad_(True)
    return torch.autograd.grad(instruct_loss(x, real, fake).sum(), x)[0]


def test_matches_the_independent_oracle_in_value_and_gradient():
    x, real, fake = arrays()
    inputs = [torch.tensor(v, requires_grad=True) for v in (x, real, fake)]
    loss = instruct_loss(*inputs)
    assert np.allclose(loss.detach().numpy(), oracle.instruct_loss(x, real, fake), rtol=1e-10)
    loss.sum().backward()
    assert np.allclose(inputs[0].grad.numpy(), gradient(lambda v: oracle.instruct_loss(v, real, fake), x), atol=1e-8)
    assert inputs[1].grad is None  # nothing reaches the two denoisers
    assert inputs[2].grad is None


# --- the identities, on N(M, S^2) against x = B + A z with the exact fake score ---


def gaussian_gradient(a, b):
    """The derivatives of E L by a and b."""
    z, eps, weight = (torch.tensor(v) for v in quadrature())
    noisy = b + a * z + SIGMA * eps
    g = slope_by_sample((b + a * z)[:, None], exact(noisy, M, S**2)[:, None], exact(noisy, b, a**2)[:, None])[:, 0]
    return np.array([float((weight * g * z).sum()), float((weight * g).sum())])


def test_1_the_expected_gradient_in_closed_form():
    v_p, v_g = S**2 + SIGMA**2, A**2 + SIGMA**2
    assert np.allclose(gaussian_gradient(A, B), SIGMA**2 * np.array([A * (1 / v_p - 1 / v_g), (B - M) / v_p]), rtol=1e-10)


def test_1_it_is_that_of_the_kl_divergence_of_the_noisy_distributions():
    def divergence(a, b):
        v_p, v_g = S**2 + SIGMA**2, a**2 + SIGMA**2
        return (v_g / v_p - 1 - np.log(v_g / v_p) + (b - M) ** 2 / v_p) / 2

    assert np.allclose(gaussian_gradient(A, B), SIGMA**2 * slope(divergence, A, B), rtol=1e-8)


def test_2_at_the_optimum_the_gradient_is_zero_for_every_sample():
    x, real, _ = (torch.tensor(v) for v in arrays(1))
    assert float(slope_by_sample(x, real, real.clone()).abs().max()) == 0


def test_3_the_smoothed_divergence_of_two_points_is_finite():
    """Two points d apart have no common support; at noise level s the gradient is the slope of s^2 d^2 / (2 s^2): d."""
    x, y = torch.tensor([[0.4, 0.0]]).double(), torch.tensor([[0.1, 0.0]]).double()
    assert torch.allclose(slope_by_sample(x, y, x), x - y)  # both denoisers answer their own point


def test_4_a_generator_that_ignores_its_noise_has_the_gradient_of_sds():
    """With the fake score of one point, D_psi = x, what is left is x - D_phi(x_t): the pull onto a mode."""
    x, real, _ = (torch.tensor(v) for v in arrays(2))
    assert torch.allclose(slope_by_sample(x, real, x), x - real)


def test_5_dmds_weight_makes_it_dmds_gradient():
    x, real, fake = (torch.tensor(v) for v in arrays(3))
    weight = 1 / (x - real).abs().mean((1, 2), keepdim=True)
    assert torch.allclose(weight * slope_by_sample(x, real, fake), matching_gradient(x, real, fake), rtol=1e-12)


# --- the authors' code ---


def golden(name):
    return torch.tensor(GOLDEN["inputs"][name], dtype=torch.float64)


def test_equals_the_authors_numbers():
    x, s = golden("samples").requires_grad_(True), golden("sigma").view(-1, 1, 1, 1)
    noisy = (x + golden("noise")).detach()
    loss = instruct_loss(x, torch.tanh(noisy) / (1 + s**2) + 0.2, 0.7 * noisy / (0.5 + s**2) - 0.1)
    assert torch.allclose(loss, torch.tensor(GOLDEN["values"]["loss"], dtype=torch.float64), rtol=1e-10)
    loss.sum().backward()
    assert torch.allclose(x.grad, torch.tensor(GOLDEN["gradients"]["samples"], dtype=torch.float64), rtol=1e-10)


def test_noise_levels_are_the_authors_distribution():
    assert torch.allclose((1.2 * golden("normal") - 1.2).exp(), golden("sigma"), rtol=1e-10)


# --- the method ---
