"""Uni-Instruct: the expansion of f-divergences and its gradient by quadrature; DMD, f-distill, SIM and SiD as special cases."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from distillbench.methods.image_generation.uni_instruct import CARD, density_ratio, uni_instruct_loss
from distillbench.problems.image_generation.density_ratio import DIVERGENCES, curvature
from distillbench.problems.image_generation.matching import matching_gradient
from tests.oracles.image_generation import density_ratio as divergences
from tests.oracles.image_generation import uni_instruct as oracle

GOLDEN = json.loads((Path(__file__).parents[2] / "goldens" / "uni_instruct.json").read_text())
K = 1.3


def tensors(*arrays):
    return [torch.tensor(a, dtype=torch.float64) for a in arrays]


def networks(noisy, sigma):
    """Two denoisers and a log ratio in closed form, for torch and numpy alike."""
    s = sigma.reshape(-1, 1)
    return noisy / (1 + s**2) + 0.2, 0.7 * noisy / (0.5 + s**2) - 0.1, 0.3 * noisy.sum(1) - 0.2 * (noisy**2).sum(1)


# --- the oracle ---


@pytest.mark.parametrize("name", DIVERGENCES)
def test_matches_the_independent_oracle_in_value_and_gradient(name):
    rng = np.random.default_rng(0)
    x, eps, sigma = rng.standard_normal((5, 3)), rng.standard_normal((5, 3)), rng.uniform(0.3, 1.5, 5)

    def theirs(x):
        real, fake, log = networks(x + sigma[:, None] * eps, sigma)
        return oracle.uni_instruct_loss(x, real, fake, np.exp(log), name, K, 0.7)

    point = torch.tensor(x, requires_grad=True)
    s = torch.tensor(sigma)
    real, fake, log = networks(point + s[:, None] * torch.tensor(eps), s)
    ours = uni_instruct_loss(point, real, fake, log.exp(), divergence=name, power=K, law=0.7)
    ours.sum().backward()
    assert np.allclose(ours.detach().numpy(), theirs(x), rtol=1e-6, atol=1e-8)
    numeric, step = np.zeros_like(x), 1e-3
    for i in np.ndindex(x.shape):
        moved = [x.copy(), x.copy()]
        moved[0][i] += step
        moved[1][i] -= step
        numeric[i] = (theirs(moved[0]).sum() - theirs(moved[1]).sum()) / (2 * step)
    assert np.allclose(point.grad.numpy(), numeric, rtol=1e-4, atol=1e-5)


# --- Gaussians: student b + a z, teacher N(MEAN, VARIANCE) ---

MEAN, VARIANCE, B, A, SIGMA = 0.7, 0.36, 0.45, 0.5, 0.5


def expected_gradient(name, sigma, *, law=1.0, slope="exact", b=B, a=A, nodes=40):
    """By (b, a): the gradient of the expected loss in score units, times two, with student score, teacher and ratio as functions."""
    node, probability = divergences.normal_rule(nodes)
    z, eps = (torch.tensor(v.ravel()) for v in np.meshgrid(node, node))
    weight = torch.tensor(np.outer(probability, probability).ravel())
    theta = torch.tensor([b, a], dtype=torch.float64, requires_grad=True)
    x = (theta[0] + theta[1] * z)[:, None]
    noisy = x + sigma * eps[:, None]
    v_q, v_p = VARIANCE + sigma**2, a**2 + sigma**2
    real = noisy - sigma**2 * (noisy - MEAN) / v_q
    fake = noisy - sigma**2 * (noisy - b) / v_p
    log = (noisy - b) ** 2 / (2 * v_p) - (noisy - MEAN) ** 2 / (2 * v_q) + 0.5 * np.log(v_p / v_q)
    ratio = log[:, 0].exp()
    if slope != "exact":
        ratio = density_ratio(log, noisy, (fake - real) / sigma**2, slope=slope, limit=1e30)
    loss = uni_instruct_loss(x, real, fake, ratio, divergence=name, power=K, law=law)
    (2 * (weight * loss).sum() / sigma**4).backward()
    return theta.grad.numpy()


@pytest.mark.parametrize(("name", "value"), [("reverse_kl", 0.13725), ("forward_kl", 0.09135), ("jensen_shannon", 0.05160)])
def test_1_the_divergence_is_the_integral_of_the_score_divergence(name, value):
    """int 1/2 E_student C(r) |score difference|^2 d(sigma^2) over [0, 4] is what D_f loses on the way."""
    teacher, student = (0.7, 0.36), (0.45, 0.5625)
    node, weight = divergences.legendre(80)
    t, weight = node + 1, weight  # sigma
    a = np.sqrt(student[1])
    inside = [s * oracle.score_divergence(name, K, teacher, student[0], a, s) for s in t]

    def at(noise):
        return divergences.divergence(name, K, (teacher[0], teacher[1] + noise), (student[0], student[1] + noise))

    assert (weight * inside).sum() == pytest.approx(at(0) - at(4.0), rel=1e-5)
    assert at(0) - at(4.0) == pytest.approx(value, abs=3e-5)


@pytest.mark.parametrize("slope", ["exact", "scores", "discriminator"])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_2_the_gradient_is_that_of_the_score_divergence(name, slope):
    a = 0.7 if name == "pearson" else A  # r^2 is integrable with ease where the student is the wider one
    exact = oracle.gradient(lambda b, a: oracle.score_divergence(name, K, (MEAN, VARIANCE), b, a, SIGMA), B, a)
    assert np.allclose(expected_gradient(name, SIGMA, slope=slope, a=a), exact, rtol=1e-4)


def test_2_and_3_the_numbers_with_and_without_the_ratios_slope():
    """The released code holds r fixed in the second term: that is another gradient wherever C is no constant."""
    assert np.allclose(expected_gradient("forward_kl", SIGMA), [-2.0, -2.76], atol=5e-3)
    assert np.allclose(expected_gradient("forward_kl", SIGMA, slope="none"), [-2.0, -2.10], atol=5e-3)
    assert np.allclose(expected_gradient("reverse_kl", SIGMA), [-1.344, -1.313], atol=5e-4)
    assert np.allclose(expected_gradient("reverse_kl", SIGMA, slope="none"), [-1.344, -1.313], atol=5e-4)
    assert np.allclose(expected_gradient("reverse_kl", SIGMA, law=0.0), [-1.639, -1.443], atol=5e-4)


def test_4_it_contains_sim():
    """law 0 with C = 1 is SIM's squared distance, and its gradient that of a score distance under a law that is held."""
    rng = np.random.default_rng(1)
    x, eps, sigma = rng.standard_normal((6, 4)), rng.standard_normal((6, 4)), rng.uniform(0.3, 1.5, 6)
    noisy = x + sigma[:, None] * eps
    real, fake, log = networks(noisy, sigma)
    ours = uni_instruct_loss(*tensors(x, real, fake, np.exp(log)), divergence="reverse_kl", power=K, law=0.0).numpy()
    assert np.allclose(2 * x.shape[1] * ours / sigma**4, oracle.sim_loss(x, noisy, real, fake, sigma), rtol=1e-10)
    held = oracle.gradient(lambda b, a: oracle.score_divergence("reverse_kl", K, (MEAN, VARIANCE), b, a, SIGMA, law=(B, A**2)), B, A)
    assert np.allclose(expected_gradient("reverse_kl", SIGMA, law=0.0), held, rtol=1e-5)


