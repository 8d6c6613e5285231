"""ND loss: the sheet's identities, parity with the authors' loss, and what the mapping may touch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from distillbench.methods.classification.nd_loss import nd_loss, teacher_class_means
from distillbench.problems.classification.losses import cross_entropy, kl_divergence
from tests.methods.classification.tracks import distilled, track
from tests.oracles.classification import nd_loss as oracle
from tests.oracles.differences import gradient

GOLDEN = json.loads((Path(__file__).parents[2] / "goldens" / "nd_loss.json").read_text())


def example(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((6, 5)), rng.standard_normal((6, 5)), rng.integers(0, 3, 6), rng.standard_normal((3, 5))


def torched(seed: int = 0) -> list[torch.Tensor]:
    return [torch.tensor(x) for x in example(seed)]


@pytest.mark.parametrize("size", [0.2, 1.0, 5.0])
def test_value_and_gradient_against_the_oracle(size: float) -> None:
    s, t, y, c = example()
    s = s * size  # shorter and longer than the teacher's: both branches of the maximum
    ours = torch.tensor(s, requires_grad=True)
    loss = nd_loss(ours, torch.tensor(t), torch.tensor(y), torch.tensor(c))
    np.testing.assert_allclose(loss.detach(), oracle.nd_loss(s, t, y, c), rtol=1e-10, atol=1e-14)
    loss.sum().backward()
    np.testing.assert_allclose(ours.grad, gradient(lambda x: oracle.nd_loss(x, t, y, c), s), rtol=1e-6, atol=1e-9)


def test_1_values_along_the_class_mean() -> None:
    means = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    label, teacher = torch.zeros(1, dtype=torch.int64), torch.tensor([[0.0, 2.0]], dtype=torch.float64)
    along = torch.tensor([[0.6, 0.8]], dtype=torch.float64)
    for factor, expected in ((2, 0), (7, 0), (1, 0.5), (0, 1), (-3, 2)):
        assert float(nd_loss(factor * along, teacher, label, means)) == pytest.approx(expected, abs=1e-15)
    s, t, y, c = torched()
    value = nd_loss(10 * s, t, y, c)
    assert (value >= 0).all()
    assert (value <= 2).all()


def test_2_a_long_embedding_feels_no_radial_force() -> None:
    s, t, y, c = torched()
    longer = (10 * s).requires_grad_()
    loss = nd_loss(longer, t, y, c)
    torch.testing.assert_close(nd_loss(30 * s, t, y, c), loss, rtol=1e-12, atol=1e-14)
    loss.sum().backward()
    assert longer.grad is not None
    assert (longer.grad * longer).sum(1).abs().max() < 1e-15


def test_3_a_short_embedding_is_pulled_along_the_class_mean_by_a_constant_force() -> None:
    s, t, y, c = torched()
    short = (0.01 * s).requires_grad_()
    nd_loss(short, t, y, c).sum().backward()
    expected = -(c / c.norm(dim=1, keepdim=True))[y] / t.norm(dim=1, keepdim=True)
    torch.testing.assert_close(short.grad, expected, rtol=1e-12, atol=0)


def test_4_and_5_lengths_of_class_means_and_directions_of_the_teacher_do_not_matter() -> None:
    s, t, y, c = torched()
    loss = nd_loss(s, t, y, c)
    scaled = nd_loss(s, t, y, torch.tensor([[0.1], [3.0], [40.0]], dtype=torch.float64) * c)
    torch.testing.assert_close(scaled, loss, rtol=1e-12, atol=1e-14)
    rotation = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    torch.testing.assert_close(nd_loss(s, t @ rotation, y, c), loss, rtol=1e-12, atol=1e-14)


def test_6_continuous_with_a_kink_at_equal_lengths() -> None:
    means = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    teacher, label = torch.tensor([[0.0, 1.0]], dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    slopes, values = [], []
    for radius in (1 - 1e-9, 1 + 1e-9):
        s = torch.tensor([[0.6 * radius, 0.8 * radius]], dtype=torch.float64, requires_grad=True)
        loss = nd_loss(s, teacher, label, means)
        loss.sum().backward()
        assert s.grad is not None
        slopes.append(float((s.grad * s.detach()).sum()))
        values.append(loss.item())
    assert abs(values[0] - values[1]) < 1e-8
    assert slopes == pytest.approx([-0.6, 0], abs=1e-8)


def test_7_without_the_nd_term_it_is_kd_with_a_warm_up() -> None:
    student, _, _ = distilled("nd_loss", nd_weight=0, warmup=0)
    problem, run = track()

    def loss(batch):  # type: ignore[no-untyped-def]
        logits = problem.student(batch.inputs)
        kd = kl_divergence(logits, problem.teacher.logits(batch), temperature=4.0)
        return run.loss(batch, ce=cross_entropy(logits, batch.labels), kd=3.5 * kd)

    plain = run.fit(problem.student, loss, problem.batches)
    assert all(torch.equal(student.weights[n], v) for n, v in plain.weights.items())


def test_the_loss_is_the_authors() -> None:
    rng = np.random.default_rng(193)
    c, s, t = rng.standard_normal((3, 5)), rng.standard_normal((8, 5)), rng.standard_normal((8, 5))
    y = rng.integers(0, 3, 8)
    ours = torch.tensor(s, requires_grad=True)
    loss = nd_loss(ours, torch.tensor(t), torch.tensor(y), torch.tensor(c)).mean()
    loss.backward()
    assert loss.item() == pytest.approx(GOLDEN["values"][0], rel=1e-12)
    assert ours.grad is not None
    np.testing.assert_allclose(ours.grad.flatten(), GOLDEN["gradients"][0], rtol=1e-10, atol=1e-14)
    zs, zt = (torch.tensor(3 * rng.standard_normal((8, 4))) for _ in range(2))
    assert float(3.5 * kl_divergence(zs, zt, temperature=4.0).mean()) == pytest.approx(GOLDEN["kd"], rel=1e-12)


def test_a_zero_embedding_is_no_division_by_zero() -> None:
    s = torch.zeros(2, 3, requires_grad=True)
    loss = nd_loss(s, torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), torch.zeros(1, 3))
    loss.sum().backward()
    assert loss.tolist() == [1, 1]
    assert s.grad is not None
    assert torch.isfinite(s.grad).all()


def test_class_means_are_means_over_the_training_set() -> None:
    problem, _ = track()
    assert problem.train is not None
    embedding = problem.teacher.outputs(problem.train.take(torch.arange(len(problem.train)))).embedding
    expected = torch.stack([embedding[problem.train.labels == c].mean(0) for c in range(problem.classes)])
    torch.testing.assert_close(teacher_class_means(problem), expected, rtol=1e-5, atol=1e-5)


def test_warm_up_rises_and_the_mapping_stays_behind() -> None:
    student, problem, run = distilled("nd_loss", "digits", warmup=1.0, examples=2560)
    assert run.trace["fit/kd"][0] == 0
    assert run.trace["fit/kd"][1] > 0
    assert set(student.weights) == set(problem.student.state_dict())
