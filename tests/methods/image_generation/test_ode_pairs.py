"""Noise-image pairs: the numbered identities of the method and an independent oracle."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from distillbench.cards.card import Budget
from distillbench.cards.reading import resolve
from distillbench.methods.image_generation.ode_pairs import CARD, distill, pair_loss
from distillbench.methods.image_generation.rectified_flow import flow_loss
from distillbench.problems.image_generation.edm import heun_solve, karras_grid
from distillbench.runs.identities import seeds_by_role
from distillbench.runs.suite import TrainContext
from distillbench.suites import image_generation as suite
from distillbench.training.run import Run
from tests.oracles.image_generation import diffusion
from tests.oracles.image_generation import ode_pairs as oracle

MEAN, VARIANCE, T = 0.3, 0.25, 10.0


def denoise(x, s):
    """The exact denoiser of N(MEAN, VARIANCE)."""
    return MEAN + VARIANCE / (VARIANCE + s.view(-1, 1) ** 2) * (x - MEAN)


def test_matches_the_independent_oracle_in_value_and_gradient():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((5, 2, 3)), rng.standard_normal((5, 2, 3))
    output, target = torch.tensor(a, requires_grad=True), torch.tensor(b, requires_grad=True)
    loss = pair_loss(output, target)
    assert np.allclose(loss.detach().numpy(), oracle.pair_loss(a, b), rtol=1e-10)
    loss.sum().backward()
    numeric, step = np.zeros_like(a), 1e-6
    for index in np.ndindex(a.shape):
        up, down = a.copy(), a.copy()
        up[index] += step
        down[index] -= step
        numeric[index] = (oracle.pair_loss(up, b).sum() - oracle.pair_loss(down, b).sum()) / (2 * step)
    assert np.allclose(output.grad.numpy(), numeric, rtol=1e-6, atol=1e-9)
    assert target.grad is None


# --- the identities ---


def test_1_and_3_the_target_is_the_solvers_linear_map_whose_distribution_is_nearly_the_datas():
    z = torch.linspace(-2.5, 2.5, 11, dtype=torch.float64)[:, None]
    grid = karras_grid(9, sigma_min=0.02, sigma_max=T).tolist()
    target = heun_solve(denoise, T * z, grid)
    factors = [diffusion.heun_multiplier(a, b, variance=VARIANCE) for a, b in pairwise(grid)]
    slope = np.prod(factors) * VARIANCE / (VARIANCE + grid[-1] ** 2)
    perfect = MEAN + slope * (T * z - MEAN)
    assert float(pair_loss(perfect, target).max()) < 1e-24
    # Many levels: variance v T^2 / (v + T^2), mean m (1 - sqrt(v / (v + T^2))).
    fine = karras_grid(2000, sigma_min=1e-3, sigma_max=T).tolist()
    low, high = heun_solve(denoise, T * torch.tensor([[-1.0], [1.0]], dtype=torch.float64), fine).ravel().tolist()
    assert ((high - low) / 2) ** 2 == pytest.approx(VARIANCE * T**2 / (VARIANCE + T**2), rel=1e-4)
    assert (high + low) / 2 == pytest.approx(MEAN * (1 - np.sqrt(VARIANCE / (VARIANCE + T**2))), rel=1e-4)


def test_4_targets_that_do_not_belong_to_the_noise_are_answered_by_their_mean():
    """The best constant is the mean of the targets, and for shuffled pairs no linear answer is better."""
    rng = np.random.default_rng(1)
    z, y = rng.standard_normal(4000), rng.standard_normal(4000)
    slope = np.polyfit(z, y, 1)[0]
    assert abs(slope) < 0.05

    def excess(b):
        answer, target = torch.tensor(np.full((4000, 1), b)), torch.tensor(y[:, None])
        return float(pair_loss(answer, target).mean())

    assert excess(y.mean()) < min(excess(y.mean() + 0.01), excess(y.mean() - 0.01))


def test_5_the_risk_bounds_the_distance_of_the_distributions():
    """2 E[loss] = E|f - y|^2 is at least W2^2, in one dimension the mean square between sorted samples."""
    rng = np.random.default_rng(2)
    f, y = rng.standard_normal((500, 1)), 1.5 * rng.standard_normal((500, 1)) + 0.2
    w2 = np.mean((np.sort(f[:, 0]) - np.sort(y[:, 0])) ** 2)
    assert 2 * float(pair_loss(torch.tensor(f), torch.tensor(y)).mean()) >= w2
    order_f, order_y = np.argsort(f[:, 0]), np.argsort(y[:, 0])
    coupled = pair_loss(torch.tensor(f[order_f]), torch.tensor(y[order_y]))
    assert 2 * float(coupled.mean()) == pytest.approx(w2, rel=1e-12)


def test_7_it_is_the_flows_loss_where_all_is_noise():
    f, y = torch.randn(2, 6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(2 * pair_loss(f, y), flow_loss(f, y, torch.ones(6, dtype=torch.float64)), rtol=1e-12)


# --- the method ---


def trained(batches, **values):
    """A short training without the judge."""
    setting = suite.CARD.settings["gaussians"]
    problem = suite.SUITE.problem(TrainContext("gaussians", setting, seeds_by_role(0)))
    budget = Budget(student_examples=256 * batches)
    run = Run(seeds=seeds_by_role(0), budget=budget, training=setting.training, oracles=[problem.teacher])
    return distill(problem, run, **resolve(CARD, values)), run


def test_a_pair_costs_35_evaluations_and_the_regression_none():
    phases = trained(10, pairs=300)[1].cost()["phases"]
    assert phases["pairs"]["teacher_examples"] == 300 * 35
    assert phases["regress"]["teacher_examples"] == 0
    assert phases["initialise"]["student_examples"] + phases["regress"]["student_examples"] == 256 * 10


def test_it_leaves_with_one_step_from_where_it_was_trained():
    assert trained(4, pairs=300)[0].recipe == {"rule": "denoise", "sigmas": [10.0]}  # the track's largest
    assert trained(4, pairs=300, start_sigma=2.5)[0].recipe == {"rule": "denoise", "sigmas": [2.5]}