def test_4_it_contains_sid():
    """SiD's loss (D_phi - D_psi) . (D_psi - x) + (1 - alpha) |D_phi - D_psi|^2 is reverse KL at law 2 (1 - alpha)."""
    x, real, fake = tensors(*np.random.default_rng(2).standard_normal((3, 6, 4)))
    for alpha in (0.5, 1.0, 1.2):
        ours = uni_instruct_loss(x, real, fake, torch.ones(6).double(), divergence="reverse_kl", power=K, law=2 * (1 - alpha))
        sid = ((real - fake) * (fake - x) + (1 - alpha) * (real - fake) ** 2).mean(1)
        assert torch.allclose(ours, sid, rtol=1e-12)


@pytest.mark.parametrize("name", ["reverse_kl", "jensen_shannon", "forward_kl"])
def test_5_it_contains_dmd_and_f_distill(name):
    """int w(t) dD_f(t) dt, t = sigma^2, is int W(t) d(1/2 E C |..|^2) dt + W(T) dD_f(T), W = int_0^t w; here w = 1 from .04 to 4.

    The left side is DMD's own gradient (times C(r) for f-distill), the right side Uni-Instruct's.
    """
    start, end, a = 0.04, 4.0, 0.7
    node, weight = divergences.legendre(24)
    t, weight = start + (end - start) * (node + 1) / 2, weight * (end - start) / 2

    def dmd(noise):
        z, eps = (v.ravel() for v in np.meshgrid(*[divergences.normal_rule(30)[0]] * 2))
        probability = np.outer(*[divergences.normal_rule(30)[1]] * 2).ravel()
        x = B + a * z
        noisy = x + np.sqrt(noise) * eps
        v_q, v_p = VARIANCE + noise, a**2 + noise
        real, fake = noisy - noise * (noisy - MEAN) / v_q, noisy - noise * (noisy - B) / v_p
        ratio = divergences.density(noisy, MEAN, v_q) / divergences.density(noisy, B, v_p)
        g = matching_gradient(*tensors(x[:, None], real[:, None], fake[:, None])).numpy()[:, 0] * np.abs(x - real) / noise
        g = g * curvature(torch.tensor(ratio), divergence=name, power=K).numpy()
        return np.array([(probability * g).sum(), (probability * g * z).sum()])

    left = sum(w * dmd(noise) for w, noise in zip(weight, t, strict=True))
    ours = [expected_gradient(name, np.sqrt(noise), a=a, nodes=30) / 2 for noise in t]
    right = sum(w * (noise - start) * g for w, noise, g in zip(weight, t, ours, strict=True)) + (end - start) * dmd(end)
    assert np.allclose(left, right, rtol=1e-5)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_6_at_the_optimum_value_and_gradient_are_zero_for_every_sample(name):
    x, eps, log = tensors(*np.random.default_rng(3).standard_normal((3, 6, 2)))
    x.requires_grad_(True)
    noisy = x + 0.5 * eps
    mu = 0.6 * noisy + 0.1
    loss = uni_instruct_loss(x, mu, mu, (log.sum(1) + noisy.sum(1)).exp(), divergence=name, power=K, law=1.0)
    loss.sum().backward()
    assert float(loss.detach().abs().max()) == 0
    assert float(x.grad.abs().max()) == 0


