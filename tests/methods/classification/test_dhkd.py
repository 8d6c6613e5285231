"""Dual-head distillation: the sheet's identities, parity with the authors' loss and projection, and the two heads' separation."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from distillbench.methods.classification.dhkd import align, aligned_backward, auxiliary_head, binary_kl_norm
from distillbench.problems.classification.losses import cross_entropy
from distillbench.training.nets import head
from tests.methods.classification.tracks import distilled, track
from tests.oracles.classification import dhkd as oracle
from tests.oracles.differences import gradient

GOLDEN = json.loads((Path(__file__).parents[2] / "goldens" / "dhkd.json").read_text())


def logits(seed: int = 0, batch: int = 4, classes: int = 5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return 3 * rng.standard_normal((batch, classes)), 3 * rng.standard_normal((batch, classes))


@pytest.mark.parametrize("temperature", [0.5, 2.0, 7.0])
def test_value_and_gradient_against_the_oracle(temperature: float) -> None:
    a, t = logits()
    ours = torch.tensor(a, requires_grad=True)
    loss = binary_kl_norm(ours, torch.tensor(t), temperature=temperature)
    np.testing.assert_allclose(loss.detach(), oracle.binary_kl_norm(a, t, temperature=temperature), rtol=1e-10)
    loss.sum().backward()
    expected = gradient(lambda x: oracle.binary_kl_norm(x, t, temperature=temperature), a)
    np.testing.assert_allclose(ours.grad, expected, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(ours.grad, temperature / 2 * np.tanh((a - t) / (2 * temperature)), rtol=1e-10)


def test_1_zero_at_match_even_and_a_function_of_the_difference() -> None:
    a, t = (torch.tensor(x) for x in logits())
    same = a.clone().requires_grad_()
    zero = binary_kl_norm(same, a, temperature=2.0)
    zero.sum().backward()
    assert not zero.any()
    assert same.grad is not None
    assert not same.grad.any()
    loss = binary_kl_norm(a, t, temperature=2.0)
    torch.testing.assert_close(binary_kl_norm(t, a, temperature=2.0), loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(binary_kl_norm(a + 5, t + 5, temperature=2.0), loss, rtol=1e-12, atol=0)
    assert (binary_kl_norm(a + 5, t, temperature=2.0) - loss).abs().min() > 0.1


def test_2_it_is_log_cosh() -> None:
    u = torch.linspace(-30, 30, 2001, dtype=torch.float64)[:, None]
    expected = torch.log(torch.cosh(u / 2)).squeeze(1)
    torch.testing.assert_close(binary_kl_norm(u, torch.zeros_like(u), temperature=1.0), expected, rtol=0, atol=4e-15)


def test_3_limits_in_the_temperature() -> None:
    a, t = (torch.tensor(x) for x in logits())
    hot = binary_kl_norm(a, t, temperature=1000.0)
    torch.testing.assert_close(hot, (a - t).square().sum(1) / 8, rtol=1e-5, atol=0)
    cold = 1e-3
    expected = (cold * (a - t).abs() / 2 - cold**2 * math.log(2)).sum(1)
    torch.testing.assert_close(binary_kl_norm(a, t, temperature=cold), expected, rtol=1e-10, atol=0)


def test_4_gradients_are_bounded_even_where_the_released_loss_is_infinite() -> None:
    a = torch.tensor([[1e4, -1e4, 40.0, 0.0]], requires_grad=True)
    loss = binary_kl_norm(a, torch.tensor([[-1e4, 1e4, 0.0, 0.0]]), temperature=2.0)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert a.grad is not None
    assert a.grad.abs().max() <= 1
    assert a.grad[0, :3].tolist() == [1, -1, 1]


def test_5_without_the_teacher_the_main_head_trains_as_by_labels_alone() -> None:
    for alignment in (True, False):
        student, _, _ = distilled("dhkd", kd_weight=0, alignment=alignment)
        problem, run = track()
        plain = run.fit(problem.student, lambda b: run.loss(b, ce=cross_entropy(problem.student(b.inputs), b.labels)), problem.batches)  # noqa: B023
        for name, value in plain.weights.items():
            torch.testing.assert_close(student.weights[name], value, rtol=0, atol=1e-6)


def test_6_heads_do_not_cross() -> None:
    problem, _ = track()
    batch = next(problem.batches.stream(0))
    other = auxiliary_head(head(problem.student).in_features, problem.classes, "nonlinear")
    seen = problem.outputs(problem.student, batch.inputs)
    ce = cross_entropy(seen.logits, batch.labels).mean()
    kd = binary_kl_norm(other(seen.embedding), problem.teacher.logits(batch), temperature=2.0).mean()
    main, auxiliary = head(problem.student).weight, other[0].weight
    assert torch.autograd.grad(kd, [main], retain_graph=True, allow_unused=True) == (None,)
    assert torch.autograd.grad(ce, [auxiliary], retain_graph=True, allow_unused=True) == (None,)
    body = next(problem.student.parameters())
    assert torch.autograd.grad(kd, [body])[0].any()


def test_7_alignment_projects_the_teacher_only_and_only_in_conflict() -> None:
    fired = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        g0, g1 = rng.standard_normal(6), rng.standard_normal(6)
        got = align(torch.tensor(g0), torch.tensor(g1)).numpy()
        np.testing.assert_allclose(got, oracle.align(g0, g1), rtol=1e-12, atol=1e-14)
        if g0 @ g1 < 0:
            fired += 1
            assert abs((got - g0) @ g0) < 1e-12
            np.testing.assert_allclose(got, g0 * (1 + abs(g0 @ g1) / (g0 @ g0)) + g1, rtol=1e-12, atol=1e-14)
        else:
            np.testing.assert_array_equal(got, g0 + g1)
    assert 5 < fired < 35
    zeros = torch.zeros(3)
    assert align(zeros, torch.ones(3)).tolist() == [1, 1, 1], "no gradient from the labels: nothing to divide by"


def test_7_in_conflict_the_main_heads_gradient_grows_by_the_same_factor() -> None:
    shared, main, other = (torch.nn.Parameter(torch.tensor([x])) for x in (1.0, 2.0, 3.0))
    terms = {"ce": 2 * shared.sum() + 5 * main.sum(), "kd": -1 * shared.sum() + 7 * other.sum()}
    aligned_backward(terms, [shared, main, other])
    factor = 1 + 2 / (2**2 + 5**2)
    got = [float(p.grad) for p in (shared, main, other) if p.grad is not None]
    assert got == pytest.approx([2 * factor - 1, 5 * factor, 7])


def test_loss_and_alignment_are_the_authors() -> None:
    rng = np.random.default_rng(52)
    a, t = 3 * rng.standard_normal((4, 5)), 3 * rng.standard_normal((4, 5))
    for temperature, value, slope in zip(GOLDEN["temperatures"], GOLDEN["values"], GOLDEN["gradients"], strict=True):
        ours = torch.tensor(a, requires_grad=True)
        loss = binary_kl_norm(ours, torch.tensor(t), temperature=temperature).mean()
        loss.backward()
        assert loss.item() == pytest.approx(value, rel=1e-10)
        assert ours.grad is not None
        np.testing.assert_allclose(ours.grad.flatten(), slope, rtol=1e-7, atol=1e-12)
    for seed, expected in enumerate(GOLDEN["aligned"], start=1):
        rng = np.random.default_rng(seed)
        g0, g1 = rng.standard_normal(9), rng.standard_normal(9)
        np.testing.assert_allclose(align(torch.tensor(g0), torch.tensor(g1)), expected, rtol=1e-12, atol=1e-14)


def test_the_auxiliary_head_stays_behind_and_the_teacher_can_be_switched_off() -> None:
    student, problem, run = distilled("dhkd", "digits", kd_until=0.5, auxiliary="linear", alignment=False)
    assert set(student.weights) == set(problem.student.state_dict())
    kd = run.trace["fit/kd"]
    half = len(kd) // 2
    assert all(v > 0 for v in kd[:half])
    assert not any(kd[half:])
