"""Distribution matching: the numbered identities of the method, an independent oracle, and the authors' own numbers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from distillbench.problems.image_generation.edm import denoising_loss, heun_solve, karras_grid, karras_level
from distillbench.problems.image_generation.matching import matching_gradient, surrogate_loss
from distillbench.runs.plan import plan
from distillbench.runs.runner import execute
from distillbench.runs.store import Store
from tests.oracles.image_generation import diffusion
from tests.oracles.image_generation import dmd as oracle

GOLDEN = json.loads((Path(__file__).parents[2] / "goldens" / "dmd.json").read_text())


def draw(seed, shape=(6, 2, 3), count=3):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape) for _ in range(count)]


def tensors(*arrays):
    return [torch.tensor(a, dtype=torch.float64) for a in arrays]


# --- the oracle ---


def test_matches_the_independent_oracle():
    x, real, fake = draw(0)
    g = oracle.matching_gradient(x, real, fake)
    assert np.allclose(matching_gradient(*tensors(x, real, fake)).numpy(), g, rtol=1e-10)
    assert np.allclose(surrogate_loss(*tensors(x, g)).numpy(), oracle.surrogate_loss(x, g), rtol=1e-10)


def test_the_gradient_of_the_surrogate_matches_finite_differences_around_its_anchor():
    """With the anchor a = x - g held, 1/2 mean (x - a)^2 has the central difference g / numel."""
    x, _, g = draw(1)
    point = torch.tensor(x, requires_grad=True)
    surrogate_loss(point, torch.tensor(g)).sum().backward()
    anchor, step = x - g, 1e-5
    numeric = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        moved = [x.copy(), x.copy()]
        moved[0][index] += step
        moved[1][index] -= step
        up, down = (oracle.surrogate_loss(m, m - anchor).sum() for m in moved)
        numeric[index] = (up - down) / (2 * step)
    assert np.allclose(point.grad.numpy(), numeric, rtol=1e-7, atol=1e-10)


# --- the identities ---

M, S, A, B, SIGMA = 0.7, 0.5, 0.9, 0.1, 0.8  # data N(M, S^2), generator x = B + A z, one noise level


def exact(x, mean, variance):
    return mean + variance / (variance + SIGMA**2) * (x - mean)


def quadrature():
    """Nodes (z, eps) and weights of a Gauss-Hermite rule: exact for the polynomials below."""
    node, weight = np.polynomial.hermite_e.hermegauss(8)
    weight = weight / weight.sum()
    z, eps = np.meshgrid(node, node)
    return z.ravel(), eps.ravel(), np.outer(weight, weight).ravel()


@pytest.mark.parametrize("unit", ["score", "x0"])
def test_1_and_2_expected_gradient_is_that_of_the_kl_divergence(unit):
    z, eps, weight = quadrature()
    x = B + A * z
    noisy = x + SIGMA * eps
    real, fake = exact(noisy, M, S**2), exact(noisy, B, A**2)
    g = matching_gradient(*tensors(x[:, None], real[:, None], fake[:, None])).numpy()[:, 0]
    unnormalised = g * np.abs(x - real) / (SIGMA**2 if unit == "score" else 1)
    v_p, v_g = S**2 + SIGMA**2, A**2 + SIGMA**2
    scale = 1 if unit == "score" else SIGMA**2
    assert (weight * unnormalised).sum() == pytest.approx(scale * (B - M) / v_p, rel=1e-9)
    assert (weight * unnormalised * z).sum() == pytest.approx(scale * A * (1 / v_p - 1 / v_g), rel=1e-9)
    if unit == "score":
        assert (B - M) / v_p == pytest.approx(-0.6742, abs=1e-4)


def test_3_at_the_optimum_the_gradient_is_zero_for_every_sample():
    x, noisy = tensors(*draw(2, (50, 2), 2))
    mu = exact(noisy, M, S**2)
    assert float(matching_gradient(x, mu, mu.clone()).abs().max()) == 0


def test_4_the_surrogate_hands_on_the_gradient_and_nothing_else():
    x, g = tensors(*draw(3, count=2))
    x.requires_grad_(True)
    loss = surrogate_loss(x, g)
    loss.mean().backward()
    assert torch.allclose(x.grad, g / g.numel(), rtol=1e-12)
    assert torch.allclose(loss, g.flatten(1).square().mean(1) / 2, rtol=1e-12)


def test_5_scale_equivariance_and_whose_residual_divides():
    x, real, fake = tensors(*draw(4))
    assert torch.allclose(matching_gradient(7 * x, 7 * real, 7 * fake), matching_gradient(x, real, fake), rtol=1e-12)
    doubled = matching_gradient(real + 2 * (x - real), real, fake)  # twice the teacher's residual, half the gradient
    assert torch.allclose(doubled, matching_gradient(x, real, fake) / 2, rtol=1e-12)


def test_7_the_x0_form_is_the_weighted_score_difference():
    x, noisy = tensors(*draw(5, (20, 4), 2))
    real, fake = exact(noisy, M, S**2), exact(noisy, B, A**2)
    weight = SIGMA**2 / (x - real).abs().mean(1, keepdim=True)
    score = (fake - noisy) / SIGMA**2 - (real - noisy) / SIGMA**2
    assert torch.allclose(matching_gradient(x, real, fake), weight * score, rtol=1e-10)


# --- traps ---


def test_the_direction_is_fake_minus_real():
    """A descent step moves the sample from where the fake score pulls towards where the real one does."""
    x = torch.zeros(1, 2, dtype=torch.float64)
    real, fake = torch.tensor([[1.0, 1.0]]).double(), torch.tensor([[-1.0, -1.0]]).double()
    assert bool((-matching_gradient(x, real, fake) > 0).all())


def test_a_row_without_residual_gets_no_gradient_and_leaves_the_others_alone():
    x, real, fake = tensors(*draw(6))
    real[0], fake[0] = x[0], x[0]
    g = matching_gradient(x, real, fake)
    assert float(g[0].abs().max()) == 0
    assert torch.equal(g[1:], matching_gradient(x[1:], real[1:], fake[1:]))


def test_no_gradient_flows_into_the_scores():
    x, real, fake = tensors(*draw(7))
    for t in (x, real, fake):
        t.requires_grad_(True)
    surrogate_loss(x, matching_gradient(x, real, fake)).sum().backward()
    assert real.grad is None
    assert fake.grad is None


# --- the authors' code ---


def test_equals_the_authors_numbers():
    i = GOLDEN["inputs"]
    x, sigma, noisy = (torch.tensor(i[k], dtype=torch.float64) for k in ("latents", "sigma", "noisy"))
    s = sigma.view(-1, 1, 1, 1)
    g = matching_gradient(x, noisy / (1 + s**2) + 0.2, 0.7 * noisy / (0.5 + s**2) - 0.1)
    assert torch.allclose(g, torch.tensor(GOLDEN["gradients"]["matching"], dtype=torch.float64), rtol=1e-10)
    x.requires_grad_(True)
    loss = surrogate_loss(x, g).mean()
    loss.backward()
    assert loss.item() == pytest.approx(GOLDEN["values"]["loss_dm"], rel=1e-10)
    assert torch.allclose(x.grad, torch.tensor(GOLDEN["gradients"]["latents"], dtype=torch.float64), rtol=1e-10)


def test_the_fake_scores_loss_equals_the_authors():
    i = GOLDEN["inputs"]
    x, sigma, noisy = (torch.tensor(i[k], dtype=torch.float64) for k in ("latents", "fake_sigma", "fake_noisy"))
    fake = 0.7 * noisy / (0.5 + sigma.view(-1, 1, 1, 1) ** 2) - 0.1
    assert float(denoising_loss(fake, x, sigma, sigma_data=0.5).mean()) == pytest.approx(GOLDEN["values"]["loss_fake"], rel=1e-10)


def test_noise_levels_are_the_authors_schedule():
    """Their timestep t of 1,000 counts from the smallest level."""
    position = 1 - torch.tensor(GOLDEN["inputs"]["timesteps"], dtype=torch.float64) / 999
    level = karras_level(position, sigma_min=0.002, sigma_max=80.0)
    assert torch.allclose(level, torch.tensor(GOLDEN["inputs"]["sigma"], dtype=torch.float64), rtol=1e-6)


def test_the_regression_target_is_the_gaussian_path():
    """6: on N(m, s^2) the teacher's ODE from sigma_max z ends at m + (z_T - m) s / sqrt(s^2 + T^2)."""
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    grid = karras_grid(512, sigma_min=0.002, sigma_max=80.0).tolist()

    def denoise(x, s):
        return M + S**2 / (S**2 + s[:, None] ** 2) * (x - M)

    ours = heun_solve(denoise, 80 * z, grid).numpy()
    assert np.allclose(ours, diffusion.gaussian_path(80 * z.numpy(), 80.0, 0.0, mean=M, variance=S**2), atol=2e-4)


