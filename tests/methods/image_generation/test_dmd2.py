"""DMD2: the numbered identities, an independent oracle, the authors' numbers, and DMD inside it."""

import dataclasses
import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar

from distillbench.cards.card import Budget, Training
from distillbench.methods.image_generation import dmd, dmd2
from distillbench.problems.image_generation.adversarial import logistic_critic_loss, logistic_generator_loss
from distillbench.problems.image_generation.edm import denoising_loss, guided, karras_level
from distillbench.problems.image_generation.matching import matching_gradient, surrogate_loss
from distillbench.runs.identities import seeds_by_role
from distillbench.runs.suite import TrainContext
from distillbench.suites import image_generation as suite
from distillbench.training.run import Run
from tests.oracles import differences
from tests.oracles.image_generation import adversarial as oracle

GOLDEN = json.loads((Path(__file__).parents[2] / "goldens" / "dmd2.json").read_text())
REAL, FAKE = (0.7, 0.9), (-0.2, 1.6)  # mean and variance at one noise level


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


# --- the oracle ---


def test_losses_and_their_gradients_match_the_independent_oracle():
    rng = np.random.default_rng(0)
    real, fake = 3 * rng.standard_normal((2, 5, 3))
    for ours, theirs in (
        (logistic_generator_loss, oracle.generator),
        (lambda f: logistic_critic_loss(tensor(real), f), lambda f: oracle.critic(real, f)),
    ):
        point = tensor(fake).requires_grad_(True)
        value = ours(point)
        assert np.allclose(value.detach().numpy(), theirs(fake), rtol=1e-10)
        [slope] = torch.autograd.grad(value.sum(), point)
        assert np.allclose(slope.numpy(), differences.gradient(theirs, fake), rtol=1e-6, atol=1e-9)


# --- the identities ---


def test_2_the_surrogates_derivative_is_the_gradient_over_its_size():
    rng = np.random.default_rng(1)
    x, real, fake = (tensor(rng.standard_normal((4, 2, 3))) for _ in range(3))
    x.requires_grad_(True)
    g = matching_gradient(x, real, fake)
    loss = surrogate_loss(x, g).mean()
    loss.backward()
    assert torch.allclose(x.grad, g / x.numel(), rtol=1e-12)
    assert loss.item() == pytest.approx(0.5 * (g**2).mean().item(), rel=1e-12)


@pytest.mark.parametrize("x", [-2.0, -0.3, 0.4, 3.0])
def test_3_the_best_logit_is_the_log_density_ratio(x):
    """Pointwise: the critic's expected loss p_real softplus(-D) + p_fake softplus(D) is least at log p_real - log p_fake."""

    def density(mean, variance):
        return math.exp(-((x - mean) ** 2) / (2 * variance)) / math.sqrt(2 * math.pi * variance)

    def expected(logit):
        one, none = tensor([[logit]]), tensor([[-200.0]])  # softplus(-200) = 0: one side at a time
        return density(*REAL) * float(logistic_critic_loss(one, none)) + density(*FAKE) * float(logistic_critic_loss(-none, one))

    best = minimize_scalar(expected, bounds=(-20, 20), method="bounded", options={"xatol": 1e-10}).x
    assert best == pytest.approx(oracle.log_ratio(x, REAL, FAKE), abs=1e-5)


def test_3_a_quadratic_discriminator_of_gaussians_is_stationary_at_the_log_ratio_alone():
    node, weight = np.polynomial.hermite_e.hermegauss(80)
    weight = tensor(weight / weight.sum())
    real, fake = (tensor(m + math.sqrt(v) * node) for m, v in (REAL, FAKE))
    (m, v), (n, w) = REAL, FAKE
    best = tensor([math.log(w / v) / 2 - m**2 / (2 * v) + n**2 / (2 * w), m / v - n / w, 1 / (2 * w) - 1 / (2 * v)])

    def slope(coefficients):
        c = coefficients.clone().requires_grad_(True)

        def logits(x):
            return (c[0] + c[1] * x + c[2] * x**2)[:, None]

        [found] = torch.autograd.grad((weight * logistic_critic_loss(logits(real), logits(fake))).sum(), c)
        return found

    assert float(slope(best).abs().max()) < 1e-6
    assert float(slope(best + 0.1).abs().max()) > 1e-3


