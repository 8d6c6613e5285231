"""Improved consistency training: the numbered identities of its sheet, an independent oracle, and what a short run shows."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

from distillbench.methods.image_generation.ict import ict_loss, intervals, level_probabilities
from distillbench.problems.image_generation.edm import karras_grid
from distillbench.runs.plan import plan
from distillbench.runs.runner import execute
from distillbench.runs.store import Store
from tests.oracles import differences
from tests.oracles.image_generation import ict as oracle

EPS, T = 0.002, 80.0


# --- the oracle ---


@pytest.mark.parametrize("huber", [0.00054, 0.5])
def test_matches_the_independent_oracle_in_value_and_gradient(huber):
    rng = np.random.default_rng(0)
    a, b, gap = rng.standard_normal((5, 2, 3)), rng.standard_normal((5, 2, 3)), rng.uniform(0.1, 2, 5)
    output, target = torch.tensor(a, requires_grad=True), torch.tensor(b, requires_grad=True)
    loss = ict_loss(output, target, torch.tensor(gap), huber=huber)
    assert np.allclose(loss.detach().numpy(), oracle.ict_loss(a, b, gap, huber=huber), rtol=1e-10)
    loss.sum().backward()
    numeric = differences.gradient(lambda x: oracle.ict_loss(x, b, gap, huber=huber), a)
    assert np.allclose(output.grad.numpy(), numeric, rtol=1e-6, atol=1e-9)
    assert target.grad is None


@pytest.mark.parametrize("count", [11, 1281])
def test_level_probabilities_match_the_oracle(count):
    grid = karras_grid(count, sigma_min=EPS, sigma_max=T)
    ours = level_probabilities(grid, mean=-1.1, std=2.0).numpy()
    truth = oracle.level_probabilities(grid.numpy(), mean=-1.1, std=2.0)
    assert np.allclose(ours, truth, rtol=1e-9, atol=1e-15)
    assert ours.min() > 0
    assert ours.sum() == pytest.approx(1, rel=1e-12)


# --- the identities ---


def point_mass(theta, target_theta, xi=0.7, levels=200):
    """Per-level squared-metric gradient in theta on the sheet's toy: data xi, f(x, s) = (e/s) x + (1 - e/s) theta."""
    grid = karras_grid(levels, sigma_min=EPS, sigma_max=T).flip(0)
    z = torch.randn(levels - 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    low, high = grid[:-1], grid[1:]
    parameter = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
    online = EPS / high * (xi + high * z) + (1 - EPS / high) * parameter
    target = EPS / low * (xi + low * z) + (1 - EPS / low) * target_theta
    return online, target, parameter, low, high


def test_1_on_a_point_mass_the_pair_differs_by_a_closed_form_and_points_to_the_data():
    online, target, parameter, low, high = point_mass(1.5, 1.5)
    assert torch.allclose(online - target, EPS * (1 / low - 1 / high) * (1.5 - 0.7), rtol=1e-6, atol=1e-14)
    other, behind, _, _, _ = point_mass(1.5, 1.2)  # an average that lags adds a term that hides the data
    wanted = EPS * (1 / low - 1 / high) * (1.5 - 0.7) + (1 - EPS / low) * (1.5 - 1.2)
    assert torch.allclose(other - behind, wanted, rtol=1e-6, atol=1e-14)
    loss = ict_loss(online[1:, None], target[1:, None], (high - low)[1:], huber=1.0)
    loss.sum().backward()
    assert float(parameter.grad) > 0  # descent moves theta from 1.5 towards 0.7


def test_2_the_metric_is_half_a_square_over_c_near_zero_and_a_length_far_out():
    one, near, far = torch.ones(1, dtype=torch.float64), torch.tensor([[1e-8, 0.0]]).double(), torch.tensor([[300.0, 400.0]]).double()
    c = 0.5 * math.sqrt(2)
    zero = torch.zeros_like(near)
    assert float(ict_loss(near, zero, one, huber=0.5)) == pytest.approx(1e-16 / (2 * c), rel=1e-9)
    assert float(ict_loss(far, zero, one, huber=0.5)) == pytest.approx(500 - c, rel=1e-5)
    assert float(ict_loss(far, far, one, huber=0.5)) == 0
    x = far.clone().requires_grad_()
    ict_loss(x, zero, one, huber=0.5).backward()
    assert 0.99 < float(x.grad.norm()) < 1


def test_trap_the_distance_is_of_the_whole_row_and_not_of_each_pixel():
    x, zero = torch.tensor([[[3.0, 4.0]]]).double(), torch.zeros(1, 1, 2).double()
    assert float(ict_loss(x, zero, torch.ones(1).double(), huber=1e-9)) == pytest.approx(5, rel=1e-6)


def test_trap_the_weight_is_one_over_the_gap():
    x, zero = torch.ones(2, 3).double(), torch.zeros(2, 3).double()
    loss = ict_loss(x, zero, torch.tensor([0.5, 2.0]).double(), huber=0.1)
    assert float(loss[0] / loss[1]) == pytest.approx(4, rel=1e-12)


def test_3_many_levels_have_the_truncated_lognormal_distribution():
    grid = karras_grid(4001, sigma_min=EPS, sigma_max=T)
    p, middle = level_probabilities(grid, mean=-1.1, std=2.0), ((grid[1:].log() + grid[:-1].log()) / 2)
    draws = np.random.default_rng(0).normal(-1.1, 2.0, 2_000_000)
    kept = draws[(draws > math.log(EPS)) & (draws < math.log(T))]
    assert float((p * middle).sum()) == pytest.approx(kept.mean(), abs=0.01)
    assert float((p * middle**2).sum()) == pytest.approx((kept**2).mean(), rel=0.01)


def test_4_eight_equal_stages_from_ten_to_1280_intervals():
    seen = Counter(intervals(k, 400_000, s0=10, s1=1280) for k in range(0, 400_000, 500))
    assert seen == {10 * 2**i: 100 for i in range(8)}
    assert intervals(0, 400_000, s0=10, s1=1280) == 10
    assert intervals(399_999, 400_000, s0=10, s1=1280) == 1280
    assert {intervals(k, 3, s0=10, s1=1280) for k in range(3)} == {10, 20, 40}  # fewer steps than stages
    assert {intervals(k, 100, s0=40, s1=40) for k in range(100)} == {40}
    assert {intervals(k, 100, s0=80, s1=40) for k in range(100)} == {40}


def test_4_where_the_ratio_is_no_power_of_2_the_last_stage_is_short_and_holds_s1():
    seen = Counter(intervals(k, 1000, s0=10, s1=100) for k in range(1000))
    assert seen == {10: 231, 20: 231, 40: 231, 80: 231, 100: 76}  # K' = floor(1000 / (log2(10) + 1)) = 231


@pytest.mark.parametrize("steps", [1, 3, 7, 100, 391, 1000])
@pytest.mark.parametrize(("s0", "s1"), [(10, 1280), (10, 100), (10, 109), (2, 150), (3, 7), (1, 1), (7, 13), (40, 40), (20, 161)])
def test_4_the_schedule_equals_the_oracle_at_every_step(s0, s1, steps):
    ours = [intervals(k, steps, s0=s0, s1=s1) for k in range(steps)]
    assert ours == oracle.intervals(steps, s0=s0, s1=s1)
    assert ours == sorted(ours) and ours[0] == s0 and ours[-1] <= s1


def test_5_the_weighted_loss_stays_of_one_size_as_levels_grow():
    found = []
    for levels in (1001, 2001):
        online, target, _, low, high = point_mass(1.5, 1.5, levels=levels)
        position = int((high - 0.5).abs().argmin())
        row = slice(position, position + 1)
        found.append(float(ict_loss(online[row, None].detach(), target[row, None], (high - low)[row], huber=1e-12)))
    assert found[0] == pytest.approx(found[1], rel=0.05)
    assert found[0] == pytest.approx(EPS / 0.25 * 0.8, rel=0.05)  # |d f / d s| = (e / s^2) |theta - xi|


# --- the method ---


def run(tmp_path, examples, track="image-generation/gaussians", **values):
    [spec] = plan(track, ["ict"], [0], overrides={"ict": values}, split="tune", budget={"student_examples": examples}, controls=False,
                  options={"samples": 500})  # fmt: skip
    record = execute(spec, Store(tmp_path))
    assert record.status == "ok", record.reason
    return record


def test_it_asks_the_teacher_nothing_and_leaves_with_its_boundary(tmp_path):
    record = run(tmp_path, 256 * 8)
    assert record.cost["total"]["teacher_examples"] == 0
    assert record.student["arguments"]["boundary"] is True
    assert record.student["averaged"] is True
    assert record.value("nfe") == 1


def test_tuning_starts_from_the_teacher(tmp_path):
    record = run(tmp_path, 256 * 8, initial="teacher")
    assert record.cost["phases"]["initialise"]["teacher_examples"] == 256 * 2


@pytest.mark.slow
def test_a_short_run_beats_the_teacher_in_one_step(tmp_path):
    assert run(tmp_path, 256 * 400).value("mmd2") < 0.3 * 0.63  # the teacher in one step, on any seed
