"""Consistency distillation: the numbered identities of the method, an independent oracle, and the authors' own numbers."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from distillbench.methods.image_generation.consistency_distillation import consistency_loss
from distillbench.problems.image_generation.edm import consistency_scalings, edm_scalings, euler_step, heun_step, karras_grid
from distillbench.runs.plan import plan
from distillbench.runs.runner import execute
from distillbench.runs.store import Store
from distillbench.suites.image_generation.nets import build
from distillbench.training.nets import Architecture
from tests.oracles.image_generation import consistency_distillation as oracle
from tests.oracles.image_generation import diffusion

GOLDEN = json.loads((Path(__file__).parents[2] / "goldens" / "consistency_distillation.json").read_text())
EPS, T = 0.002, 80.0
MEAN, VARIANCE = 0.3, 0.25


def denoise(x, s):
    """The exact denoiser of N(MEAN, VARIANCE)."""
    return MEAN + VARIANCE / (VARIANCE + s.view(-1, 1) ** 2) * (x - MEAN)


def solution(x, s):
    """f*(x, t): where the ODE takes x at level EPS."""
    return torch.tensor(diffusion.gaussian_path(x.numpy(), s.numpy()[:, None], EPS, mean=MEAN, variance=VARIANCE))


# --- the oracle ---


@pytest.mark.parametrize("metric", ["l1", "l2"])
def test_matches_the_independent_oracle_in_value_and_gradient(metric):
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((5, 2, 3)), rng.standard_normal((5, 2, 3))
    output, target = torch.tensor(a, requires_grad=True), torch.tensor(b, requires_grad=True)
    loss = consistency_loss(output, target, metric=metric)
    assert np.allclose(loss.detach().numpy(), oracle.consistency_loss(a, b, metric=metric), rtol=1e-10)
    loss.sum().backward()
    numeric, step = np.zeros_like(a), 1e-6
    for index in np.ndindex(a.shape):
        up, down = a.copy(), a.copy()
        up[index] += step
        down[index] -= step
        total = [oracle.consistency_loss(v, b, metric=metric).sum() for v in (up, down)]
        numeric[index] = (total[0] - total[1]) / (2 * step)
    assert np.allclose(output.grad.numpy(), numeric, rtol=1e-6, atol=1e-9)
    assert target.grad is None  # stop-gradient, always


# --- the identities ---


@pytest.mark.parametrize("metric", ["l1", "l2"])
@pytest.mark.parametrize("levels", [2, 5, 18])
def test_1_the_solution_map_is_the_zero_of_the_loss_under_an_exact_step(levels, metric):
    grid = karras_grid(levels, sigma_min=EPS, sigma_max=T)
    x = torch.linspace(-90, 90, 7, dtype=torch.float64)[:, None]
    for sigma, after in pairwise(grid):
        exact = torch.tensor(diffusion.gaussian_path(x.numpy(), float(sigma), float(after), mean=MEAN, variance=VARIANCE))
        loss = consistency_loss(solution(x, sigma.expand(7)), solution(exact, after.expand(7)), metric=metric)
        assert float(loss.abs().max()) < 1e-12
    assert torch.allclose(solution(x, grid[-1:].expand(7)), x, rtol=1e-12)


def test_2_the_fixed_point_with_heun_is_the_composed_step_and_tends_to_the_solution():
    x = torch.tensor([[1.7], [-0.4]], dtype=torch.float64)

    def centred(y, s):
        return VARIANCE / (VARIANCE + s.view(-1, 1) ** 2) * y

    errors = []
    for levels in (40, 80):
        grid = karras_grid(levels, sigma_min=EPS, sigma_max=T)
        factors = [diffusion.heun_multiplier(float(a), float(b), variance=VARIANCE) for a, b in pairwise(grid)]
        for n, (sigma, after) in enumerate(pairwise(grid)):
            stepped = heun_step(centred, x, sigma.expand(2), after.expand(2))
            assert torch.allclose(stepped, factors[n] * x, rtol=1e-11)
            here, there = np.prod(factors[n:]) * x, np.prod(factors[n + 1 :]) * stepped
            assert float(consistency_loss(here, there, metric="l2").max()) < 1e-20
        errors.append(abs(np.prod(factors) - diffusion.gaussian_path(1.0, T, EPS, mean=0.0, variance=VARIANCE)))
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.15)


def rows(sigma):
    """Seven points that the data's distribution at ``sigma`` reaches, and the level of each."""
    x = MEAN + (VARIANCE + sigma**2).sqrt() * torch.linspace(-2, 2, 7, dtype=torch.float64)[:, None]
    return x, sigma.expand(7)