def test_3_where_real_and_fake_agree_the_critic_is_at_2_ln_2_and_the_generator_gets_no_gradient():
    zero = torch.zeros(4, 1, dtype=torch.float64)
    assert torch.allclose(logistic_critic_loss(zero, zero), tensor([2 * math.log(2)] * 4))
    assert torch.allclose(logistic_generator_loss(zero), tensor([math.log(2)] * 4))
    x = tensor(np.linspace(-1, 1, 5)).requires_grad_(True)
    logits = tensor(oracle.log_ratio(x.detach().numpy(), REAL, REAL)) + 0 * x  # D = 0 everywhere: flat in x
    [slope] = torch.autograd.grad(logistic_generator_loss(logits[:, None]).sum(), x)
    assert float(slope.abs().max()) == 0


def test_4_without_the_gan_the_mean_of_a_gaussian_converges_monotonically():
    node, weight = np.polynomial.hermite_e.hermegauss(16)
    z, eps = (tensor(a.ravel()) for a in np.meshgrid(node, node))
    weight = tensor(np.outer(weight, weight).ravel() / weight.sum() ** 2)
    mean, spread, sigma, gaps = -1.5, 0.5, 0.8, []
    for _ in range(40):
        x = mean + spread * z
        noisy = x + sigma * eps
        kept = spread**2 / (spread**2 + sigma**2)
        real, fake = 0.7 + kept * (noisy - 0.7), mean + kept * (noisy - mean)
        gaps.append(abs(mean - 0.7))
        mean -= 0.1 * float((weight * matching_gradient(x[:, None], real[:, None], fake[:, None])[:, 0]).sum())
    assert all(b < a for a, b in pairwise(gaps))
    assert gaps[-1] < 0.1 * gaps[0]


def test_5_guidance_of_one_is_the_conditional_model():
    def network(noisy, sigma, labels):
        return noisy * 0.3 if labels is None else noisy * 0.7 + labels[:, None]

    noisy, sigma, labels = torch.randn(4, 2, dtype=torch.float64), torch.ones(4), torch.arange(4)
    assert torch.allclose(guided(network, 1.0)(noisy, sigma, labels), network(noisy, sigma, labels), rtol=1e-12)


# --- the method ---


def distil(method, steps_allowed=1, batches=8, **changed):
    setting = suite.CARD.settings["gaussians"]
    problem = dataclasses.replace(suite.SUITE.problem(TrainContext("gaussians", setting, seeds_by_role(0))), steps=steps_allowed)
    training = Training(batch_size=256, optimizer="adamw", learning_rate=3e-3)
    run = Run(seeds=seeds_by_role(0), budget=Budget(student_examples=256 * batches), training=training, oracles=[problem.teacher])
    hyper = {name: h.default for name, h in method.CARD.hyperparameters.items()}
    return method.distill(problem, run, **{**hyper, **changed}), run


def same(a, b):
    return all(torch.equal(a.weights[k], b.weights[k]) for k in a.weights)


def test_without_the_gan_it_is_dmd_without_the_regression():
    shared = {"generator_rate": 0.5, "fake_rate": 1.0, "fake_updates": 2, "beta1": 0.0}
    ours, run = distil(dmd2, gan_weight=0.0, **shared)
    theirs, _ = distil(dmd, regression_weight=0.0, **shared)
    assert same(ours, theirs)
    assert ours.recipe == theirs.recipe
    assert set(run.trace) == {"initialise/imitate", "match/matching", "match/fake"}
    assert not same(ours, distil(dmd2, **shared)[0])


def test_6_one_step_of_two_is_one_step_training():
    one, two = distil(dmd2, steps_allowed=1)[0], distil(dmd2, steps_allowed=2, steps=1)[0]
    assert same(one, two)
    assert two.recipe["sigmas"] == [2.5]
    both, _ = distil(dmd2, steps_allowed=2)
    assert len(both.recipe["sigmas"]) == 2
    assert not same(one, both)


