"""LELP: the sheet's identities, each against an independent truth, and the exported student's marginal."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from distillbench.methods.classification.lelp import hidden_part, lelp_loss, project, subclass_directions, subclass_target
from distillbench.problems.classification.losses import kl_divergence, soft_cross_entropy
from distillbench.suites.image_classification.nets import rebuild
from tests.methods.classification.tracks import distilled
from tests.oracles.classification import lelp as oracle
from tests.oracles.differences import gradient

BATCH, CLASSES, GROUPS, WIDTH = 5, 3, 4, 11


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.tensor(np.random.default_rng(seed).standard_normal(shape))


def target(temperature: float = 2.0, beta: float = 0.7, groups: int = GROUPS) -> torch.Tensor:
    return subclass_target(3 * draw(BATCH, CLASSES), draw(BATCH, CLASSES, groups, seed=1), temperature=temperature, beta=beta)


def directions(hidden: torch.Tensor, labels: torch.Tensor, classes: int, count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return subclass_directions(hidden, labels, classes, count, torch.Generator().manual_seed(seed))


def test_value_and_gradient_against_the_oracle() -> None:
    t, u, s = 3 * draw(BATCH, CLASSES), draw(BATCH, CLASSES, GROUPS, seed=1), draw(BATCH, CLASSES * GROUPS, seed=2)
    joint = oracle.subclass_target(t.numpy(), u.numpy(), temperature=2.0, beta=0.7)
    np.testing.assert_allclose(subclass_target(t, u, temperature=2.0, beta=0.7), joint, rtol=1e-10)
    ours = s.clone().requires_grad_()
    loss = lelp_loss(ours, torch.tensor(joint))
    np.testing.assert_allclose(loss.detach(), oracle.lelp_loss(s.numpy(), joint), rtol=1e-10)
    loss.sum().backward()
    np.testing.assert_allclose(ours.grad, gradient(lambda x: oracle.lelp_loss(x, joint), s.numpy()), rtol=1e-6, atol=1e-9)
    w, e = draw(CLASSES, WIDTH), draw(BATCH, WIDTH, seed=3)
    np.testing.assert_allclose(hidden_part(e, w), oracle.hidden_part(e.numpy(), w.numpy()), rtol=1e-9, atol=1e-13)


def test_1_the_target_marginalises_to_the_teachers_softmax() -> None:
    classes = target().view(BATCH, CLASSES, GROUPS).sum(2)
    torch.testing.assert_close(classes, (3 * draw(BATCH, CLASSES) / 2.0).softmax(1), rtol=0, atol=1e-15)


def test_2_log_sum_exp_is_the_students_class_logit() -> None:
    s = draw(BATCH, CLASSES * GROUPS)
    inside = s.log_softmax(1).view(BATCH, CLASSES, GROUPS).logsumexp(2)
    outside = s.view(BATCH, CLASSES, GROUPS).logsumexp(2).log_softmax(1)
    torch.testing.assert_close(inside, outside, rtol=0, atol=1e-14)


def test_3_chain_rule_kd_plus_a_term_within_classes() -> None:
    s, joint = draw(BATCH, CLASSES * GROUPS), target()
    grouped, mass = s.view(BATCH, CLASSES, GROUPS), joint.view(BATCH, CLASSES, GROUPS)
    p = mass.sum(2)
    within = -(mass / p[:, :, None] * grouped.log_softmax(2)).sum(2)
    total = soft_cross_entropy(grouped.logsumexp(2), p) + (p * within).sum(1)
    torch.testing.assert_close(soft_cross_entropy(s, joint), total, rtol=1e-13, atol=0)


def test_4_one_subclass_is_vanilla_distillation() -> None:
    s, t = draw(BATCH, CLASSES), 3 * draw(BATCH, CLASSES)
    joint = subclass_target(t, draw(BATCH, CLASSES, 1, seed=1), temperature=1.0, beta=0.7)
    torch.testing.assert_close(lelp_loss(s, joint), kl_divergence(s, t), rtol=1e-12, atol=1e-14)


def test_5_and_6_limits_of_beta() -> None:
    u = draw(BATCH, CLASSES, GROUPS, seed=1)
    t = 3 * draw(BATCH, CLASSES)
    flat = subclass_target(t, u, temperature=1.0, beta=1e9).view(u.shape)
    torch.testing.assert_close(flat, t.softmax(1)[:, :, None].expand(u.shape) / GROUPS, rtol=1e-6, atol=0)
    s = t.repeat_interleave(GROUPS, dim=1).requires_grad_()  # equal subclass logits: the minimum of the uninformative target
    loss = lelp_loss(s, flat.flatten(1))
    loss.sum().backward()
    assert loss.abs().max() < 1e-8
    assert s.grad is not None
    assert s.grad.abs().max() < 1e-8
    hard = subclass_target(t, u, temperature=1.0, beta=1e-4).view(u.shape)
    expected = torch.nn.functional.one_hot(u.argmax(2), GROUPS) * t.softmax(1)[:, :, None]
    torch.testing.assert_close(hard, expected, rtol=0, atol=1e-12)


def test_7_and_8_the_hidden_part_shows_nothing_of_the_logits() -> None:
    w, e = draw(CLASSES, WIDTH), draw(BATCH, WIDTH, seed=3)
    hidden = hidden_part(e, w)
    assert (hidden @ w.T).abs().max() < 1e-12
    torch.testing.assert_close(hidden_part(e + draw(BATCH, CLASSES, seed=4) @ w, w), hidden, rtol=0, atol=1e-12)
    low_rank = torch.cat([w, w[:1]])  # a repeated row: the pseudo-inverse, not an inverse
    torch.testing.assert_close(hidden_part(e, low_rank), hidden, rtol=0, atol=1e-12)


def test_8_permuting_the_subclasses_with_the_students_outputs_changes_nothing() -> None:
    s, joint, order = draw(BATCH, CLASSES * GROUPS), target(), torch.tensor([2, 0, 3, 1])
    permuted = [x.view(BATCH, CLASSES, GROUPS)[:, :, order].flatten(1) for x in (s, joint)]
    torch.testing.assert_close(lelp_loss(*permuted), lelp_loss(s, joint), rtol=1e-13, atol=0)


def test_9_the_rotation_keeps_the_trace_and_evens_out_the_variance() -> None:
    stretched = draw(400, 6) * torch.tensor([5.0, 2.0, 1.0, 0.5, 0.1, 0.1])
    labels = torch.zeros(400, dtype=torch.int64)
    variances = []
    for seed in range(300):
        means, maps = directions(stretched, labels, 1, 3, seed)
        covariance = torch.cov(project(stretched, means, maps)[:, 0].T, correction=0)
        assert float(covariance.trace()) == pytest.approx(3, rel=1e-9)  # mean variance 1 per coordinate, whatever the rotation
        variances.append(covariance.diagonal())
    torch.testing.assert_close(torch.stack(variances).mean(0), torch.ones(3, dtype=torch.float64), rtol=0, atol=0.15)
    # Equal variances: the covariance is the identity for every rotation.
    left = torch.linalg.svd(stretched - stretched.mean(0), full_matrices=False).U
    for seed in range(5):
        means, maps = directions(left, labels, 1, 6, seed)
        covariance = torch.cov(project(left, means, maps)[:, 0].T, correction=0)
        torch.testing.assert_close(covariance, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-9)


def test_9_of_the_directions_the_target_shows_all_but_the_one_that_the_subclasses_share() -> None:
    hidden = draw(400, 6) * torch.tensor([5.0, 4.0, 3.0, 2.0, 0.1, 0.1])
    means, maps = directions(hidden, torch.zeros(400, dtype=torch.int64), 1, GROUPS)
    logits, x = draw(1, 1), hidden[:1]

    def shown(u: torch.Tensor) -> torch.Tensor:
        return subclass_target(logits, project(u, means, maps), temperature=1.0, beta=1.0)

    def slope(way: torch.Tensor) -> float:
        return float((shown(x + 1e-4 * way) - shown(x - 1e-4 * way)).norm() / 2e-4)

    assert torch.linalg.matrix_rank(maps[0]) == GROUPS
    back = torch.linalg.pinv(maps[0])  # (6, S): a step along a column moves one coordinate alone
    assert slope(back.sum(1)) < 1e-9 < 1e-2 < min(slope(back[:, k]) for k in range(GROUPS))
    jacobian = torch.stack([(shown(x + 1e-4 * w) - shown(x - 1e-4 * w))[0] / 2e-4 for w in back.T], 1)
    assert torch.linalg.matrix_rank(jacobian, rtol=1e-6) == GROUPS - 1


def test_10_two_clusters_behind_the_logits_become_the_subclasses() -> None:
    w = torch.zeros(1, 4, dtype=torch.float64)
    w[0, 0] = 2.0
    v = torch.tensor([0.0, 0.6, 0.8, 0.0], dtype=torch.float64)  # orthogonal to w
    side = torch.arange(200) % 2
    embedding = (2.0 * side - 1)[:, None] * 5 * v + 0.1 * draw(200, 4)
    embedding[:, 0] += 30 * draw(200, seed=9)  # large, and visible in the logits: must not be found
    hidden = hidden_part(embedding, w)
    means, maps = directions(hidden, torch.zeros(200, dtype=torch.int64), 1, 1)
    found = maps[0, 0] / maps[0, 0].norm()
    assert abs(float(found @ v)) > 0.999
    inner = project(hidden, means, torch.cat([maps, -maps], dim=1))
    hard = subclass_target(draw(200, 1), inner, temperature=1.0, beta=1e-3).argmax(1)
    assert bool((hard == side).all()) or bool((hard == 1 - side).all())


def test_few_examples_or_few_directions_leave_uniform_subclasses() -> None:
    hidden = draw(3, 2)
    means, maps = directions(hidden, torch.tensor([0, 0, 1]), 3, 4)
    inner = project(hidden, means, maps)
    assert torch.isfinite(inner).all()
    assert not maps[1:].any(), "one example or none: no direction"
    again = directions(hidden, torch.tensor([0, 0, 1]), 3, 4)
    assert torch.equal(again[1], maps), "the rotation is drawn from the generator alone"


@pytest.mark.parametrize("given", [{}, {"alpha": 0.5}, {"directions": "random"}])
def test_the_exported_student_gives_marginal_class_logits(given: dict[str, Any]) -> None:
    student, problem, run = distilled("lelp", subclasses=3, **given)
    net = rebuild(student)
    x = next(problem.batches.stream(0)).inputs
    with torch.no_grad():
        wide, narrow = net.body(x), net(x)
    assert wide.shape[1] == 3 * problem.classes
    torch.testing.assert_close(narrow.softmax(1), wide.softmax(1).view(len(x), problem.classes, 3).sum(2), rtol=0, atol=1e-6)
    assert all(math.isfinite(v) for trace in run.trace.values() for v in trace)
    assert ("fit/ce" in run.trace) == ("alpha" in given)