@pytest.mark.parametrize(("metric", "order"), [("l1", 3), ("l2", 6)])
def test_consistency_is_exact_on_the_analytic_ode(metric, order):
    """The loss of the true consistency function under the exact teacher's Heun step: the step's own error, of third order."""
    totals = []
    for levels in (100, 200):
        grid, total = karras_grid(levels, sigma_min=EPS, sigma_max=T), 0.0
        for sigma, after in pairwise(grid):
            x, level = rows(sigma)
            stepped = heun_step(denoise, x, level, after.expand(7))
            total += float(consistency_loss(solution(x, level), solution(stepped, after.expand(7)), metric=metric).mean()) / (levels - 1)
        totals.append(total)
    assert totals[0] < 1e-3
    assert totals[0] / totals[1] == pytest.approx(2**order, rel=0.2)


def test_the_true_consistency_function_is_a_fixed_point_and_the_only_one():
    """f(x, s_n) = m + a_n (x - m): its gradient vanishes at the solution, and fitting it to its own target leads there."""
    levels = 12
    grid = karras_grid(levels, sigma_min=EPS, sigma_max=T)
    true = ((VARIANCE + EPS**2) / (VARIANCE + grid**2)).sqrt()

    def slopes(table):
        """dL / da_n of the squared loss under an exact step, and the curvature of each, with the target held still."""
        free = table.clone().requires_grad_()
        losses, curvature = [], []
        for n, (sigma, after) in enumerate(pairwise(grid)):
            x, _ = rows(sigma)
            exact = torch.tensor(diffusion.gaussian_path(x.numpy(), float(sigma), float(after), mean=MEAN, variance=VARIANCE))
            output, target = MEAN + free[n] * (x - MEAN), MEAN + free[n + 1] * (exact - MEAN)
            losses.append(consistency_loss(output, target, metric="l2").mean())
            curvature.append(2 * ((x - MEAN) ** 2).mean())
        torch.stack(losses).sum().backward()
        return free.grad[:-1], torch.stack(curvature)

    assert float(slopes(true)[0].abs().max()) < 1e-10
    table = torch.cat([torch.linspace(2, -1, levels - 1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)])  # f(x, e) = x
    assert float(slopes(table)[0].abs().max()) > 1e-2
    for sweep in range(levels - 1):  # the truth moves up one level a sweep
        gradient, curvature = slopes(table)
        table = torch.cat([table[:-1] - gradient / curvature, table[-1:]])
        assert torch.allclose(table[levels - 2 - sweep :], true[levels - 2 - sweep :], rtol=1e-9)
    assert torch.allclose(table, true, rtol=1e-9)


def test_3_with_the_true_sample_an_euler_step_lands_on_the_cleaner_point():
    rng = np.random.default_rng(1)
    clean, noise = torch.tensor(rng.standard_normal((6, 2))), torch.tensor(rng.standard_normal((6, 2)))
    sigma, after = torch.full((6,), 3.0, dtype=torch.float64), torch.full((6,), 1.2, dtype=torch.float64)
    stepped = euler_step(lambda x, s: clean, clean + 3.0 * noise, sigma, after)
    assert torch.allclose(stepped, clean + 1.2 * noise, rtol=1e-12)


def student(**arguments):
    own = {"shape": [2], "width": 16, "blocks": 1, "sigma_data": 0.5, "sigma_min": EPS}
    net = build(Architecture("denoiser-mlp", {**own, **arguments}), 0).double()
    with torch.no_grad():
        net.leave.weight.normal_(generator=torch.Generator().manual_seed(0))
    return net


def test_5_the_exported_parameterisation_keeps_the_boundary_whatever_the_weights():
    x, s = torch.randn(4, 2, dtype=torch.float64), torch.full((4,), EPS, dtype=torch.float64)
    assert torch.equal(student(boundary=True)(x, s), x)
    assert not torch.equal(student()(x, s), x)