def test_the_head_learns_with_the_fake_score_and_not_in_the_generators_step(monkeypatch):
    """Trap: gradients of the generator's step reach the head, and must not stay there."""
    heads, made = [], dmd2.Heads

    def note(*args):
        heads.append(made(*args))
        return heads[-1]

    monkeypatch.setattr(dmd2, "Heads", note)
    for batches, fake_rate in ((4, 1e-30), (6, 1e-30), (6, 1.0)):
        distil(dmd2, batches=batches, fake_rate=fake_rate)
    first, still, moved = ([p.detach() for p in head.parameters()] for head in heads)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-20) for a, b in zip(first, still, strict=True))
    assert not any(torch.allclose(a, b, rtol=0, atol=1e-4) for a, b in zip(first, moved, strict=True))


# --- the authors' code ---


def seen_by(name):
    """Their stand-in classifier's logits of noisy images (5, 1, 2, 3)."""
    noisy, sigma = tensor(GOLDEN["inputs"][f"{name}_noisy"]), tensor(GOLDEN["inputs"][f"{name}_sigma"]).view(-1, 1, 1, 1)
    return 3 * (torch.sin(noisy) / (1 + sigma)).mean((1, 2, 3))[:, None] + 0.2


def test_the_generators_total_and_gradient_equal_the_authors():
    i, values = GOLDEN["inputs"], GOLDEN["values"]
    x, s, noisy = tensor(i["latents"]).requires_grad_(True), tensor(i["sigma"]).view(-1, 1, 1, 1), tensor(i["noisy"])
    level = tensor(i["gan_sigma"]).view(-1, 1, 1, 1)
    gradient = matching_gradient(x, noisy / (1 + s**2) + 0.2, 0.7 * noisy / (0.5 + s**2) - 0.1)
    shown = x + (tensor(i["gan_noisy"]) - x.detach())  # their noise, with the graph to the sample
    gan = logistic_generator_loss(3 * (torch.sin(shown) / (1 + level)).mean((1, 2, 3))[:, None] + 0.2)
    assert gan.mean().item() == pytest.approx(values["gen_cls_loss"], rel=1e-10)
    total = (surrogate_loss(x, gradient) + i["gan_weight"] * gan).mean()
    assert total.item() == pytest.approx(values["total"], rel=1e-10)
    [slope] = torch.autograd.grad(total, x)
    assert torch.allclose(slope, tensor(GOLDEN["gradients"]["latents"]), rtol=1e-9, atol=1e-14)
    assert i["gan_weight"] == dmd2.CARD.hyperparameters["gan_weight"].default


def test_the_fake_scores_total_equals_the_authors():
    i, values = GOLDEN["inputs"], GOLDEN["values"]
    x, sigma, noisy = tensor(i["latents"]), tensor(i["fake_sigma"]), tensor(i["fake_noisy"])
    fake = 0.7 * noisy / (0.5 + sigma.view(-1, 1, 1, 1) ** 2) - 0.1
    own = denoising_loss(fake, x, sigma, sigma_data=0.5)
    classifier = logistic_critic_loss(seen_by("critic_real"), seen_by("critic_fake"))
    assert float(own.mean()) == pytest.approx(values["loss_fake_mean"], rel=1e-10)
    assert float(classifier.mean()) == pytest.approx(values["guidance_cls_loss"], rel=1e-10)
    assert float((own + i["critic_weight"] * classifier).mean()) == pytest.approx(values["guidance_total"], rel=1e-10)
    assert i["critic_weight"] == dmd2.CARD.hyperparameters["critic_weight"].default


def test_the_classifiers_levels_are_the_authors_schedule():
    position = 1 - tensor(GOLDEN["inputs"]["gan_timesteps"]) / 999
    assert torch.allclose(karras_level(position, sigma_min=0.002, sigma_max=80.0), tensor(GOLDEN["inputs"]["gan_sigma"]), rtol=1e-10)
