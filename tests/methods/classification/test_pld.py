"""Proof of pld: numpy oracle and the identities of arXiv 2506.12542. The authors published no code to take numbers from."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.special import softmax

from distillbench.methods.classification.pld import pld_loss
from distillbench.problems.classification.losses import cross_entropy
from tests.methods.classification.proof import assert_equals_oracle, draw, gradient, tensors
from tests.oracles.classification import pld as oracle

NAMES = ("student_logits", "teacher_logits", "labels")
BIG = 1e3  # a logit that is a certainty at temperature 1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_value_and_gradient_equal_the_oracle(temperature: float) -> None:
    assert_equals_oracle(pld_loss, oracle.pld_loss, "student_logits", NAMES, temperature=temperature)


def test_the_choices_are_a_probability_over_rankings() -> None:
    """With equal weights exp(-C L) is the Plackett-Luce probability of pi; over all rankings it sums to 1."""
    student = torch.tensor(draw(classes=4)["student_logits"][:1])
    total = 0.0
    for ranking in itertools.permutations(range(4)):
        teacher = torch.zeros(1, 4, dtype=torch.float64)
        teacher[0, list(ranking)] = torch.tensor([3.0, 2.0, 1.0, 0.0], dtype=torch.float64)
        total += torch.exp(-4 * pld_loss(student, teacher, torch.tensor([ranking[0]]), temperature=1e9)).item()
    assert total == pytest.approx(1, abs=1e-7)


def test_1_a_teacher_sure_of_the_label_gives_cross_entropy() -> None:
    x = tensors(draw(), *NAMES)
    sure = BIG * torch.nn.functional.one_hot(x["labels"], 7).double()
    torch.testing.assert_close(
        pld_loss(x["student_logits"], sure, x["labels"], temperature=1.0), cross_entropy(x["student_logits"], x["labels"])
    )


def test_2_the_label_counts_as_much_as_the_teacher_believes_it() -> None:
    x = tensors(draw(), *NAMES)
    wrong = BIG * torch.nn.functional.one_hot((x["labels"] + 1) % 7, 7).double()
    slope = gradient(lambda **k: pld_loss(**k, temperature=1.0), {**x, "teacher_logits": wrong}, "student_logits")
    assert not slope[np.arange(5), x["labels"]].any()  # sure of another class: no pressure on the label at all


def test_3_with_two_classes_it_is_weighted_cross_entropy() -> None:
    x = tensors(draw(classes=2), *NAMES)
    believed = (x["teacher_logits"] / 4).softmax(1).gather(1, x["labels"][:, None]).squeeze(1)
    torch.testing.assert_close(pld_loss(**x, temperature=4.0), believed * cross_entropy(x["student_logits"], x["labels"]))


def test_4_shifts_change_nothing_and_scaling_the_student_does() -> None:
    x = tensors(draw(), *NAMES)
    value = pld_loss(**x, temperature=1.0)
    torch.testing.assert_close(pld_loss(x["student_logits"] + 3, x["teacher_logits"] - 7, x["labels"], temperature=1.0), value)
    assert (pld_loss(2 * x["student_logits"], x["teacher_logits"], x["labels"], temperature=1.0) - value).abs().min() > 1e-3


def test_5_an_undecided_student_pays_the_logarithm_of_what_is_left() -> None:
    a = draw()
    x = {**tensors(a, *NAMES), "student_logits": torch.zeros(5, 7, dtype=torch.float64)}
    for row, value in enumerate(pld_loss(**x, temperature=1.0).tolist()):
        t, y = a["teacher_logits"][row], a["labels"][row]
        order = [y, *(c for c in np.argsort(-t) if c != y)]
        assert value == pytest.approx((softmax(t)[order] * np.log(np.arange(7, 0, -1))).sum(), rel=1e-13)


def test_6_gradient_in_closed_form_and_its_sum() -> None:
    a = draw()
    slope = gradient(lambda **k: pld_loss(**k, temperature=2.0), tensors(a, *NAMES), "student_logits")
    np.testing.assert_allclose(slope.sum(1), 0, atol=1e-14)
    for row in range(5):
        s, t, y = a["student_logits"][row], a["teacher_logits"][row], a["labels"][row]
        order = [y, *(c for c in np.argsort(-t) if c != y)]
        weight, ranked = softmax(t / 2)[order], np.exp(s[order])
        for j in range(7):
            pulled = sum(weight[k] * ranked[j] / ranked[k:].sum() for k in range(j + 1))
            assert slope[row, order[j]] == pytest.approx(pulled - weight[j], abs=1e-13)


def test_7_convex_in_the_student() -> None:
    x = tensors(draw(rows=1), *NAMES)

    def value(s: torch.Tensor) -> torch.Tensor:
        return pld_loss(s[None], x["teacher_logits"], x["labels"], temperature=2.0).sum()

    curvature = torch.autograd.functional.hessian(value, x["student_logits"][0])
    eigenvalues = torch.linalg.eigvalsh(curvature)
    assert eigenvalues[0].abs() < 1e-14  # along the vector of ones
    assert (eigenvalues[1:] > 0).all()


def test_8_uniform_weights_are_list_mle_over_the_number_of_classes() -> None:
    a = draw()
    for row, value in enumerate(pld_loss(**tensors(a, *NAMES), temperature=1e12).tolist()):
        s, t, y = a["student_logits"][row], a["teacher_logits"][row], a["labels"][row]
        order = [y, *(c for c in np.argsort(-t) if c != y)]
        likelihood = np.prod([np.exp(s[order[k]]) / np.exp(s[order[k:]]).sum() for k in range(7)])
        assert value == pytest.approx(-np.log(likelihood) / 7, rel=1e-9)


def test_9_the_teacher_is_not_its_minimiser() -> None:
    x = tensors(draw(), *NAMES)
    at_match = {**x, "student_logits": x["teacher_logits"]}
    assert np.abs(gradient(lambda **k: pld_loss(**k, temperature=1.0), at_match, "student_logits")).max() > 1e-2
    order = x["teacher_logits"].scatter(1, x["labels"][:, None], torch.inf).argsort(1, descending=True)
    apart = torch.zeros(5, 7, dtype=torch.float64).scatter(1, order, torch.arange(700.0, 0, -100, dtype=torch.float64).expand(5, 7))
    assert pld_loss(apart, x["teacher_logits"], x["labels"], temperature=1.0).max() < 1e-40


def test_10_equal_teacher_logits_keep_the_order_of_their_classes() -> None:
    student = torch.tensor([[0.0, 1.0, 2.0, 3.0]], dtype=torch.float64)
    tied = torch.tensor([[5.0, 1.0, 1.0, 0.0]], dtype=torch.float64)
    hinted = tied + torch.tensor([[0.0, 1e-12, 0.0, 0.0]], dtype=torch.float64)
    label = torch.tensor([0])
    torch.testing.assert_close(pld_loss(student, tied, label, temperature=1.0), pld_loss(student, hinted, label, temperature=1.0))


def test_trap_many_ties_are_sorted_alike_everywhere() -> None:
    classes = 1000
    student = torch.tensor(draw(rows=1, classes=classes)["student_logits"])
    falling = -1e-13 * torch.arange(classes, dtype=torch.float64)[None]
    label = torch.tensor([500])
    tied = pld_loss(student, torch.zeros_like(falling), label, temperature=1.0)
    torch.testing.assert_close(tied, pld_loss(student, falling, label, temperature=1.0), rtol=1e-9, atol=0)


def test_trap_temperature_is_not_on_the_student() -> None:
    x = tensors(draw(), *NAMES)
    cooler = {**x, "teacher_logits": 3 * x["teacher_logits"]}  # the same order, and the same weights at three times the temperature
    torch.testing.assert_close(pld_loss(**cooler, temperature=3.0), pld_loss(**x, temperature=1.0))


def test_trap_extreme_logits_stay_finite() -> None:
    s = torch.tensor([[1e4, -1e4, 0.0, 3.0]], requires_grad=True)
    value = pld_loss(s, -s.detach(), torch.tensor([1]), temperature=1.0)
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert torch.isfinite(s.grad).all()
