"""f-distill: the gradient theorem by quadrature, the two normalisations, DMD as a special case, and the authors' own numbers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from distillbench.methods.image_generation.f_distill import CARD, density_ratio, f_distill_loss, level_means, ratio_weight
from distillbench.problems.image_generation.density_ratio import DIVERGENCES, curvature
from distillbench.problems.image_generation.matching import matching_gradient, surrogate_loss
from tests.oracles import differences
from tests.oracles.image_generation import density_ratio as divergences
from tests.oracles.image_generation import f_distill as oracle

GOLDEN = json.loads((Path(__file__).parents[2] / "goldens" / "f_distill.json").read_text())
K = 1.3


def tensors(*arrays):
    return [torch.tensor(a, dtype=torch.float64) for a in arrays]


def draw(seed, shape=(6, 2, 3), count=3):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape) for _ in range(count)]


def gradient(generated, real, fake, weight):
    """What the loss hands to a sample, times the number of components: g itself."""
    point = generated.clone().requires_grad_()
    f_distill_loss(point, real, fake, weight).sum().backward()
    return point.grad * generated[0].numel()


# --- the oracle ---


def test_matches_the_independent_oracle_in_value_and_gradient():
    x, real, fake = draw(0)
    weight = np.random.default_rng(1).uniform(0.2, 3, len(x))
    held = {"generated": x, "real_denoised": real, "fake_denoised": fake, "weight": weight}
    value = oracle.f_distill_loss(x, real, fake, weight)
    slope = differences.gradient(lambda v: oracle.f_distill_loss(v, real, fake, weight, held=held), x)
    point = torch.tensor(x, requires_grad=True)
    loss = f_distill_loss(point, *tensors(real, fake, weight))
    loss.sum().backward()
    assert np.allclose(loss.detach().numpy(), value, rtol=1e-10)
    assert np.allclose(point.grad.numpy(), slope, rtol=1e-7, atol=1e-9)


def test_ratio_and_level_means_match_the_independent_oracle():
    rng = np.random.default_rng(2)
    logits, place, means = rng.normal(0, 3, (40, 3)), rng.uniform(0, 1, 40), rng.uniform(0.5, 2, 5)
    place[0], place[1] = 0.0, 1.0
    ratio = density_ratio(torch.tensor(logits), low=0.1, high=20.0)
    assert np.allclose(ratio.numpy(), oracle.density_ratio(logits, 0.1, 20.0), rtol=1e-10)
    for decay in (0.0, 0.5):
        now, index = level_means(ratio, *tensors(place, means), bin_decay=decay)
        theirs, bins = oracle.level_means(ratio.numpy(), place, means, decay)
        assert np.allclose(now.numpy(), theirs, rtol=1e-10)
        assert (index.numpy() == bins).all()


# --- the identities ---

M, VARIANCE, NOISE, B, A = 0.7, 0.36, 0.25, 0.45, 0.75  # teacher N(M, VARIANCE), student B + A z, both with noise of variance NOISE
KNOWN = {"jensen_shannon": (-0.16763, 0.09890), "forward_kl": (-0.30769, 0.15905), "reverse_kl": (-0.40984, 0.30643)}


def expected_gradient(name, b, a):
    """E of g by (b, a), with the divisor taken out and in score units: the weight enters through the loss itself."""
    node, probability = divergences.normal_rule(40)
    z, eps = (v.ravel() for v in np.meshgrid(node, node))
    probability = np.outer(probability, probability).ravel()
    x = b + a * z
    noisy = x + np.sqrt(NOISE) * eps
    v_p, v_q = VARIANCE + NOISE, a**2 + NOISE
    real = noisy - NOISE * (noisy - M) / v_p
    fake = noisy - NOISE * (noisy - b) / v_q
    ratio = divergences.density(noisy, M, v_p) / divergences.density(noisy, b, v_q)
    weight = ratio_weight(torch.tensor(ratio), divergence=name, power=K)
    mean = float(curvature(torch.tensor(ratio), divergence=name, power=K).mean())  # of nodes, not an expectation: it only cancels stage 2
    scale = mean * np.abs(x - real) / NOISE  # the loss divided by |x - mu_real|, and x_0 is sigma^2 times a score
    g = gradient(*tensors(x[:, None], real[:, None], fake[:, None]), weight).numpy()[:, 0] * scale
    return np.array([(probability * g).sum(), (probability * g * z).sum()])


@pytest.mark.parametrize("name", DIVERGENCES)
def test_1_the_expected_gradient_is_that_of_the_divergence(name):
    a = 0.5 if name == "neyman" else A  # 1 / r is integrable with ease where the student is the narrower one
    exact = divergences.divergence_gradient(name, K, (M, VARIANCE + NOISE), B, a, NOISE)
    assert np.allclose(expected_gradient(name, B, a), exact, rtol=1e-5)
    if name in KNOWN:
        assert np.allclose(exact, KNOWN[name], atol=2e-5)


def test_2_with_reverse_kl_it_is_dmd():
    x, real, fake = tensors(*draw(3))
    ratio = torch.rand(6, dtype=torch.float64) * 19 + 0.1
    weight = ratio_weight(ratio, divergence="reverse_kl", power=K)
    assert torch.equal(weight, torch.ones_like(ratio))
    assert torch.allclose(gradient(x, real, fake, weight), matching_gradient(x, real, fake), rtol=1e-12)
    ours, dmd = f_distill_loss(x, real, fake, weight), surrogate_loss(x, matching_gradient(x, real, fake))
    assert torch.allclose(ours, dmd, rtol=1e-12)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_4_and_7_at_equal_densities_every_divergence_weighs_alike_and_pulls_nowhere(name):
    weight = ratio_weight(torch.ones(5, dtype=torch.float64), divergence=name, power=K)
    assert torch.allclose(weight, torch.ones_like(weight), rtol=1e-12)
    x, mu = tensors(*draw(4, (5, 3), 2))
    assert float(gradient(x, mu, mu.clone(), weight).abs().max()) == 0


def test_7_the_exact_ratio_has_mean_one_under_the_student():
    node, probability = divergences.normal_rule()
    student = B + np.sqrt(A**2 + NOISE) * node
    ratio = divergences.density(student, M, VARIANCE + NOISE) / divergences.density(student, B, A**2 + NOISE)
    assert (probability * ratio).sum() == pytest.approx(1, rel=1e-6)


def test_the_second_normalisation_keeps_the_mean_at_one_and_the_order():
    ratio = torch.tensor([0.1, 0.5, 1.0, 4.0, 20.0], dtype=torch.float64)
    weight = ratio_weight(ratio, divergence="forward_kl", power=K)
    assert float(weight.mean()) == pytest.approx(1, rel=1e-12)
    assert torch.allclose(weight, ratio / ratio.mean(), rtol=1e-12)


def test_9_a_row_alone_in_its_bin_has_ratio_one_and_an_empty_bin_keeps_its_mean():
    ratio, place = tensors([5.0, 0.3, 2.0], [0.05, 0.35, 0.37])
    means, index = level_means(ratio, place, torch.full((10,), 2.0, dtype=torch.float64), bin_decay=0.0)
    assert index.tolist() == [0, 3, 3]
    assert float(ratio[0] / means[0]) == 1.0
    assert float(means[3]) == pytest.approx(1.15, rel=1e-12)
    assert means[[1, 2, 4, 5, 6, 7, 8, 9]].tolist() == [2.0] * 8


def test_9_the_first_normalisation_takes_out_what_a_level_has_in_common():
    rng = np.random.default_rng(5)
    ratio, place = tensors(rng.uniform(0.5, 2, 50), rng.uniform(0, 1, 50))
    ones = torch.ones(4, dtype=torch.float64)
    means, index = level_means(ratio, place, ones, bin_decay=0.0)
    common = torch.tensor([3.0, 0.2, 1.0, 7.0], dtype=torch.float64)[index]
    shifted, _ = level_means(common * ratio, place, ones, bin_decay=0.0)
    assert torch.allclose(common * ratio / shifted[index], ratio / means[index], rtol=1e-12)


# --- traps ---


def test_the_ratio_is_teacher_over_student_and_has_no_graph():
    logits = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [300.0, 300.0], [-300.0, -300.0]], requires_grad=True)
    ratio = density_ratio(logits, low=0.1, high=20.0)  # logits are positive for real
    assert not ratio.requires_grad
    assert np.allclose(ratio.numpy(), [np.e, 1 / np.e, 20.0, 0.1], rtol=1e-6)


def test_no_gradient_flows_into_scores_or_weight_and_a_row_without_residual_gets_none():
    x, real, fake = tensors(*draw(6))
    weight = torch.ones(6, dtype=torch.float64)
    real[0], fake[0] = x[0], x[0]
    for t in (x, real, fake, weight):
        t.requires_grad_(True)
    f_distill_loss(x, real, fake, weight).sum().backward()
    assert real.grad is None
    assert fake.grad is None
    assert weight.grad is None
    assert float(x.grad[0].abs().max()) == 0
    assert float(x.grad[1:].abs().min()) > 0


def test_the_card_offers_every_divergence():
    assert tuple(CARD.hyperparameters["divergence"].options) == tuple(DIVERGENCES)


# --- the authors' code ---

THEIRS = {
    "kl": "forward_kl",
    "js": "jensen_shannon",
    "sf": "softened_reverse_kl",
    "sh": "squared_hellinger",
    "jf": "jeffreys",
    "neyman": "neyman",
}


@pytest.mark.parametrize("key", GOLDEN["values"]["weights"])
def test_equals_the_authors_numbers(key):
    """To single precision, which is theirs, and up to the 1e-6 that they add to denominators."""
    name, decay = key.split()
    x, real, fake, logits, t = tensors(*(GOLDEN["inputs"][k] for k in ("generated", "real", "fake", "logits", "t")))
    ratio = density_ratio(logits, low=0.1, high=20.0)
    means, index = level_means(ratio, t, torch.full((4,), 2.0, dtype=torch.float64), bin_decay=float(decay))
    assert np.allclose(means.numpy(), GOLDEN["values"]["bins"][key], rtol=5e-6)
    weight = ratio_weight(ratio / means[index], divergence=THEIRS[name], power=K)
    assert np.allclose(weight.numpy(), GOLDEN["values"]["weights"][key], rtol=2e-5)
    point = x.clone().requires_grad_()
    loss = f_distill_loss(point, real, fake, weight).mean()
    loss.backward()
    assert loss.item() == pytest.approx(GOLDEN["values"]["loss"][key], rel=5e-5)
    if key in GOLDEN["gradients"]:
        assert np.allclose(point.grad.numpy(), GOLDEN["gradients"][key], rtol=5e-5, atol=1e-8)


# --- the method ---
