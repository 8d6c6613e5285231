"""Proof of nkd: numpy oracle, the identities of Yang et al. 2023, and numbers of the authors' code."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import entr, softmax

from distillbench.methods.classification.dkd import dkd_loss
from distillbench.methods.classification.nkd import nkd_loss
from distillbench.problems.classification.losses import cross_entropy, soft_cross_entropy, without
from tests.methods.classification.proof import assert_equals_oracle, draw, golden, gradient, tensors
from tests.oracles.classification import nkd as oracle

NAMES = ("student_logits", "teacher_logits", "labels")


@pytest.mark.parametrize(("gamma", "temperature"), [(3.5, 3.0), (1.5, 1.0), (0.0, 1.0)])
def test_value_and_gradient_equal_the_oracle(gamma: float, temperature: float) -> None:
    assert_equals_oracle(nkd_loss, oracle.nkd_loss, "student_logits", NAMES, gamma=gamma, temperature=temperature)


def test_numbers_of_the_authors_code() -> None:
    arrays, cases = golden("nkd")
    x = tensors(arrays, *NAMES)
    for hp, value, gradients in cases:
        assert nkd_loss(**x, **hp).mean().item() == pytest.approx(value, rel=1e-12)
        ours = gradient(lambda hp=hp, **k: nkd_loss(**k, **hp).mean(), x, "student_logits")
        np.testing.assert_allclose(ours, gradients["student_logits"], rtol=1e-9, atol=1e-14)


def test_1_soft_cross_entropy_is_nkds_terms_and_the_one_it_drops() -> None:
    x = tensors(draw(), *NAMES)
    column = x["labels"][:, None]
    p_s, p_t = x["student_logits"].softmax(1), x["teacher_logits"].softmax(1)
    s_y, t_y = p_s.gather(1, column).squeeze(1), p_t.gather(1, column).squeeze(1)
    target = nkd_loss(**x, gamma=0.0, temperature=1.0)
    others = nkd_loss(**x, gamma=1.0, temperature=1.0) - target
    whole = target - (1 - t_y) * (1 - s_y).log() + (1 - t_y) * others
    torch.testing.assert_close(whole, soft_cross_entropy(x["student_logits"], p_t), rtol=1e-13, atol=1e-13)


def test_2_at_a_match_the_entropy_remains_and_without_it_the_term_is_dkds() -> None:
    a = draw()
    x = tensors(a, *NAMES)
    entropy = [entr(softmax(np.delete(t, y) / 3)).sum() for t, y in zip(a["teacher_logits"], a["labels"], strict=True)]
    bound = 2.0 * 9 * torch.tensor(np.array(entropy))

    def others(s: torch.Tensor) -> torch.Tensor:
        with_them, without_them = (nkd_loss(s, x["teacher_logits"], x["labels"], gamma=g, temperature=3.0) for g in (2.0, 0.0))
        return with_them - without_them

    torch.testing.assert_close(others(x["teacher_logits"]), bound)
    torch.testing.assert_close(others(x["student_logits"]) - bound, dkd_loss(**x, alpha=0.0, beta=2.0, temperature=3.0))


def test_3_gradients_in_the_target_logit() -> None:
    a = draw()
    x, rows = tensors(a, *NAMES), np.arange(5)
    target = gradient(lambda **k: nkd_loss(**k, gamma=0.0, temperature=3.0), x, "student_logits")
    t_y = softmax(a["teacher_logits"], axis=1)[rows, a["labels"]]
    np.testing.assert_allclose(target, t_y[:, None] * (softmax(a["student_logits"], axis=1) - np.eye(7)[a["labels"]]), atol=1e-14)
    both = gradient(lambda **k: nkd_loss(**k, gamma=2.0, temperature=3.0), x, "student_logits")
    assert np.array_equal(both[rows, a["labels"]], target[rows, a["labels"]])


def test_4_with_two_classes_only_the_target_is_left() -> None:
    x = tensors(draw(classes=2), *NAMES)
    assert torch.equal(nkd_loss(**x, gamma=3.5, temperature=3.0), nkd_loss(**x, gamma=0.0, temperature=3.0))


def test_5_a_sure_teacher_and_no_other_classes_are_cross_entropy() -> None:
    x = tensors(draw(), *NAMES)
    sure = 1e3 * torch.nn.functional.one_hot(x["labels"], 7).double()
    assert torch.equal(
        nkd_loss(x["student_logits"], sure, x["labels"], gamma=0.0, temperature=1.0), cross_entropy(x["student_logits"], x["labels"])
    )


def test_trap_the_temperature_is_on_the_other_classes_alone() -> None:
    x = tensors(draw(), *NAMES)
    assert torch.equal(nkd_loss(**x, gamma=0.0, temperature=1.0), nkd_loss(**x, gamma=0.0, temperature=9.0))


def test_trap_the_label_is_what_is_removed() -> None:
    """An early release of the authors had the mask inverted."""
    logits = torch.arange(6.0).view(2, 3)
    assert without(logits, torch.tensor([0, 2])).tolist() == [[1.0, 2.0], [3.0, 4.0]]


def test_trap_extreme_logits_stay_finite() -> None:
    s = torch.tensor([[1e4, -1e4, 0.0, 3.0]], requires_grad=True)
    value = nkd_loss(s, -s.detach(), torch.tensor([1]), gamma=3.5, temperature=3.0)
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert torch.isfinite(s.grad).all()