def test_7_forward_kl_is_the_score_distance_under_the_teachers_law():
    teacher = (MEAN, VARIANCE)
    ours = oracle.score_divergence("forward_kl", K, teacher, B, A, SIGMA)
    assert ours == pytest.approx(oracle.score_divergence("reverse_kl", K, teacher, B, A, SIGMA, law=teacher), rel=1e-6)
    held = oracle.gradient(lambda b, a: oracle.score_divergence("reverse_kl", K, teacher, b, a, SIGMA, law=teacher), B, A)
    assert np.allclose(expected_gradient("forward_kl", SIGMA), held, rtol=1e-5)


# --- the ratio ---


def test_the_ratio_is_the_exponential_of_the_logit_within_its_limits_and_slopes_as_told():
    noisy = torch.tensor([[0.5, -1.0], [2.0, 1.0], [3.0, 3.0]], requires_grad=True)
    difference = torch.tensor([[1.0, -2.0], [0.5, 0.5], [1.0, 1.0]])
    expected = {"none": torch.zeros(2), "scores": -difference[0], "discriminator": torch.tensor([1.5, 0.5])}
    for slope, wanted in expected.items():
        logits = torch.stack([noisy[:, 0], 2 * noisy[:, 0] + noisy[:, 1]], dim=1)
        ratio = density_ratio(logits, noisy, difference, slope=slope, limit=10.0)
        mean = logits.mean(1).detach()
        assert torch.allclose(ratio.detach(), mean.exp().clamp(0.1, 10.0))
        got = torch.autograd.grad(ratio.sum(), noisy, allow_unused=True)[0] if ratio.requires_grad else torch.zeros_like(noisy)
        assert torch.allclose(got[0], wanted * ratio[0].detach())
        assert float(got[2].abs().max()) == 0  # at the limit
    assert torch.equal(density_ratio(logits, noisy, difference, slope="scores", limit=1.0), torch.ones(3))


def test_the_card_offers_every_divergence():
    assert tuple(CARD.hyperparameters["divergence"].options) == tuple(DIVERGENCES)


# --- the authors' code ---


def test_before_the_ratio_is_used_the_loss_equals_the_authors():
    """Their first 200,000 images, to the single precision of their divisor. After those their ratio is made of a loss: not comparable."""
    i = GOLDEN["inputs"]
    x, sigma, noisy = tensors(i["generated"], i["sigma"], i["noisy"])
    x.requires_grad_(True)
    moved = x + (noisy - x).detach()
    s = sigma.view(-1, 1, 1, 1)
    real, fake = moved / (1 + s**2) + 0.2, 0.7 * moved / (0.5 + s**2) - 0.1
    size = (x - real).abs().mean((1, 2, 3)).detach()
    for name, law in (("reverse_kl", 0.0), ("forward_kl", 1.0)):
        ours = uni_instruct_loss(x, real, fake, torch.ones(len(x)).double(), divergence=name, power=K, law=law) / size
        total = ours * x[0].numel()
        assert torch.allclose(total.detach(), torch.tensor(GOLDEN["values"]["loss"], dtype=torch.float64), rtol=1e-6)
        slope = torch.autograd.grad(total.sum(), x, retain_graph=True)[0]
        assert torch.allclose(slope, torch.tensor(GOLDEN["gradients"]["generated"], dtype=torch.float64), rtol=1e-6)


# --- the method ---
