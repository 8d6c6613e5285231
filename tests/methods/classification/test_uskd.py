"""Proof of uskd: numpy oracle, the identities of Yang et al. 2023, and numbers of the authors' code."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import softmax

from distillbench.errors import UserError
from distillbench.methods.classification import uskd
from distillbench.methods.classification.uskd import non_target_loss, pooled, rank_score, target_loss, weak_loss, zipf
from distillbench.problems.classification.losses import cross_entropy
from tests.methods.classification.proof import assert_equals_oracle, differences, draw, golden, gradient, short_run, tensors
from tests.oracles.classification import uskd as oracle

ALL = ("student_logits", "auxiliary_logits", "labels")


@pytest.mark.parametrize("rank", ["paper", "released"])
def test_the_other_classes_equal_the_oracle(rank: str) -> None:
    assert_equals_oracle(non_target_loss, oracle.non_target_loss, "student_logits", ALL, rank=rank)


def test_the_weak_head_equals_the_oracle() -> None:
    assert_equals_oracle(weak_loss, oracle.weak_loss, "auxiliary_logits", ("auxiliary_logits", "labels"))


@pytest.mark.parametrize("seed", range(5))
def test_the_target_equals_the_oracle_with_its_weight_standing_still(seed: int) -> None:
    a = draw(seed, classes=3 + seed)
    x = tensors(a, "student_logits", "labels")
    np.testing.assert_allclose(target_loss(**x).numpy(), oracle.target_loss(a["student_logits"], a["labels"], held=a), rtol=1e-12)
    slope = differences(lambda z: oracle.target_loss(z, a["labels"], held=a), a["student_logits"])
    np.testing.assert_allclose(gradient(target_loss, x, "student_logits"), slope, atol=1e-8)


def test_numbers_of_the_authors_code() -> None:
    arrays, cases = golden("uskd")
    x = tensors(arrays, *ALL)

    def total(
        alpha: float, beta: float, mu: float, rank: str, student_logits: torch.Tensor, auxiliary_logits: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        terms = alpha * target_loss(student_logits, labels) + mu * weak_loss(auxiliary_logits, labels)
        return (terms + beta * non_target_loss(student_logits, auxiliary_logits, labels, rank=rank)).mean()

    for hp, value, gradients in cases:
        assert total(**hp, **x).item() == pytest.approx(value, rel=1e-12)
        for wrt in ("student_logits", "auxiliary_logits"):
            ours = gradient(lambda hp=hp, **k: total(**hp, **k), x, wrt)
            np.testing.assert_allclose(ours, gradients[wrt], rtol=1e-9, atol=1e-14)


def test_the_logarithm_of_the_papers_score_ranks_as_the_score_does() -> None:
    a = draw()
    ours = rank_score(**tensors(a, *ALL), rank="paper").exp().numpy()
    np.testing.assert_allclose(ours, oracle.rank_score(*(a[n] for n in ALL), rank="paper"), rtol=1e-12)


def test_the_released_score_ranks_otherwise() -> None:
    """Not a matter of taste: the two give different soft labels on ordinary draws."""
    x = tensors(draw(rows=50), *ALL)
    orders = [rank_score(**x, rank=r).argsort(1) for r in ("paper", "released")]
    assert (orders[0] != orders[1]).any(1).float().mean() > 0.2


def test_6_the_targets_weight_is_1_on_average_between_0_and_2_and_1_for_a_batch_of_one() -> None:
    a = draw(rows=50)
    weights = oracle.soft_target(a["student_logits"], a["labels"])
    assert weights.mean() == pytest.approx(1, abs=1e-14)
    assert ((weights > 0) & (weights < 2)).all()
    one = tensors(draw(rows=1), "student_logits", "labels")
    torch.testing.assert_close(target_loss(**one), cross_entropy(one["student_logits"], one["labels"]), rtol=1e-14, atol=0)


def test_7_zipf_weights_when_the_label_is_first() -> None:
    score = torch.arange(7.0, 0, -1, dtype=torch.float64)[None]
    found = zipf(score, torch.tensor([0]))[0]
    np.testing.assert_allclose(found[:3], [0.3139, 0.2093, 0.1570], atol=5e-5)


def test_8_they_sum_to_1_and_know_the_order_alone() -> None:
    x = tensors(draw(), *ALL)
    score = rank_score(**x, rank="paper")
    weights = zipf(score, x["labels"])
    torch.testing.assert_close(weights.sum(1), torch.ones(5, dtype=torch.float64))
    assert torch.equal(weights, zipf(torch.exp(score) * 3 - 1, x["labels"]))


def test_trap_the_label_takes_its_place_in_the_ranking_and_leaves_the_others_theirs() -> None:
    score = torch.arange(7.0, 0, -1, dtype=torch.float64)[None]
    found = zipf(score, torch.tensor([4]))[0]  # the label is fifth: 1, 1/2, 1/3, 1/4, 1/6, 1/7 remain
    np.testing.assert_allclose(found / found[0], [1, 1 / 2, 1 / 3, 1 / 4, 1 / 6, 1 / 7])


def test_two_classes_leave_nothing_to_say_about_the_other() -> None:
    x = tensors(draw(classes=2), *ALL)
    assert not non_target_loss(**x, rank="paper").any()


def test_trap_soft_labels_carry_no_gradient() -> None:
    x = tensors(draw(), *ALL)
    weak = x["auxiliary_logits"].requires_grad_(True)
    assert not non_target_loss(x["student_logits"], weak, x["labels"], rank="paper").requires_grad
    slope = gradient(
        lambda student_logits, labels: target_loss(student_logits, labels), tensors(draw(), "student_logits", "labels"), "student_logits"
    )
    a = draw()
    weights = oracle.soft_target(a["student_logits"], a["labels"])
    np.testing.assert_allclose(slope, weights[:, None] * (softmax(a["student_logits"], axis=1) - np.eye(7)[a["labels"]]), atol=1e-14)


@pytest.mark.parametrize("rank", ["paper", "released"])
def test_trap_extreme_logits_stay_finite(rank: str) -> None:
    s = torch.tensor([[1e4, -1e4, 0.0, 3.0]], requires_grad=True)
    label = torch.tensor([0])
    value = target_loss(s, label) + weak_loss(-s, label) + non_target_loss(s, -s, label, rank=rank)
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert torch.isfinite(s.grad).all()


def test_pooling_takes_the_stage_before_the_last() -> None:
    maps, last = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 2, 2)
    torch.testing.assert_close(pooled((maps, last)), maps.mean((2, 3)))
    assert pooled((torch.ones(2, 6), torch.ones(2, 7))).shape == (2, 6)
    with pytest.raises(UserError, match="second-to-last"):
        pooled((last,))


@pytest.mark.parametrize("setting", ["blobs", "digits"])
def test_no_teacher_is_asked_and_the_weak_head_stays_behind(setting: str) -> None:
    student, run, problem = short_run(uskd, setting, examples=320)
    assert run.meter.counts["teacher_examples"] == 0
    assert set(student.weights) == set(problem.student.state_dict())
    again, _, _ = short_run(uskd, setting, examples=320)
    assert all(torch.equal(v, again.weights[k]) for k, v in student.weights.items())


def test_9_without_weights_it_is_plain_training() -> None:
    from distillbench.methods.classification import scratch

    student, _, _ = short_run(uskd, alpha=0.0, beta=0.0, mu=0.0)
    plain, _, _ = short_run(scratch)
    for name, value in plain.weights.items():
        torch.testing.assert_close(student.weights[name], value, rtol=1e-4, atol=1e-6)


def test_the_weak_heads_gradient_reaches_the_student() -> None:
    lone, _, _ = short_run(uskd, alpha=0.0, beta=0.0, mu=1.0)
    plain, _, _ = short_run(uskd, alpha=0.0, beta=0.0, mu=0.0)
    assert not torch.equal(lone.weights["blocks.0.0.weight"], plain.weights["blocks.0.0.weight"])


def test_the_weak_head_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    original = uskd._weak_head

    def kept(*given: Any) -> torch.nn.Linear:
        head = original(*given)
        made.append((head, head.weight.detach().clone()))
        return head

    monkeypatch.setattr(uskd, "_weak_head", kept)
    short_run(uskd)
    [(head, before)] = made
    assert (head.weight.detach() - before).abs().max() > 1e-3
