"""The shared diffusion functions against closed forms (Karras et al. 2022, Song et al. 2023)."""

import copy
import dataclasses
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from distillbench.cards.card import Budget, Training
from distillbench.problems.image_generation.edm import (
    consistency_scalings,
    denoising_loss,
    edm_scalings,
    edm_weight,
    euler_step,
    heun_solve,
    heun_step,
    karras_grid,
    karras_level,
)
from distillbench.problems.image_generation.oracle import DenoiserOracle
from distillbench.problems.image_generation.start import frozen, initialise, ode_pairs, some_pairs, twin
from distillbench.runs.identities import seeds_by_role
from distillbench.runs.suite import TrainContext
from distillbench.suites import image_generation as suite
from distillbench.training.data import Request
from distillbench.training.noise import Key
from distillbench.training.run import Run
from tests.oracles.image_generation import diffusion as oracle

SIGMA = torch.logspace(-3, 2, 11, dtype=torch.float64)
GOLDEN = json.loads((Path(__file__).parents[3] / "goldens" / "consistency_distillation.json").read_text())


def gaussian(mean, variance):
    """The exact denoiser of N(mean, variance)."""
    return lambda x, s: mean + variance / (variance + s.view(-1, 1) ** 2) * (x - mean)


# --- parameterisation ---


def test_edm_1_the_loss_weight_undoes_c_out():
    _, c_out, _, _ = edm_scalings(SIGMA, sigma_data=0.5)
    assert torch.allclose(edm_weight(SIGMA, sigma_data=0.5) * c_out**2, torch.ones_like(SIGMA), rtol=1e-12)


def test_edm_2_a_network_that_answers_zero_has_loss_one_a_component():
    generator = torch.Generator().manual_seed(0)
    clean = 0.5 * torch.randn(20000, 4, generator=generator, dtype=torch.float64)
    sigma = torch.exp(torch.randn(20000, generator=generator, dtype=torch.float64))
    noisy = clean + sigma[:, None] * torch.randn(20000, 4, generator=generator, dtype=torch.float64)
    c_skip = edm_scalings(sigma, sigma_data=0.5)[0]
    assert float(denoising_loss(c_skip[:, None] * noisy, clean, sigma, sigma_data=0.5).mean()) == pytest.approx(1, rel=0.02)


def test_edm_6_at_no_noise_the_input_is_the_answer():
    c_skip, c_out, _, _ = edm_scalings(torch.zeros(1, dtype=torch.float64), sigma_data=0.5)
    assert (float(c_skip), float(c_out)) == (1, 0)


def test_edm_7_input_and_target_have_unit_variance():
    d, c_skip, c_out, c_in = 0.7, *edm_scalings(SIGMA, sigma_data=0.7)[:3]
    ones = torch.ones_like(SIGMA)
    assert torch.allclose(c_in**2 * (d**2 + SIGMA**2), ones, rtol=1e-12)
    # (y - c_skip (y + n)) / c_out with y of variance d^2 and n of variance s^2
    assert torch.allclose(((1 - c_skip) ** 2 * d**2 + c_skip**2 * SIGMA**2) / c_out**2, ones, rtol=1e-9)


def test_consistency_5_the_boundary_is_exact():
    e = torch.tensor([0.002], dtype=torch.float64)
    c_skip, c_out, _, _ = consistency_scalings(e, sigma_data=0.5, sigma_min=0.002)
    assert (float(c_skip), float(c_out)) == (1, 0)


def test_scalings_are_those_of_the_authors_code():
    sigma = torch.tensor(GOLDEN["inputs"]["sigma"], dtype=torch.float64)
    edm = torch.stack(edm_scalings(sigma, sigma_data=0.5)[:3])
    boundary = torch.stack(consistency_scalings(sigma, sigma_data=0.5, sigma_min=0.002)[:3])
    assert torch.allclose(edm, torch.tensor(GOLDEN["values"]["edm"], dtype=torch.float64), rtol=1e-12)
    assert torch.allclose(boundary, torch.tensor(GOLDEN["values"]["boundary"], dtype=torch.float64), rtol=1e-12)


# --- noise levels ---


def test_edm_5_the_grid_is_that_of_the_authors_code_with_exact_ends():
    grid = karras_grid(18, sigma_min=0.002, sigma_max=80.0)
    assert torch.allclose(grid, torch.tensor(GOLDEN["values"]["grid"][:-1], dtype=torch.float64), rtol=1e-12)
    assert (float(grid[0]), float(grid[-1])) == (80.0, 0.002)
    assert bool((grid[1:] < grid[:-1]).all())
    with pytest.raises(ValueError, match="two levels"):
        karras_grid(1, sigma_min=0.002, sigma_max=80.0)


def test_levels_keep_their_type_and_shape():
    level = karras_level(torch.rand(3, 2), sigma_min=0.01, sigma_max=10.0)
    assert level.dtype == torch.float32
    assert level.shape == (3, 2)


# --- the ODE ---


@pytest.mark.parametrize(("step", "factor"), [(euler_step, 2.0), (heun_step, 4.0)])
def test_edm_4_the_order_of_a_solver(step, factor):
    """Halving the step divides the error by 2 (Euler) and 4 (Heun) on N(m, v), whose path is known."""
    x = torch.tensor([[3.0], [-1.0]], dtype=torch.float64)
    exact = oracle.gaussian_path(x.numpy(), 2.0, 0.1, mean=0.4, variance=0.3)
    errors = []
    for count in (40, 80):
        now = x
        grid = torch.linspace(2.0, 0.1, count + 1, dtype=torch.float64)
        for sigma, after in pairwise(grid):
            now = step(gaussian(0.4, 0.3), now, sigma.expand(2), after.expand(2))
        errors.append(np.abs(now.numpy() - exact).max())
    assert errors[0] / errors[1] == pytest.approx(factor, rel=0.15)


