"""Rectified flow: the numbered identities of the method, an independent oracle, and the authors' own numbers."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from distillbench.cards.card import Budget
from distillbench.cards.reading import resolve
from distillbench.methods.image_generation.rectified_flow import CARD, distill, flow_levels, flow_loss, follow, noise_level, straight_line
from distillbench.problems.image_generation.edm import euler_solve, euler_step, heun_solve, karras_grid, per_row
from distillbench.problems.image_generation.start import initialise, ode_pairs
from distillbench.runs.identities import seeds_by_role
from distillbench.runs.suite import TrainContext
from distillbench.suites import image_generation as suite
from distillbench.training.run import Run
from tests.oracles.image_generation import rectified_flow as oracle

GOLDEN = json.loads((Path(__file__).parents[2] / "goldens" / "rectified_flow.json").read_text())
MEAN, STD = 0.3, 0.6


def gaussian(x, s):
    """The exact denoiser of N(MEAN, STD^2): the first rectified flow of an independent coupling with noise."""
    return MEAN + STD**2 / (STD**2 + s.view(-1, 1) ** 2) * (x - MEAN)


def reflowed(x, s):
    """The denoiser of the coupling (z, MEAN + STD z): on its line x = x_0 + s z there is one x_0 for every x."""
    return MEAN + STD * (x - MEAN) / (STD + s.view(-1, 1))


def draw(seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((6, 3)), rng.standard_normal((6, 3)), rng.uniform(0.05, 0.95, 6)


def straightness(denoise, noise, sigma_max, steps=100):
    """E int |(z - x_0) - v(x_t, t)|^2 dt along the flow's own paths, by Euler steps: 0 where all paths are straight."""
    levels = [*flow_levels(steps, sigma_max).tolist(), 0.0]
    state, velocities = sigma_max * noise, []
    for sigma, after in pairwise(levels):
        s, to = (noise.new_full((len(noise),), v) for v in (sigma, after))
        answer, time = denoise(state, s), sigma / (1 + sigma)
        velocities.append(((1 - time) * state - answer) / time)
        state = euler_step(lambda *_, answer=answer: answer, state, s, to)
    chord = torch.stack(velocities).mean(0)  # steps of equal length
    return float((torch.stack(velocities) - chord).square().sum(2).mean())


# --- the oracle: the paper's own form, noise at time 0 ---


def test_the_loss_is_the_papers_velocity_loss_in_value_and_gradient():
    noise, data, time = draw()  # time of the data's share

    def theirs(shift):
        return oracle.velocity_loss(lambda x, t: np.tanh(x) * t + shift, noise, data, time)

    z, x, t = (torch.tensor(v) for v in (noise, data, 1 - time))
    shift = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    point = (1 - t[:, None]) * x + t[:, None] * z
    velocity = torch.tanh(point) * (1 - t[:, None]) + shift
    loss = flow_loss(point + t[:, None] * velocity, x, t)  # D = x_t + t v, their v being ours with the other sign
    assert np.allclose(loss.detach().numpy(), theirs(0.3), rtol=1e-10)
    loss.sum().backward()
    assert float(shift.grad) == pytest.approx((theirs(0.3 + 1e-6).sum() - theirs(0.3 - 1e-6).sum()) / 2e-6, rel=1e-7)


def test_9_an_euler_step_of_the_flow_is_the_variance_exploding_one():
    """x_t = (1 - t) x_0 + t z is (1 - t) times x_0 + s z, s = t / (1 - t): one step in either form is the same step."""
    z, x, _ = (torch.tensor(v) for v in draw(1))
    t, after = torch.linspace(0.2, 0.95, 6, dtype=torch.float64), torch.linspace(0, 0.7, 6, dtype=torch.float64)
    flow = (1 - t[:, None]) * x + t[:, None] * z
    velocity = torch.sin(flow) + 0.2
    stepped = flow + (after - t)[:, None] * velocity
    denoised = flow - t[:, None] * velocity
    noisy = flow / (1 - t[:, None])
    ours = euler_step(lambda *_: denoised, noisy, t / (1 - t), after / (1 - after))
    assert torch.allclose((1 - after[:, None]) * ours, stepped, rtol=1e-11)


# --- the identities ---


def test_1_the_teachers_denoiser_is_the_first_flow():
    x, t = np.linspace(-2, 2, 9)[:, None], 0.35  # their time: 1 at the data
    denoised = gaussian(torch.tensor(x / t), torch.full((9,), (1 - t) / t, dtype=torch.float64)).numpy()
    velocity = (denoised - x) / (1 - t)
    assert np.allclose(velocity, oracle.gaussian_velocity(x, t, mean=MEAN, std=STD), rtol=1e-10)


def test_2_its_map_is_the_optimal_transport():
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    top = 2000.0
    grid = karras_grid(600, sigma_min=1e-3, sigma_max=top).tolist()
    assert torch.allclose(heun_solve(gaussian, top * z, grid), MEAN + STD * z, atol=2e-3)


