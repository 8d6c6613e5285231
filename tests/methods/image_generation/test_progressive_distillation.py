"""Progressive distillation: the numbered identities of the method, an independent oracle, and the numbers of a public implementation."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from distillbench.cards.card import Budget
from distillbench.cards.reading import resolve
from distillbench.methods.image_generation.progressive_distillation import CARD, distill, levels, progressive_loss, two_step_target
from distillbench.problems.image_generation.edm import edm_scalings, euler_solve, euler_step, karras_grid
from distillbench.runs.identities import seeds_by_role
from distillbench.runs.suite import TrainContext
from distillbench.suites import image_generation as suite
from distillbench.training.run import Run
from tests.oracles.image_generation import diffusion
from tests.oracles.image_generation import progressive_distillation as oracle

GOLDEN = json.loads((Path(__file__).parents[2] / "goldens" / "progressive_distillation.json").read_text())
WEIGHTS = ["truncated", "snr+1", "snr", "constant"]
MEAN, VARIANCE = 0.3, 0.25


def curved(x, s):
    """A teacher that is no Gaussian's: nothing below may depend on a linear one."""
    return torch.tanh(x / (1 + s.view(-1, 1))) + 0.1 * torch.sin(3 * x)


def gaussian(x, s):
    """The exact denoiser of N(MEAN, VARIANCE)."""
    return MEAN + VARIANCE / (VARIANCE + s.view(-1, 1) ** 2) * (x - MEAN)


def draw(seed=0, rows=6):
    rng = np.random.default_rng(seed)
    after, middle, sigma = np.sort(rng.uniform(0.1, 6, (3, rows)), axis=0)
    after[0] = 0
    return (torch.tensor(v) for v in (rng.standard_normal((rows, 4)) * (1 + sigma[:, None]), sigma, middle, after))


# --- the oracle: the paper's own, variance-preserving form ---


def test_the_target_is_algorithm_2_in_the_papers_parameterisation():
    x, sigma, middle, after = draw()
    ours = two_step_target(curved, x, sigma, middle, after).numpy()
    for row in range(len(x)):

        def predict(z, s):
            alpha, _ = oracle.cosine_and_sine(s)
            return curved(torch.tensor(z / alpha)[None], torch.tensor([s], dtype=torch.float64))[0].numpy()

        alpha, _ = oracle.cosine_and_sine(float(sigma[row]))
        there = oracle.target(predict, alpha * x[row].numpy(), float(sigma[row]), float(middle[row]), float(after[row]))
        assert np.allclose(ours[row], there, rtol=1e-10)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_the_loss_is_the_papers_in_value_and_gradient(weight):
    noisy, sigma, _, _ = draw(1)
    sigma[1] = 0.4  # both sides of SNR 1
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal((6, 4)), rng.standard_normal((6, 4))

    def theirs(values):
        alpha = [oracle.cosine_and_sine(float(s))[0] for s in sigma]
        rows = zip(values, b, noisy.numpy(), alpha, sigma.tolist(), strict=True)
        return np.array([oracle.loss(x, y, k * z, s, weight=weight) for x, y, z, k, s in rows])

    output = torch.tensor(a, requires_grad=True)
    loss = progressive_loss(output, torch.tensor(b), sigma, weight=weight)
    assert np.allclose(loss.detach().numpy(), theirs(a), rtol=1e-10)
    loss.sum().backward()
    numeric, step = np.zeros_like(a), 1e-6
    for index in np.ndindex(a.shape):
        up, down = a.copy(), a.copy()
        up[index] += step
        down[index] -= step
        numeric[index] = (theirs(up).sum() - theirs(down).sum()) / (2 * step)
    assert np.allclose(output.grad.numpy(), numeric, rtol=1e-6, atol=1e-8)


# --- the identities ---


def test_1_and_5_one_step_with_the_target_ends_where_two_of_the_teacher_do():
    x, sigma, middle, after = draw(3)
    two = euler_step(curved, euler_step(curved, x, sigma, middle), middle, after)
    target = two_step_target(curved, x, sigma, middle, after)
    assert torch.allclose(euler_step(lambda *_: target, x, sigma, after), two, rtol=1e-11, atol=1e-12)


def test_2_an_answer_that_stays_is_its_own_target():
    x, sigma, middle, after = draw(4)
    point = torch.full_like(x, 0.7)
    assert torch.allclose(two_step_target(lambda *_: point, x, sigma, middle, after), point, rtol=1e-11)


@pytest.mark.parametrize("steps", [1, 2])
def test_3_and_8_a_perfect_student_of_every_round_samples_as_the_first_teacher_did(steps):
    grids = {n: [*karras_grid(n + 1, sigma_min=0.05, sigma_max=8.0).tolist()[:-1], 0.0] for n in (steps, 2 * steps, 4 * steps)}

    def perfect(teacher, count):
        def answer(x, s):
            position = [round(float(v), 9) for v in grids[count]].index(round(float(s[0]), 9))
            middle, after = (torch.full_like(s, grids[2 * count][2 * position + i]) for i in (1, 2))
            return two_step_target(teacher, x, s, middle, after)

        return answer

    student = perfect(perfect(curved, 2 * steps), steps)
    x = 8 * torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(euler_solve(student, x, grids[steps][:-1]), euler_solve(curved, x, grids[4 * steps][:-1]), rtol=1e-9, atol=1e-10)