def test_heun_solve_ends_with_euler_and_asks_2n_minus_1_times():
    asked = []

    def denoise(x, s):
        asked.append(float(s[0]))
        return gaussian(0.0, 0.3)(x, s)

    grid = karras_grid(6, sigma_min=0.05, sigma_max=10.0).tolist()
    x = torch.tensor([[5.0]], dtype=torch.float64)
    factor = np.prod([oracle.heun_multiplier(a, b, variance=0.3) for a, b in pairwise(grid)])
    last = 0.3 / (0.3 + grid[-1] ** 2)  # an Euler step to 0 is the denoiser's answer
    assert float(heun_solve(denoise, x, grid)) == pytest.approx(5 * factor * last, rel=1e-12)
    assert len(asked) == 2 * 6 - 1


# --- initialisation ---


def problem_and_run(name="gaussians"):
    setting = suite.CARD.settings[name]
    problem = suite.SUITE.problem(TrainContext(name, setting, seeds_by_role(0)))
    training = Training(batch_size=256, optimizer="adamw", learning_rate=3e-3)
    run = Run(seeds=seeds_by_role(0), budget=Budget(student_examples=256 * 600), training=training, oracles=[problem.teacher])
    return problem, run


def test_a_teacher_of_the_students_architecture_is_copied_at_no_cost():
    problem, run = problem_and_run()
    other = copy.deepcopy(problem.student)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.1)
    problem = dataclasses.replace(problem, teacher=DenoiserOracle(other))
    initialise(problem, run, share=0.5)
    assert all(torch.equal(a, b) for a, b in zip(problem.student.parameters(), other.parameters(), strict=True))
    assert run.cost()["total"]["student_examples"] == 0


def test_another_teacher_is_imitated_for_its_share_of_the_budget():
    problem, run = problem_and_run()
    noisy = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
    level = torch.full((500,), 0.6)

    def error():
        with torch.no_grad():
            return float((problem.student(noisy, level) - problem.teacher.denoise(noisy, level)).square().mean())

    before = error()
    initialise(problem, run, share=0.5)
    bill = run.cost()["phases"]["initialise"]
    assert bill["student_examples"] == 256 * 300
    assert bill["teacher_examples"] == 256 * 300
    assert error() < before / 2


def test_a_twin_shares_weights_at_birth_and_never_after():
    problem, _ = problem_and_run()
    other = twin(problem, problem.student, boundary=True)
    first, second = next(other.parameters()), next(problem.student.parameters())
    assert torch.equal(first, second)
    with torch.no_grad():
        first.add_(1)
    assert not torch.equal(first, second)
    assert other.boundary
    assert not problem.student.boundary


# --- pairs ---


def test_pairs_are_the_ends_of_the_teachers_path_with_the_streams_labels():
    problem, run = problem_and_run("gaussians-guided")
    noise, samples, labels = ode_pairs(problem, run, 300)
    stream = problem.batches.stream(0)
    assert torch.equal(labels, torch.cat([next(stream).labels for _ in range(2)])[:300])
    grid = karras_grid(18, sigma_min=0.01, sigma_max=10.0).tolist()
    teacher = suite.SUITE.problem(TrainContext("gaussians-guided", suite.CARD.settings["gaussians-guided"], seeds_by_role(0))).teacher
    one = heun_solve(lambda x, s: teacher.denoise(x, s, labels[7:8]), 10 * noise[7:8], grid)
    assert torch.allclose(samples[7:8], one, atol=1e-5)
    assert run.cost()["phases"]["pairs"]["teacher_examples"] == 300 * 35 * 2
    assert abs(float(noise.std()) - 1) < 0.1


def test_pairs_do_not_depend_on_how_many_are_solved_at_once(monkeypatch):
    made = []
    for size in (1024, 100):
        monkeypatch.setattr("distillbench.problems.image_generation.start.PAIRS", size)
        problem, run = problem_and_run()
        made.append(ode_pairs(problem, run, 250))
    assert torch.equal(made[0][0], made[1][0])
    assert torch.allclose(made[0][1], made[1][1], atol=1e-5)


def test_pairs_of_another_network_draw_anew_and_take_their_own_levels():
    problem, run = problem_and_run()
    first = ode_pairs(problem, run, 64)
    second = ode_pairs(problem, run, 64, teacher=frozen(problem, problem.student), levels=4, role="second pairs")
    assert not torch.equal(first[0], second[0])
    grid = karras_grid(4, sigma_min=0.01, sigma_max=10.0).tolist()
    with torch.no_grad():
        assert torch.allclose(second[1], heun_solve(problem.student, 10 * second[0], grid), atol=1e-5)
    assert run.cost()["phases"]["second pairs"]["teacher_examples"] == 64 * 7


def test_drawn_pairs_stay_together():
    pairs = tuple(torch.arange(50) for _ in range(3))
    noise, samples, labels = some_pairs(pairs, Request(torch.arange(400), 0, key=Key(1, 0, 0, 0)))
    assert torch.equal(noise, samples)
    assert torch.equal(noise, labels)
    assert len(noise) == 400
    assert noise.unique().tolist() == list(range(50))