def test_3_after_reflow_the_loss_is_zero_and_one_step_is_exact():
    z = torch.randn(7, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    clean = MEAN + STD * z
    t = torch.linspace(0.05, 0.99, 7, dtype=torch.float64)
    sigma = t / (1 - t)
    assert float(flow_loss(reflowed(clean + sigma[:, None] * z, sigma), clean, t).max()) < 1e-24
    top = 50.0
    one, many = (euler_solve(reflowed, top * z, flow_levels(k, top).tolist()) for k in (1, 20))
    assert torch.allclose(one, many, rtol=1e-10)


def test_5_the_first_flow_is_bent_and_the_reflowed_one_straight():
    z = torch.randn(500, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert straightness(reflowed, z, 50.0) < 1e-20
    assert straightness(gaussian, z, 50.0) > 0.05


def test_6_the_transport_cost_does_not_rise():
    """E|x_0 - z| of the independent coupling against that of the flow's own pairs: strictly less where paths crossed."""
    rng = np.random.default_rng(3)
    z, x = rng.standard_normal(20000), MEAN + STD * rng.standard_normal(20000)
    for cost in (np.abs, np.square):
        assert cost(MEAN + STD * z - z).mean() < cost(x - z).mean()


def test_the_line_starts_at_the_sample_and_ends_where_the_sampler_begins():
    z, x, _ = (torch.tensor(v) for v in draw(4))
    top = torch.full((6,), 10.0, dtype=torch.float64)
    assert torch.allclose(straight_line(z, x, top, 10.0), 10 * z, rtol=1e-12)
    assert torch.equal(straight_line(z, x, 0 * top, 10.0), x)
    # It is the ODE's own path where the answer is always x_0: no step can leave it.
    stepped = euler_step(lambda *_: x, 10 * z, top, top / 4)
    assert torch.allclose(stepped, straight_line(z, x, top / 4, 10.0), rtol=1e-12)


@pytest.mark.parametrize("top", [80.0, 10.0, 0.7])
def test_levels_are_steps_of_equal_time_from_sigma_max_exactly(top):
    levels = flow_levels(5, top)
    assert float(levels[0]) == top
    time = levels / (1 + levels)
    assert torch.allclose(time, (1 - torch.arange(5, dtype=torch.float64) / 5) * top / (1 + top), rtol=1e-12)
    assert torch.allclose(noise_level(torch.tensor([1.0]), top), torch.tensor([top]), rtol=0)


# --- the authors' code ---


@pytest.mark.parametrize("schedule", ["uniform", "t0", "2"])
def test_equals_the_authors_numbers(schedule):
    i = GOLDEN["inputs"]
    noise, data = (torch.tensor(i[k], dtype=torch.float64) for k in ("noise", "data"))
    theirs = torch.tensor(i["time"][schedule], dtype=torch.float64)
    time = 1 - theirs
    point = per_row(theirs, data) * data + per_row(time, data) * noise
    w = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    velocity = w * point.tanh() + 0.0003 * per_row(999 * theirs, data)
    loss = flow_loss(point + per_row(time, data) * velocity, data, time).mean()
    assert loss.item() == pytest.approx(GOLDEN["values"][schedule], rel=1e-10)
    loss.backward()
    assert float(w.grad) == pytest.approx(GOLDEN["gradients"][schedule], rel=1e-10)


# --- the method ---


def problem_and_run(name, batches):
    setting = suite.CARD.settings[name]
    problem = suite.SUITE.problem(TrainContext(name, setting, seeds_by_role(0)))
    budget = Budget(student_examples=batches * setting.training.batch_size)
    return problem, Run(seeds=seeds_by_role(0), budget=budget, training=setting.training, oracles=[problem.teacher])


def test_the_second_pairs_are_the_students_own_and_cost_less():
    problem, run = problem_and_run("gaussians-guided", 10)
    student = distill(problem, run, **resolve(CARD, {"pairs": 300, "solver_levels": 4, "distil_on": "reflow"}))
    phases = run.cost()["phases"]
    assert phases["pairs"]["teacher_examples"] == 300 * 35 * 2  # guided
    assert phases["reflowed pairs"]["teacher_examples"] == 300 * 7  # the student holds the guidance already
    assert phases["reflow"]["student_examples"] == 256 * 4
    assert student.recipe == {"rule": "euler", "sigmas": [10.0]}


def test_with_two_evaluations_the_steps_are_of_equal_time():
    problem, run = problem_and_run("digits-few", 4)
    student = distill(problem, run, **resolve(CARD, {"pairs": 100}))
    assert student.recipe == {"rule": "euler", "sigmas": flow_levels(2, 80.0).tolist()}
    assert "reflowed pairs" not in run.cost()["phases"]


def test_reflow_straightens_the_paths_of_the_mixture():
    problem, run = problem_and_run("gaussians", 700)
    noise = torch.randn(500, 2, generator=torch.Generator().manual_seed(5))
    initialise(problem, run, share=0.1)
    made = ode_pairs(problem, run, 4000)
    student = problem.student
    follow(problem, run, made, lambda b: 0.02 + 0.98 * b.uniform((len(b),), "times"), share=1.0, rate=1.0, average=0.99, recipe={})
    with torch.no_grad():
        before, after = (straightness(d, noise, problem.sigma_max) for d in (problem.teacher.denoise, student))
    assert after < 0.3 * before
