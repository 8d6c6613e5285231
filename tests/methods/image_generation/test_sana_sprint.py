"""SANA-Sprint: the numbered identities of the method, an independent oracle, and the authors' own numbers.

Identities 1 to 4 are about the tangent and are proven in tests/bench/test_trigflow.py.
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from distillbench.methods.image_generation.sana_sprint import LogVariance, critic_loss, generator_loss, weighted_scm_loss
from distillbench.problems.image_generation.adversarial import hinge_critic_loss
from distillbench.problems.image_generation.trigflow import normalised, scm_loss, tangent, velocity
from distillbench.runs.plan import plan
from distillbench.runs.runner import execute
from distillbench.runs.store import Store
from tests.oracles.image_generation import sana_sprint as oracle

GOLDEN = json.loads((Path(__file__).parents[2] / "goldens" / "sana_sprint.json").read_text())
B, D = 6, 0.5


def draws(seed):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((B, 2, 2)), rng.standard_normal((B, 2, 2)), rng.uniform(0.05, 1.5, B), rng.standard_normal(B)


# --- the oracle ---


def test_the_weighted_loss_matches_the_independent_oracle_in_value_and_gradient():
    f, g, t, v = draws(0)
    student, log_variance = torch.tensor(f, requires_grad=True), torch.tensor(v, requires_grad=True)
    target = torch.tensor(g, requires_grad=True)
    sigma, held = D * np.tan(t), {"velocity": f, "tangent": g}
    loss = weighted_scm_loss(student, target, torch.tensor(sigma), log_variance)
    assert np.allclose(loss.detach().numpy(), oracle.weighted_scm_loss(f, g, sigma, v), rtol=1e-10)
    loss.sum().backward()
    step = 1e-5
    for array, gradient in ((f, student.grad), (v, log_variance.grad)):
        numeric = np.zeros_like(array)
        for index in np.ndindex(array.shape):
            ends = []
            for sign in (1, -1):
                moved = array.copy()
                moved[index] += sign * step
                one, other = (moved, v) if array is f else (f, moved)
                ends.append(oracle.weighted_scm_loss(one, g, sigma, other, held=held).sum())
            numeric[index] = (ends[0] - ends[1]) / (2 * step)
        assert np.allclose(gradient.numpy(), numeric, rtol=1e-6, atol=1e-8)
    assert target.grad is None


def test_the_critics_hinge_matches_the_independent_oracle_in_value_and_gradient():
    rng = np.random.default_rng(1)
    logits, real = 2 * rng.standard_normal((B, 3)), np.array([True, False] * 3)
    point = torch.tensor(logits, requires_grad=True)
    loss = critic_loss(point, torch.tensor(real))
    assert np.allclose(loss.detach().numpy(), oracle.critic_loss(logits, real), rtol=1e-10)
    loss.sum().backward()
    step, numeric = 1e-6, np.zeros_like(logits)
    for index in np.ndindex(logits.shape):
        ends = []
        for sign in (1, -1):
            moved = logits.copy()
            moved[index] += sign * step
            ends.append(oracle.critic_loss(moved, real).sum())
        numeric[index] = (ends[0] - ends[1]) / (2 * step)
    assert np.allclose(point.grad.numpy(), numeric, atol=1e-6)


# --- the identities ---


def test_5_gradient_and_value_of_the_quadratic_part():
    f, g, t, v = (torch.tensor(a) for a in draws(2))
    f.requires_grad_(True)
    sigma = D * t.tan()
    weighted_scm_loss(f, g, sigma, v).sum().backward()
    assert torch.allclose(f.grad, -2 * g / (4 * sigma * v.exp()).view(-1, 1, 1), rtol=1e-12)
    short = normalised(g, c=0.1)
    plain = scm_loss(f, short)
    assert torch.allclose(plain, short.flatten(1).square().mean(1), rtol=1e-12)
    assert float(plain.detach().max()) < 1 / 4


def test_5_without_weight_it_is_the_plain_loss():
    f, g, *_ = (torch.tensor(a) for a in draws(3))
    ones, zeros = torch.ones(B, dtype=torch.float64), torch.zeros(B, dtype=torch.float64)
    assert torch.allclose(weighted_scm_loss(f, g, ones, zeros), scm_loss(f, g), rtol=1e-12)


def test_6_the_learnt_weight_is_best_at_the_size_of_the_weighted_loss():
    f, g, t, _ = (torch.tensor(a) for a in draws(4))
    sigma = D * t.tan()
    best = (scm_loss(f, g) / sigma).log().requires_grad_(True)
    weighted_scm_loss(f, g, sigma, best).sum().backward()
    assert float(best.grad.abs().max()) < 1e-12


def test_6_the_learnt_weight_starts_where_a_tangent_of_length_one_puts_it():
    assert torch.allclose(LogVariance(64)(torch.tensor([0.02, 1.0, 80.0])), torch.tensor(-math.log(64.0)))


def test_7_the_size_of_the_tangent_matters_through_c_alone():
    g = torch.tensor(draws(5)[1])
    assert torch.allclose(normalised(7 * g, c=1e-12), normalised(g, c=1e-12), rtol=1e-9)
    assert not torch.allclose(normalised(7 * g, c=0.1), normalised(g, c=0.1), rtol=1e-3)


def test_a_fair_coin_gives_half_the_sum_of_both_hinges():
    fake, real = torch.randn(2, B, 3, dtype=torch.float64)
    coins = torch.tensor([True, False])
    both = sum(critic_loss(torch.where(c, real, fake), c.expand(B)) for c in coins) / 2
    assert torch.allclose(both, hinge_critic_loss(real, fake) / 2, rtol=1e-12)


# --- the authors' code ---


@pytest.mark.parametrize("number", range(3))
def test_the_consistency_loss_equals_the_authors_during_and_after_warm_up(number):
    def given(name):
        return torch.tensor(GOLDEN["inputs"][name], dtype=torch.float64)

    w, a = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (0.8, -1.3))

    def denoiser(raw):
        def answer(x, sigma):
            t = torch.atan(sigma / D)[:, None]
            return t.cos() ** 2 * x - t.sin() * D * raw(t.cos() * x / D, t)

        return answer

    student = denoiser(lambda u, t: w * u.tanh() * (2 * t).cos() + 0.3 * u * t.sin())
    teacher = denoiser(lambda u, t: 0.5 * u.sin() + 0.4 * t)
    t = given("time")
    noisy, sigma = given("noisy") / t.cos()[:, None], D * t.tan()
    r = min(1.0, GOLDEN["inputs"]["iterations"][number] / 4000)
    g = normalised(tangent(student, noisy, sigma, teacher(noisy, sigma), sigma_data=D, warmup=r), c=GOLDEN["inputs"]["c"])
    assert torch.allclose(g, torch.tensor(GOLDEN["values"]["tangent"][number], dtype=torch.float64), rtol=1e-8, atol=1e-10)
    f = velocity(student(noisy, sigma), noisy, sigma, sigma_data=D)
    loss = weighted_scm_loss(f, g, sigma, a * t.cos()).mean()
    loss.backward()
    assert loss.item() == pytest.approx(GOLDEN["values"]["loss"][number], rel=1e-8)
    assert float(w.grad) == pytest.approx(GOLDEN["gradients"]["w"][number], rel=1e-7)
    assert float(a.grad) == pytest.approx(GOLDEN["gradients"]["a"][number], rel=1e-8)


def test_the_adversarial_losses_equal_the_authors():
    fake, real = (torch.tensor(GOLDEN["inputs"][k], dtype=torch.float64, requires_grad=True) for k in ("logits_fake", "logits_real"))
    logits, coins = torch.cat([fake, real]), torch.arange(2 * len(fake)) >= len(fake)
    loss = critic_loss(logits, coins).mean()
    loss.backward()
    assert loss.item() == pytest.approx(GOLDEN["values"]["critic"], rel=1e-10)
    for ours, name in ((fake.grad, "logits_fake"), (real.grad, "logits_real")):
        assert torch.allclose(ours, torch.tensor(GOLDEN["gradients"][name], dtype=torch.float64), rtol=1e-10)
    assert generator_loss(fake).mean().item() == pytest.approx(GOLDEN["values"]["generator"], rel=1e-10)


# --- the method ---


def run(tmp_path, setting, batches, **values):
    size = 128 if setting.startswith("digits") else 256
    [spec] = plan(f"image-generation/{setting}", ["sana_sprint"], [0], overrides={"sana_sprint": values}, split="tune",
                  budget={"student_examples": size * batches}, options={"samples": 200}, controls=False)  # fmt: skip
    record = execute(spec, Store(tmp_path))
    assert record.status == "ok", record.reason
    return record


def test_without_its_weight_there_is_no_adversary(tmp_path):
    record = run(tmp_path, "gaussians", 8, adversarial_weight=0.0)
    assert set(record.trace) == {"initialise/imitate", "distil/consistency"}
    assert record.cost["total"]["teacher_examples"] == record.cost["total"]["student_examples"]


def test_an_example_costs_three_of_the_teacher_and_two_steps_are_taken_where_allowed(tmp_path):
    record = run(tmp_path, "digits-few", 3)
    assert record.cost["phases"]["distil"]["teacher_examples"] == 3 * record.cost["phases"]["distil"]["student_examples"]
    assert record.value("nfe") == 2