def test_3_many_steps_on_a_gaussian_tend_to_its_path():
    x = torch.tensor([[3.0], [-9.0]], dtype=torch.float64)
    errors = []
    for count in (256, 512):
        start = karras_grid(count + 1, sigma_min=0.01, sigma_max=8.0).tolist()[:-1]
        exact = diffusion.gaussian_path(x.numpy(), 8.0, 0.0, mean=MEAN, variance=VARIANCE)
        errors.append(np.abs(euler_solve(gaussian, x, start).numpy() - exact).max())
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.15)


def test_4_the_truncated_weight_is_the_larger_error_and_never_below_one():
    sigma = torch.tensor([0.1, 1.0, 30.0], dtype=torch.float64)
    ones = torch.ones(3, 2, dtype=torch.float64)
    found = {w: progressive_loss(ones, 0 * ones, sigma, weight=w).tolist() for w in WEIGHTS}
    assert found["truncated"] == pytest.approx([100, 1, 1])
    assert found["snr+1"] == pytest.approx([101, 2, 1 + 1 / 900])
    assert found["snr"] == pytest.approx([100, 1, 1 / 900])
    assert found["constant"] == [1, 1, 1]


def test_7_where_the_step_ends_at_no_noise_the_target_is_the_second_answer():
    x, sigma, middle, _ = draw(5)
    target = two_step_target(curved, x, sigma, middle, torch.zeros_like(sigma))
    assert torch.allclose(target, curved(euler_step(curved, x, sigma, middle), middle), rtol=1e-12)


def problem(setting):
    return suite.SUITE.problem(TrainContext(setting, suite.CARD.settings[setting], seeds_by_role(0)))


def test_grids_are_nested_and_the_last_is_the_one_that_is_sampled():
    few = problem("digits-few")
    for count in (1, 2, 4, 8):
        assert torch.allclose(levels(few, count), levels(few, 2 * count)[::2], rtol=1e-12)
        assert bool((levels(few, count).diff() < 0).all())
    for count in (1, 2):
        assert levels(few, count).tolist() == [*few.few_steps(count), 0.0]


def test_no_gradient_reaches_the_teacher_or_the_target():
    x, sigma, middle, after = draw(6)
    target = two_step_target(curved, x.requires_grad_(), sigma, middle, after)
    output = torch.zeros_like(x, requires_grad=True)
    progressive_loss(output, target, sigma, weight="truncated").sum().backward()
    assert x.grad is None


# --- the code of a public implementation ---


@pytest.mark.parametrize(("weight", "name"), [("truncated", "truncated-snr"), ("snr+1", "snr+1"), ("snr", "snr"), ("constant", "uniform")])
def test_equals_the_numbers_of_the_consistency_models_authors(weight, name):
    i = GOLDEN["inputs"]
    clean, noise = (torch.tensor(i[k], dtype=torch.float64) for k in ("clean", "noise"))
    grid = karras_grid(2 * i["steps"] + 1, sigma_min=i["sigma_min"], sigma_max=i["sigma_max"])  # to sigma_min, not to 0
    sigma, middle, after = (grid[2 * torch.tensor(i["index"]) + k] for k in range(3))

    def network(x, s, f):
        c_skip, c_out, c_in, c_noise = (v.view(-1, 1, 1, 1) for v in edm_scalings(s, sigma_data=i["sigma_data"]))
        return c_skip * x + c_out * f(c_in * x, 1000 * c_noise)

    w = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    noisy = clean + sigma.view(-1, 1, 1, 1) * noise
    target = two_step_target(lambda x, s: network(x, s, lambda y, c: 0.5 * y.sin() - 0.00001 * c), noisy, sigma, middle, after)
    loss = progressive_loss(network(noisy, sigma, lambda y, c: w * y.tanh() + 0.00005 * c), target, sigma, weight=weight)
    assert torch.allclose(loss, torch.tensor(GOLDEN["values"][name], dtype=torch.float64), rtol=1e-7)
    loss.mean().backward()
    assert float(w.grad) == pytest.approx(GOLDEN["gradients"][name], rel=1e-7)


# --- the method ---


def trained(name, batches, **values):
    """A short training without the judge."""
    setting, posed = suite.CARD.settings[name], problem(name)
    budget = Budget(student_examples=batches * setting.training.batch_size)
    run = Run(seeds=seeds_by_role(0), budget=budget, training=setting.training, oracles=[posed.teacher])
    student = distill(posed, run, **resolve(CARD, values))
    return student, {p: bill for p, bill in run.cost()["phases"].items() if bill["student_examples"]}


def test_every_round_is_a_phase_that_asks_its_teacher_twice_and_the_last_two_are_longer():
    student, phases = trained("gaussians", 24, rounds=4)
    rounds = ["8 steps", "4 steps", "2 steps", "1 steps"]
    assert [p for p in phases if p != "initialise"] == rounds
    assert all(phases[p]["teacher_examples"] == 2 * phases[p]["student_examples"] > 0 for p in rounds)
    assert phases["1 steps"]["student_examples"] >= 2 * phases["8 steps"]["student_examples"]
    assert sum(p["student_examples"] for p in phases.values()) == 256 * 24
    assert student.recipe == {"rule": "euler", "sigmas": [10.0]}


def test_with_two_evaluations_it_stops_at_two_steps():
    student, phases = trained("digits-few", 4, rounds=2)
    assert list(phases)[-2:] == ["4 steps", "2 steps"]
    assert student.recipe == {"rule": "euler", "sigmas": problem("digits-few").few_steps(2)}


def test_only_the_first_teacher_is_guided():
    _, phases = trained("gaussians-guided", 8, rounds=2)
    costs = {p: phases[p]["teacher_examples"] / phases[p]["student_examples"] for p in ("2 steps", "1 steps")}
    assert costs == {"2 steps": 4, "1 steps": 2}
