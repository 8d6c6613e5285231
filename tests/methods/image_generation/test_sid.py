"""Score identity distillation: its identities on one Gaussian and on the exact mixture, an oracle, and the authors' own numbers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from distillbench.cards.options import options_of
from distillbench.methods.image_generation.sid import identity_loss
from distillbench.problems.image_generation.edm import denoising_loss, karras_level
from distillbench.suites import image_generation as suite
from distillbench.suites.image_generation import gaussians
from distillbench.suites.image_generation.nets import GaussianMixture
from tests.oracles.differences import gradient
from tests.oracles.image_generation import sid as oracle
from tests.oracles.image_generation.gaussian_pair import KEEP, SIGMA, A, B, M, S, exact, expected, quadrature, slope

GOLDEN = json.loads((Path(__file__).parents[2] / "goldens" / "sid.json").read_text())
ALPHAS = [0.5, 1.0, 1.2]


def arrays(seed=0, shape=(6, 2, 3)):
    return np.random.default_rng(seed).standard_normal((3, *shape))


# --- the oracle ---


@pytest.mark.parametrize("alpha", ALPHAS)
def test_matches_the_independent_oracle_in_value_and_gradient(alpha):
    x, real, fake = arrays()
    inputs = [torch.tensor(v, requires_grad=True) for v in (x, real, fake)]
    loss = identity_loss(*inputs, alpha=alpha)
    assert np.allclose(loss.detach().numpy(), oracle.identity_loss(x, real, fake, alpha=alpha), rtol=1e-10)
    loss.sum().backward()
    held = {"generated": x, "real_answer": real}  # the divisor is detached
    for i in range(3):
        values = [x, real, fake]

        def at(v, i=i, values=values):
            return oracle.identity_loss(*values[:i], v, *values[i + 1 :], alpha=alpha, held=held)

        assert np.allclose(inputs[i].grad.numpy(), gradient(at, values[i]), atol=1e-8)


# --- the identities, on N(M, S^2) against x = b + a z with the exact fake score ---


def expected_loss(alpha, a=A, b=B, nodes=8):
    """E omega L (the divisor undone) and its derivatives by a and b with psi frozen."""
    a, b = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (a, b))
    z, eps, weight = (torch.tensor(v) for v in quadrature(nodes))
    x = b + a * z
    noisy = x + SIGMA * eps
    real, fake = exact(noisy, M, S**2), exact(noisy, b.detach(), a.detach() ** 2)
    omega = (x - real).detach().abs()
    value = (weight * omega * identity_loss(x[:, None], real[:, None], fake[:, None], alpha=alpha)).sum()
    return float(value.detach()), np.array([float(g) for g in torch.autograd.grad(value, (a, b))])


def fisher(a, b):
    return expected(np.square, a, b)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_1_and_8_the_value_is_one_minus_alpha_times_the_divergence(alpha):
    """Negative for alpha > 1 and zero at alpha = 1, far from the optimum: the loss shows no progress."""
    assert expected_loss(alpha)[0] == pytest.approx((1 - alpha) * fisher(A, B), abs=1e-12)


def test_2_alpha_one_half_is_the_gradient_of_the_divergence():
    assert np.allclose(2 * expected_loss(0.5)[1], slope(fisher, A, B), rtol=1e-7)


def test_3_alpha_one_is_its_gradient_at_a_frozen_distribution():
    frozen = slope(lambda a, b: expected(np.square, a, b, of=(A, B)), A, B)
    assert np.allclose(2 * expected_loss(1.0)[1], frozen, rtol=1e-7)
    assert not np.allclose(frozen, slope(fisher, A, B), rtol=1e-2)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_4_for_a_shift_of_the_mean_every_alpha_has_one_gradient(alpha):
    assert expected_loss(alpha, a=S)[1][1] == pytest.approx(-((1 - KEEP) ** 2) * (M - B), rel=1e-10)


def test_5_the_divergence_in_closed_form():
    shift, turn = (1 - KEEP) * (M - B), KEEP - A**2 / (A**2 + SIGMA**2)
    assert fisher(A, B) == pytest.approx(shift**2 + turn**2 * (A**2 + SIGMA**2), rel=1e-10)


def test_7_alpha_one_is_the_product_of_two_differences():
    x, real, fake = (torch.tensor(v) for v in arrays(1))
    omega = (x - real).abs().mean((1, 2))
    assert torch.allclose(identity_loss(x, real, fake, alpha=1.0), ((real - fake) * (fake - x)).sum((1, 2)) / omega, rtol=1e-12)


# --- the exact mixture ---

OPTIONS = options_of(suite.CARD.settings["gaussians"], gaussians.Options)


def mixture_gradient(fake_shift, alpha, count=400):
    """The gradient of each sample of the mixture moved by ``fake_shift``, with the exact fake score of that moved distribution."""
    means, shift = gaussians.means(OPTIONS), torch.tensor(fake_shift, dtype=torch.float64)
    teacher, fake = GaussianMixture(means.tolist(), 0.1), GaussianMixture((means + shift).tolist(), 0.1)
    generator = torch.Generator().manual_seed(0)
    x = (gaussians.draw(OPTIONS, count, 1)[0].double() + shift).requires_grad_(True)
    sigma = torch.rand(count, generator=generator, dtype=torch.float64) * 2 + 0.02
    noisy = x + sigma[:, None] * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    loss = identity_loss(x, teacher(noisy, sigma), fake(noisy, sigma), alpha=alpha)
    return torch.autograd.grad(loss.sum(), x)[0]


@pytest.mark.parametrize("alpha", ALPHAS)
def test_6_zero_gradient_where_generator_and_teacher_agree_on_the_analytic_mixture(alpha):
    assert float(mixture_gradient([0.0, 0.0], alpha).abs().max()) < 1e-12


def test_where_they_disagree_descent_moves_the_mixture_back():
    for shift in ([0.2, 0.0], [0.0, -0.2]):
        mean = mixture_gradient(shift, 1.2, count=4000).mean(0)
        assert float(mean @ torch.tensor(shift, dtype=torch.float64)) > 0.01


def test_without_the_graph_through_the_scores_it_is_another_gradient():
    """The trap: with both answers detached only - (f_phi - f_psi) / omega is left."""
    x, real, fake = (torch.tensor(v) for v in arrays(2))
    x.requires_grad_(True)
    identity_loss(x, real, fake, alpha=1.2).sum().backward()
    omega = (x - real).abs().mean((1, 2)).detach().view(-1, 1, 1)
    assert torch.allclose(x.grad, (fake - real) / omega)


def test_a_row_that_the_teacher_leaves_in_place_stays_finite():
    x = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    loss = identity_loss(x, x.detach().clone(), x.detach() + 1e-7, alpha=1.2)
    loss.sum().backward()
    assert bool(torch.isfinite(loss).all() and torch.isfinite(x.grad).all())


# --- the authors' code ---


def golden(name):
    return torch.tensor(GOLDEN["inputs"][name], dtype=torch.float64)


@pytest.mark.parametrize("alpha", ["1.2", "1.0", "0.5"])
def test_equals_the_authors_numbers(alpha):
    x, s = golden("samples").requires_grad_(True), golden("sigma").view(-1, 1, 1, 1)
    noisy = x + golden("noise")
    loss = identity_loss(x, torch.tanh(noisy) / (1 + s**2) + 0.2, 0.7 * noisy / (0.5 + s**2) - 0.1, alpha=float(alpha))
    assert torch.allclose(loss, torch.tensor(GOLDEN["values"][alpha], dtype=torch.float64), rtol=1e-10)
    loss.sum().backward()
    assert torch.allclose(x.grad, torch.tensor(GOLDEN["gradients"][alpha], dtype=torch.float64), rtol=1e-10)


def test_the_fake_scores_loss_equals_the_authors():
    noisy, s = golden("fake_noisy"), golden("fake_sigma")
    fake = 0.7 * noisy / (0.5 + s.view(-1, 1, 1, 1) ** 2) - 0.1
    loss = denoising_loss(fake, golden("samples"), s, sigma_data=0.5)
    assert torch.allclose(loss, torch.tensor(GOLDEN["values"]["fake"], dtype=torch.float64), rtol=1e-10)


def test_noise_levels_are_the_authors_schedule():
    """Their uniform u counts from the smallest level, up to t_max / 1000: the position that ``high`` bounds."""
    level = karras_level(1 - 0.8 * golden("uniform"), sigma_min=0.002, sigma_max=80.0)
    assert torch.allclose(level, golden("sigma"), rtol=1e-10)


# --- the method ---
