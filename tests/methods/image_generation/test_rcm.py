"""Score-regularised consistency: the numbered identities of the method, an independent oracle, and the authors' own numbers.

The consistency half itself is proven in tests/bench/test_trigflow.py.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from distillbench.cards.card import Budget
from distillbench.methods.image_generation import rcm
from distillbench.methods.image_generation.rcm import regulariser, regulariser_gradient
from distillbench.problems.image_generation.edm import denoising_loss
from distillbench.problems.image_generation.matching import matching_gradient, surrogate_loss
from distillbench.problems.image_generation.start import initialise
from distillbench.problems.image_generation.trigflow import draw, normalised, scm_loss, tangent, velocity, warm
from distillbench.runs.identities import seeds_by_role
from distillbench.runs.plan import plan
from distillbench.runs.runner import execute
from distillbench.runs.store import Store
from distillbench.runs.suite import TrainContext
from distillbench.suites import image_generation as suite
from distillbench.training.run import Learner, Run
from tests.oracles.image_generation import rcm as oracle

GOLDEN = json.loads((Path(__file__).parents[2] / "goldens" / "rcm.json").read_text())
DEFAULTS = {name: h.default for name, h in rcm.CARD.hyperparameters.items()}


def tensors(seed, count=3, shape=(6, 2, 3)):
    rng = np.random.default_rng(seed)
    return [torch.tensor(rng.standard_normal(shape)) for _ in range(count)]


# --- the oracle ---


def test_matches_the_independent_oracle_in_value_and_gradient():
    x, real, fake = tensors(0)
    h = regulariser_gradient(x, real, fake)
    expected = oracle.regulariser_gradient(x.numpy(), real.numpy(), fake.numpy())
    assert np.allclose(h.numpy(), expected, rtol=1e-10)
    point = x.clone().requires_grad_(True)
    loss = regulariser(point, h)
    held = {"generated": x.numpy(), "gradient": expected}
    assert np.allclose(loss.detach().numpy(), oracle.regulariser(x.numpy(), expected), rtol=1e-10)
    loss.sum().backward()
    numeric, step = np.zeros(x.shape), 1e-5
    for index in np.ndindex(numeric.shape):
        ends = []
        for sign in (1, -1):
            moved = x.numpy().copy()
            moved[index] += sign * step
            ends.append(oracle.regulariser(moved, expected, held=held).sum())
        numeric[index] = (ends[0] - ends[1]) / (2 * step)
    assert np.allclose(point.grad.numpy(), numeric, rtol=1e-7, atol=1e-9)


# --- the identities ---


def test_3_at_the_optimum_the_regulariser_asks_nothing():
    x, real, _ = tensors(1)
    assert float(regulariser_gradient(x, real, real.clone()).abs().max()) == 0


def test_4_it_is_twice_the_gradient_of_dmd_in_its_direction():
    x, real, fake = tensors(2)
    h = regulariser_gradient(x, real, fake)
    assert torch.allclose(h, matching_gradient(x, real, fake), rtol=1e-12)
    ends = []
    for loss in (regulariser, surrogate_loss):
        point = x.clone().requires_grad_(True)
        loss(point, h).sum().backward()
        ends.append(point.grad)
    assert torch.allclose(ends[0], 2 * ends[1], rtol=1e-12)
    assert torch.allclose(ends[0], 2 * h / 6, rtol=1e-12)


def test_7_the_fake_scores_weight_does_not_move_its_optimum():
    """Any level: the weighted squares of answers a x are least at the posterior mean's a, and the weight is 1 / (d sin t)^2."""
    generator = torch.Generator().manual_seed(0)
    clean = 0.5 * torch.randn(200000, 1, generator=generator, dtype=torch.float64)
    for level in (0.1, 1.0, 5.0):
        sigma = torch.full((len(clean),), level, dtype=torch.float64)
        noisy = clean + level * torch.randn(clean.shape, generator=generator, dtype=torch.float64)
        best = 0.25 / (0.25 + level**2)
        here, *others = (denoising_loss(k * best * noisy, clean, sigma, sigma_data=0.7).mean() for k in (1.0, 0.9, 1.1))
        assert here < min(others)
        t = torch.atan(sigma / 0.7)
        plain = ((best * noisy - clean) ** 2)[:, 0] / (0.7 * t.sin()) ** 2
        assert torch.allclose(denoising_loss(best * noisy, clean, sigma, sigma_data=0.7), plain, rtol=1e-10)


def test_a_row_the_teacher_leaves_where_it_is_stays_finite():
    x, real, fake = tensors(3)
    real[0], fake[0] = x[0], x[0]
    h = regulariser_gradient(x, real, fake)
    assert float(h[0].abs().max()) == 0
    assert torch.equal(h[1:], regulariser_gradient(x[1:], real[1:], fake[1:]))