def test_8_with_two_levels_the_target_is_the_solvers_step_itself():
    net = student(boundary=True)
    x = T * torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    high, low = torch.full((4,), T, dtype=torch.float64), torch.full((4,), EPS, dtype=torch.float64)
    step = heun_step(denoise, x, high, low)
    assert torch.equal(net(step, low), step)
    assert torch.equal(consistency_loss(net(x, high), net(step, low), metric="l2"), ((net(x, high) - step) ** 2).mean(1))


# --- the authors' code ---


@pytest.mark.parametrize("metric", ["l1", "l2"])
def test_equals_the_authors_numbers(metric):
    i = GOLDEN["inputs"]
    clean, noise = (torch.tensor(i[k], dtype=torch.float64) for k in ("clean", "noise"))
    grid = karras_grid(i["levels"], sigma_min=i["sigma_min"], sigma_max=i["sigma_max"])
    sigma, cleaner = grid[i["index"]], grid[[n + 1 for n in i["index"]]]

    def column(v):
        return v.view(-1, 1, 1, 1)

    def network(x, s, f, boundary):
        scale = consistency_scalings(s, sigma_data=0.5, sigma_min=EPS) if boundary else edm_scalings(s, sigma_data=0.5)
        c_skip, c_out, c_in, c_noise = map(column, scale)
        return c_skip * x + c_out * f(c_in * x, 1000 * c_noise)

    w = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    noisy = clean + column(sigma) * noise
    after = heun_step(lambda x, s: network(x, s, lambda y, c: 0.5 * y.sin() - 0.01 * c, False), noisy, sigma, cleaner)
    target = network(after, cleaner, lambda y, c: 0.6 * y.tanh() + 0.05 * c, True)
    loss = consistency_loss(network(noisy, sigma, lambda y, c: w * y.tanh() + 0.05 * c, True), target, metric=metric)
    assert torch.allclose(loss, torch.tensor(GOLDEN["values"][metric], dtype=torch.float64), rtol=1e-8)
    loss.mean().backward()
    assert float(w.grad) == pytest.approx(GOLDEN["gradients"][metric], rel=1e-8)


# --- the method ---


def run(tmp_path, examples, seed=0, **values):
    spec = plan(
        "image-generation/gaussians",
        ["consistency_distillation"],
        [seed],
        overrides={"consistency_distillation": values},
        split="tune",
        budget={"student_examples": examples},
        options={"samples": 200},  # most of the time goes into judging
        controls=False,
    )[0]
    record = execute(spec, Store(tmp_path))
    assert record.status == "ok", record.reason
    return record


def test_7_at_the_start_the_target_networks_rate_does_not_matter(tmp_path):
    first = [run(tmp_path, 256 * 8, target_decay=mu).trace["distil/consistency"] for mu in (0.0, 0.9)]
    assert first[0][0] == first[1][0]
    assert first[0][1:] != first[1][1:]


def test_the_exported_average_follows_and_does_not_steer(tmp_path):
    slow, fast = (run(tmp_path, 256 * 8, average_decay=d) for d in (0.9, 0.0))
    assert slow.trace == fast.trace
    assert slow.value("mmd2") != fast.value("mmd2")


def test_the_student_leaves_with_its_parameterisation_and_a_heun_step_costs_two(tmp_path):
    record = run(tmp_path, 256 * 8)
    assert record.student["arguments"]["boundary"] is True
    assert record.student["averaged"] is True
    assert record.value("nfe") == 1
    phases = record.cost["phases"]
    assert phases["distil"]["teacher_examples"] == 2 * phases["distil"]["student_examples"] == 2 * 256 * 6


@pytest.mark.slow
def test_a_short_training_beats_scratch_and_the_teacher_in_one_step(tmp_path):
    store, scores = Store(tmp_path), {}
    methods = ["consistency_distillation"]
    budget, options = {"student_examples": 76800}, {"samples": 500}
    for spec in plan("image-generation/gaussians", methods, range(1), split="tune", budget=budget, options=options):
        if spec.method != "teacher":
            record = execute(spec, store)
            assert record.status == "ok", record.reason
            scores.setdefault(spec.method, []).append(record.value("mmd2"))
    assert max(scores["consistency_distillation"]) < 0.2 * min(scores["scratch"] + scores["teacher_one_step"])
