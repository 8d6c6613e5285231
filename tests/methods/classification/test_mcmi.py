"""MCMI: the sheet's identities, parity with the authors' loss and centroids, and a teacher that stays as it was."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from distillbench.methods.classification.mcmi import Centroids, class_centroids, conditional_information, mcmi_loss
from distillbench.problems.classification.losses import cross_entropy
from distillbench.training.run import Learner
from tests.methods.classification.tracks import distilled, track
from tests.oracles.classification import mcmi as oracle
from tests.oracles.differences import gradient

GOLDEN = json.loads((Path(__file__).parents[2] / "goldens" / "mcmi.json").read_text())


def example(seed: int = 0, batch: int = 30, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    return torch.tensor(3 * rng.standard_normal((batch, classes))), torch.tensor(rng.integers(0, classes, batch))


def entropy(probabilities: torch.Tensor) -> torch.Tensor:
    return torch.special.entr(probabilities).sum(1)


def test_value_and_gradient_against_the_oracle() -> None:
    z, y = example(batch=6)
    q = class_centroids(*example(seed=1))
    np.testing.assert_allclose(q, oracle.class_centroids(*(x.numpy() for x in example(seed=1))), rtol=1e-12)
    for weight in (0.0, 0.15, 2.0):
        ours = z.clone().requires_grad_()
        loss = mcmi_loss(ours, y, q, information_weight=weight)
        expected = oracle.mcmi_loss(z.numpy(), y.numpy(), q.numpy(), information_weight=weight)
        np.testing.assert_allclose(loss.detach(), expected, rtol=1e-10)
        loss.sum().backward()
        slope = gradient(lambda x, w=weight: oracle.mcmi_loss(x, y.numpy(), q.numpy(), information_weight=w), z.numpy())  # type: ignore[misc]
        np.testing.assert_allclose(ours.grad, slope, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(
        conditional_information(z, y, q), oracle.conditional_information(z.numpy(), y.numpy(), q.numpy()), rtol=1e-10
    )


def test_1_information_is_the_centroids_entropy_minus_the_outputs() -> None:
    z, y = example()
    q = class_centroids(z, y)
    mean = conditional_information(z, y, q).mean()
    torch.testing.assert_close(mean, entropy(q)[y].mean() - entropy(z.softmax(1)).mean(), rtol=0, atol=1e-14)


def test_2_any_other_centroid_overestimates_it() -> None:
    z, y = example()
    q, other = class_centroids(z, y), class_centroids(*example(seed=5))
    stale = conditional_information(z, y, other).mean()
    excess = (q * (q.log() - other.log())).sum(1)[y].mean()
    torch.testing.assert_close(stale, conditional_information(z, y, q).mean() + excess, rtol=1e-13, atol=0)
    assert excess > 0


def test_3_bounds() -> None:
    z, y = example()
    value = conditional_information(z, y, class_centroids(z, y)).mean()
    assert 0 <= value <= math.log(4)
    alike = z[:4][y]  # one and the same output for all examples of a class
    assert conditional_information(alike, y, class_centroids(alike, y)).abs().max() < 1e-14


def test_4_weight_zero_is_cross_entropy() -> None:
    z, y = example()
    assert torch.equal(mcmi_loss(z, y, class_centroids(z, y), information_weight=0.0), cross_entropy(z, y))


def test_5_one_example_a_class_carries_no_information() -> None:
    z = example()[0][:4]
    y = torch.tensor([2, 0, 3, 1])
    assert conditional_information(z, y, class_centroids(z, y)).abs().max() < 1e-14


def test_6_relabelling_everything_changes_nothing() -> None:
    z, y = example()
    q, order = class_centroids(z, y), torch.tensor([2, 0, 3, 1])
    new = torch.argsort(order)[y]
    moved = mcmi_loss(z[:, order], new, q[order][:, order], information_weight=0.3)
    torch.testing.assert_close(moved, mcmi_loss(z, y, q, information_weight=0.3), rtol=1e-13, atol=1e-14)


def test_7_two_disjoint_certain_outputs_give_log_two() -> None:
    z = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]])
    y = torch.zeros(2, dtype=torch.int64)
    q = class_centroids(z, y)
    assert q[0].tolist() == [0.5, 0.5, 0]
    assert conditional_information(z, y, q).tolist() == pytest.approx([math.log(2)] * 2)


def test_8_gradient_in_closed_form() -> None:
    z, y = example()
    q = class_centroids(*example(seed=5))
    ours = z.clone().requires_grad_()
    value = conditional_information(ours, y, q)
    value.sum().backward()
    p = z.softmax(1)
    expected = p * (p.log() - q[y].log() - value.detach()[:, None])
    torch.testing.assert_close(ours.grad, expected, rtol=1e-12, atol=1e-14)


def test_a_centroid_without_mass_gives_finite_values_and_gradients() -> None:
    z = torch.tensor([[0.0, 1.0, 2.0]], requires_grad=True)
    loss = mcmi_loss(z, torch.tensor([0]), torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]]), information_weight=0.15)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert z.grad is not None
    assert torch.isfinite(z.grad).all()


def test_loss_and_centroids_are_the_authors() -> None:
    rng = np.random.default_rng(192)
    z = torch.tensor(3 * rng.standard_normal((20, 4)), requires_grad=True)
    y = torch.tensor(rng.integers(0, 4, 20))
    theirs = torch.tensor(GOLDEN["centroids"], dtype=torch.float64)
    torch.testing.assert_close(class_centroids(z.detach(), y), theirs, rtol=0, atol=2e-7)  # made in float32
    assert float(cross_entropy(z.detach(), y).mean()) == pytest.approx(GOLDEN["ce"], rel=1e-12)
    assert float(conditional_information(z.detach(), y, theirs).mean()) == pytest.approx(GOLDEN["kl"], rel=1e-12)
    loss = mcmi_loss(z, y, theirs, information_weight=0.15).mean()
    loss.backward()
    assert loss.item() == pytest.approx(GOLDEN["values"][0], rel=1e-12)
    assert z.grad is not None
    np.testing.assert_allclose(z.grad.flatten(), GOLDEN["gradients"][0], rtol=1e-10, atol=1e-15)


def test_centroids_follow_only_the_classes_of_a_batch_and_are_saved() -> None:
    z, y = example()
    centroids = Centroids(class_centroids(*example(seed=5)))
    before = centroids.rows.clone()
    some = y < 2
    centroids.follow(z[some], y[some], 0.9)
    assert torch.equal(centroids.rows[2:], before[2:])
    torch.testing.assert_close(centroids.rows[:2], 0.9 * before[:2] + 0.1 * class_centroids(z[some], y[some])[:2], rtol=1e-12, atol=0)
    torch.testing.assert_close(centroids.rows.sum(1), torch.ones(4, dtype=torch.float64), rtol=1e-12, atol=0)
    assert "rows" in centroids.state_dict()


@pytest.mark.parametrize("setting", ["blobs", "digits"])
def test_the_oracle_stays_as_it_was_and_the_teachers_training_is_billed_to_it(setting: str) -> None:
    problem, _ = track(setting)
    batch = next(problem.batches.stream(0))
    state = {n: v.clone() for n, v in problem.teacher.trainable_copy().state_dict().items()}
    before = problem.teacher.logits(batch).clone()
    _, after, run = distilled("mcmi", setting, teacher_share=0.5)
    assert all(torch.equal(v, after.teacher.trainable_copy().state_dict()[n]) for n, v in state.items())
    assert torch.equal(after.teacher.logits(batch), before)
    assert run.meter.counts["student_examples"] == 1280
    assert run.phases["teacher"]["teacher_examples"] >= 640
    assert run.phases["teacher"]["student_examples"] == 0


def test_fine_tuning_raises_the_information_that_refreshed_centroids_measure() -> None:
    problem, run = track()

    def information(weight: float) -> float:
        copy = problem.teacher.trainable_copy()
        rows = [(problem.teacher.logits(b), b.labels) for b in problem.one_pass()]
        q = class_centroids(*(torch.cat(x) for x in zip(*rows, strict=True)))

        def loss(batch):  # type: ignore[no-untyped-def]
            return run.loss(batch, mcmi=mcmi_loss(copy(batch.inputs), batch.labels, q, information_weight=weight))

        run.loop([Learner(copy, loss, counts="teacher_examples")], problem.batches, steps=40)
        other = problem.teacher.retaught(copy.eval())
        tuned = [(other.logits(b), b.labels) for b in problem.one_pass()]
        z, y = (torch.cat(x) for x in zip(*tuned, strict=True))
        return float(conditional_information(z, y, class_centroids(z, y)).mean())

    plain, spread, contracted = information(0.0), information(0.5), information(-0.5)
    assert spread > plain > contracted