# --- the authors' code ---


def gold(name):
    return torch.tensor(GOLDEN["inputs"][name], dtype=torch.float64)


def wrapped(raw):
    """The denoiser, in the variance-exploding form with d = 1, of a rectified flow's network under the authors' wrapper."""

    def answer(x, sigma):
        t = torch.atan(sigma)[:, None]
        whole = t.cos() + t.sin()
        trig = t.cos() * x
        return (trig - t.sin() * raw(trig / whole, t.sin() / whole)) / whole

    return answer


def test_the_consistency_loss_equals_the_authors():
    weight = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    student = wrapped(lambda u, c: weight * u.tanh() + 0.3 * c * u)
    teacher = wrapped(lambda u, c: 0.5 * u.sin() + 0.4 * c)
    t = gold("time")
    noisy, sigma = gold("noisy") / t.cos()[:, None], t.tan()
    g = tangent(student, noisy, sigma, teacher(noisy, sigma), sigma_data=1.0)
    loss = scm_loss(velocity(student(noisy, sigma), noisy, sigma, sigma_data=1.0), normalised(g, c=GOLDEN["inputs"]["c"]))
    summed = 6 * loss  # the authors sum where we take a mean
    assert torch.allclose(summed, torch.tensor(GOLDEN["values"]["scm"], dtype=torch.float64), rtol=1e-8)
    summed.mean().backward()
    assert float(weight.grad) == pytest.approx(GOLDEN["gradients"]["scm"], rel=1e-8)


def test_the_regulariser_and_the_fake_scores_loss_equal_the_authors():
    teacher = wrapped(lambda u, c: 0.5 * u.sin() + 0.4 * c)
    fake = wrapped(lambda u, c: 0.7 * u.sin() - 0.2 * c)
    x, t = gold("generated").requires_grad_(True), gold("critic_time")
    noisy, sigma = gold("regulariser_noisy") / t.cos()[:, None], t.tan()
    loss = 6 * regulariser(x, regulariser_gradient(x, teacher(noisy, sigma), fake(noisy, sigma)))
    assert torch.allclose(loss, torch.tensor(GOLDEN["values"]["regulariser"], dtype=torch.float64), rtol=1e-9)
    loss.sum().backward()
    assert torch.allclose(x.grad, torch.tensor(GOLDEN["gradients"]["regulariser"], dtype=torch.float64), rtol=1e-9)
    noisy = gold("critic_noisy") / t.cos()[:, None]
    theirs = torch.tensor(GOLDEN["values"]["critic"], dtype=torch.float64)
    assert torch.allclose(6 * denoising_loss(fake(noisy, sigma), x.detach(), sigma, sigma_data=1.0), theirs, rtol=1e-9)


# --- the method ---


def problem_and_run(batches, name="gaussians"):
    setting = suite.CARD.settings[name]
    problem = suite.SUITE.problem(TrainContext(name, setting, seeds_by_role(0)))
    budget = Budget(student_examples=batches * setting.training.batch_size)
    return problem, Run(seeds=seeds_by_role(0), budget=budget, training=setting.training, oracles=[problem.teacher])


def test_without_its_regulariser_it_is_scm():
    """Bit for bit: the fake score then trains beside, and the student never sees it."""
    problem, run = problem_and_run(12)
    ours = rcm.distill(problem, run, **DEFAULTS | {"regulariser_weight": 0.0, "average": 0.0})
    problem, run = problem_and_run(12)
    initialise(problem, run, share=DEFAULTS["initial_share"])

    def loss(batch):
        r = warm(run.progress, DEFAULTS["warmup"])
        f, g, _ = draw(
            problem, run, problem.student, batch, mean=DEFAULTS["mean"], std=DEFAULTS["std"], warmup=r, c=DEFAULTS["tangent_constant"]
        )
        return run.loss(batch, consistency=DEFAULTS["consistency_weight"] * scm_loss(f, g))

    rate = run.training.learning_rate * DEFAULTS["generator_rate"]
    fake = Learner(problem.new_student(), lambda b: run.loss(b, none=torch.zeros(len(b), requires_grad=True)), counts=None,
                   updates=DEFAULTS["fake_updates"])  # fmt: skip
    run.loop([Learner(problem.student, loss, learning_rate=rate, betas=(DEFAULTS["beta1"], 0.999)), fake], problem.batches)
    plain = run.export(problem.student)
    assert all(torch.equal(ours.weights[name], weight) for name, weight in plain.weights.items())


def test_two_steps_where_the_setting_allows_them(tmp_path):
    [spec] = plan("image-generation/digits-few", ["rcm"], [0], split="tune", budget={"student_examples": 128 * 3}, controls=False)
    record = execute(spec, Store(tmp_path))
    assert record.status == "ok", record.reason
    assert record.value("nfe") == 2