# --- the method ---

SHORT = {"student_examples": 64000}


@pytest.mark.slow
def test_a_short_training_beats_scratch_and_the_teacher_in_one_step(tmp_path):
    store, scores = Store(tmp_path), {}
    for spec in plan("image-generation/gaussians", ["dmd"], range(1), split="tune", budget=SHORT, options={"samples": 500}):
        if spec.method != "teacher":
            record = execute(spec, store)
            assert record.status == "ok", record.reason
            scores.setdefault(spec.method, []).append(record.value("mmd2"))
            if spec.method == "dmd":
                assert record.value("coverage") == 1
                phases = record.cost["phases"]
                assert phases["initialise"]["student_examples"] + phases["match"]["student_examples"] == SHORT["student_examples"]
                assert phases["pairs"]["teacher_examples"] == 4096 * 35
    assert max(scores["dmd"]) < 0.2 * min(scores["scratch"] + scores["teacher_one_step"])


def test_killed_between_two_steps_it_resumes_to_the_same_weights(tmp_path):
    [spec] = plan(
        "image-generation/gaussians",
        ["dmd"],
        [0],
        split="tune",
        budget={"student_examples": 256 * 12},
        options={"samples": 200},
        controls=False,
    )
    whole = execute(spec, Store(tmp_path / "whole"))

    def kill(phase, done, total):
        if phase == "match" and done >= 1:
            raise KeyboardInterrupt

    store = Store(tmp_path / "killed")
    with pytest.raises(KeyboardInterrupt):
        execute(spec, store, progress=kill, checkpoint_seconds=0)
    resumed = execute(spec, store, checkpoint_seconds=0)
    assert resumed.student["sha256"] == whole.student["sha256"]
    assert resumed.cost["total"]["teacher_examples"] == whole.cost["total"]["teacher_examples"]


def test_without_the_regression_no_pairs_are_made(tmp_path):
    overrides = {"dmd": {"regression_weight": 0}}
    spec = plan(
        "image-generation/gaussians",
        ["dmd"],
        [0],
        overrides=overrides,
        split="tune",
        budget={"student_examples": 256 * 8},
        options={"samples": 200},
        controls=False,
    )[0]
    record = execute(spec, Store(tmp_path))
    assert record.status == "ok", record.reason
    assert "pairs" not in record.cost["phases"]
    assert "match/regression" not in record.trace
