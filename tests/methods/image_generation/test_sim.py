"""Score implicit matching: the score-gradient theorem on one Gaussian, its relation to SiD, an oracle, and the exact mixture."""

import numpy as np
import pytest
import torch

from distillbench.cards.options import options_of
from distillbench.methods.image_generation.sid import identity_loss
from distillbench.methods.image_generation.sim import implicit_loss
from distillbench.suites import image_generation as suite
from distillbench.suites.image_generation import gaussians
from distillbench.suites.image_generation.nets import GaussianMixture
from tests.oracles.differences import gradient
from tests.oracles.image_generation import sim as oracle
from tests.oracles.image_generation.gaussian_pair import KEEP, SIGMA, A, B, M, S, exact, expected, quadrature, slope


def arrays(seed=0, shape=(6, 2, 3)):
    return np.random.default_rng(seed).standard_normal((3, *shape))


def tensors(seed=0):
    return [torch.tensor(v) for v in arrays(seed)]


@pytest.mark.parametrize("c", [0.01, 0.5])
def test_matches_the_independent_oracle_in_value_and_gradient(c):
    """The gradient passes through the distance's derivative too: nothing is held."""
    values = list(arrays())
    inputs = [torch.tensor(v, requires_grad=True) for v in values]
    loss = implicit_loss(*inputs, c=c)
    assert np.allclose(loss.detach().numpy(), oracle.implicit_loss(*values, c=c), rtol=1e-10)
    loss.sum().backward()
    for i in range(3):

        def at(v, i=i):
            return oracle.implicit_loss(*values[:i], v, *values[i + 1 :], c=c)

        assert np.allclose(inputs[i].grad.numpy(), gradient(at, values[i]), atol=1e-8)


# --- the identities, on N(M, S^2) against x = b + a z with the exact fake score ---


def expected_loss(c, a=A, b=B, nodes=60):
    """E L and its derivatives by a and b with psi frozen."""
    a, b = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (a, b))
    z, eps, weight = (torch.tensor(v) for v in quadrature(nodes))
    x = b + a * z
    noisy = x + SIGMA * eps
    real, fake = exact(noisy, M, S**2), exact(noisy, b.detach(), a.detach() ** 2)
    value = (weight * implicit_loss(x[:, None], real[:, None], fake[:, None], c=c)).sum()
    return float(value.detach()), np.array([float(g) for g in torch.autograd.grad(value, (a, b))])


@pytest.mark.parametrize("c", [0.3, 1.0])
def test_the_theorem_gradient_of_the_pseudo_huber_divergence_at_a_frozen_distribution(c):
    frozen = slope(lambda a, b: expected(lambda y: np.hypot(y, c) - c, a, b, of=(A, B)), A, B)
    assert np.allclose(expected_loss(c)[1], frozen, rtol=1e-5)
    full = slope(lambda a, b: expected(lambda y: np.hypot(y, c) - c, a, b), A, B)
    assert not np.allclose(frozen, full, rtol=1e-2)  # 2: not that of the divergence itself


def test_1_a_large_c_is_sid_with_alpha_one():
    """c L -> sum (f_phi - f_psi) (f_psi - x): SiD's loss at alpha = 1 without its divisor, in value and in gradient."""
    x, real, fake = tensors(1)
    x.requires_grad_(True)
    omega = (x - real).detach().abs().mean((1, 2))
    squared, huber = omega * identity_loss(x, real, fake, alpha=1.0), 1e6 * implicit_loss(x, real, fake, c=1e6)
    assert torch.allclose(squared, huber, rtol=1e-8)
    slopes = [torch.autograd.grad(v.sum(), x)[0] for v in (squared, huber)]
    assert torch.allclose(*slopes, rtol=1e-8)


def test_1_the_squared_distance_by_numbers():
    """Twice c L at a large c is the gradient of E |f_phi - f_psi|^2 at a frozen distribution: by hand, and by finite differences."""
    ours = 2e4 * expected_loss(1e4)[1]
    assert np.allclose(ours, slope(lambda a, b: expected(np.square, a, b, of=(A, B)), A, B), rtol=1e-5)


@pytest.mark.parametrize("c", [0.3, 1.0])
def test_3_the_value_averages_to_zero_however_far_the_generator_is(c):
    assert expected_loss(c)[0] == pytest.approx(0, abs=1e-8)
    assert expected_loss(c, b=3.0)[0] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("c", [1e-3, 0.3, 10.0])
def test_5_the_value_is_at_most_the_residual(c):
    """|d'| <= 1 for every c."""
    x, real, fake = tensors(2)
    assert bool((implicit_loss(x, real, fake, c=c).abs() <= (fake - x).flatten(1).norm(dim=1)).all())


def test_6_for_a_shift_of_the_mean_the_gradient_is_known():
    """a = S: y = (1 - k)(M - b) everywhere and dL/db = -(1 - k) y / sqrt(y^2 + c^2), so descent moves b towards M."""
    y, c = (1 - KEEP) * (M - B), 0.05
    assert expected_loss(c, a=S)[1][1] == pytest.approx(-(1 - KEEP) * y / np.hypot(y, c), rel=1e-9)


def test_7_without_c_the_size_of_the_difference_does_not_matter():
    x, real, fake = tensors(3)
    tripled = fake + 3 * (real - fake)
    assert torch.allclose(implicit_loss(x, real, fake, c=1e-12), implicit_loss(x, tripled, fake, c=1e-12), rtol=1e-9)
    assert torch.allclose(implicit_loss(x, real, fake, c=0.5), implicit_loss(x, tripled, fake, c=1.5), rtol=1e-9)


def test_the_length_is_that_of_the_whole_row():
    """Two components of a row share one divisor; a distance a component would not."""
    x, fake = torch.zeros(1, 2).double(), torch.tensor([[1.0, 0.0]]).double()
    small, large = (fake + torch.tensor([[0.3, other]]).double() for other in (0.0, 4.0))
    values = [float(implicit_loss(x, real, fake, c=1e-9)) for real in (small, large)]
    assert values == pytest.approx([1.0, 0.3 / np.hypot(0.3, 4.0)])


def test_4_zero_gradient_where_generator_and_teacher_agree_on_the_analytic_mixture():
    options = options_of(suite.CARD.settings["gaussians"], gaussians.Options)
    net = GaussianMixture(gaussians.means(options).tolist(), 0.1)
    generator = torch.Generator().manual_seed(0)
    x = gaussians.draw(options, 400, 1)[0].double().requires_grad_(True)
    sigma = torch.rand(400, generator=generator, dtype=torch.float64) * 2 + 0.02
    noisy = x + sigma[:, None] * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    loss = implicit_loss(x, net(noisy, sigma), net(noisy, sigma), c=0.01)
    assert float(loss.abs().max()) == 0
    assert float(torch.autograd.grad(loss.sum(), x)[0].abs().max()) < 1e-12
