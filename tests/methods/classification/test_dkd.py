"""Proof of dkd: numpy oracle, the identities of Zhao et al. 2022, and numbers of the authors' code."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import softmax

from distillbench.methods.classification import dkd
from distillbench.methods.classification.dkd import dkd_loss, ramp
from distillbench.problems.classification.losses import kl_divergence
from tests.methods.classification.proof import assert_equals_oracle, draw, golden, gradient, short_run, tensors
from tests.oracles.classification import dkd as oracle

NAMES = ("student_logits", "teacher_logits", "labels")


@pytest.mark.parametrize(("alpha", "beta", "temperature"), [(1.0, 8.0, 4.0), (1.0, 0.5, 1.0), (1.0, 0.0, 2.0), (0.0, 1.0, 0.7)])
def test_value_and_gradient_equal_the_oracle(alpha: float, beta: float, temperature: float) -> None:
    assert_equals_oracle(dkd_loss, oracle.dkd_loss, "student_logits", NAMES, alpha=alpha, beta=beta, temperature=temperature)


def test_numbers_of_the_authors_code() -> None:
    arrays, cases = golden("dkd")
    x = tensors(arrays, *NAMES)
    for hp, value, gradients in cases:
        assert dkd_loss(**x, **hp).mean().item() == pytest.approx(value, rel=1e-12)
        ours = gradient(lambda hp=hp, **k: dkd_loss(**k, **hp).mean(), x, "student_logits")
        np.testing.assert_allclose(ours, gradients["student_logits"], rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_1_and_6_kd_is_the_target_part_plus_the_rest_weighted_by_the_teachers_doubt(temperature: float) -> None:
    x = tensors(draw(), *NAMES)
    doubt = 1 - (x["teacher_logits"] / temperature).softmax(1).gather(1, x["labels"][:, None]).squeeze(1)
    target = dkd_loss(**x, alpha=1.0, beta=0.0, temperature=temperature)
    others = dkd_loss(**x, alpha=0.0, beta=1.0, temperature=temperature)
    kd = kl_divergence(x["student_logits"], x["teacher_logits"], temperature=temperature)
    torch.testing.assert_close(target + doubt * others, kd, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("which", ["student_logits", "teacher_logits"])
def test_2_the_rest_does_not_see_the_target_logit(which: str) -> None:
    x = tensors(draw(), *NAMES)
    moved = x[which].scatter_add(1, x["labels"][:, None], torch.full((5, 1), 3.0, dtype=torch.float64))
    hp = {"alpha": 0.0, "beta": 1.0, "temperature": 2.0}
    assert torch.equal(dkd_loss(**x, **hp), dkd_loss(**{**x, which: moved}, **hp))


def test_3_removal_is_what_subtracting_1000_stands_for_and_holds_where_that_breaks() -> None:
    x = tensors(draw(), *NAMES)
    mask = torch.nn.functional.one_hot(x["labels"], 7)
    hp = {"alpha": 0.0, "beta": 1.0, "temperature": 1.0}
    masked = kl_divergence(x["student_logits"] - 1000 * mask, x["teacher_logits"] - 1000 * mask)
    torch.testing.assert_close(dkd_loss(**x, **hp), masked, rtol=1e-12, atol=1e-14)
    # A target 5000 above the rest: subtracting 1000 leaves it on top, removing it leaves the others' own divergence.
    far = {**x, "student_logits": x["student_logits"] + 5000 * mask, "teacher_logits": x["teacher_logits"] + 5000 * mask}
    torch.testing.assert_close(dkd_loss(**far, **hp), dkd_loss(**x, **hp), rtol=1e-12, atol=1e-14)
    assert kl_divergence(far["student_logits"] - 1000 * mask, far["teacher_logits"] - 1000 * mask).abs().max() < 1e-12


def test_4_with_two_classes_only_the_target_part_is_left() -> None:
    x = tensors(draw(classes=2), *NAMES)
    rest = {"alpha": 0.0, "beta": 1.0, "temperature": 4.0}
    assert torch.equal(dkd_loss(**x, **rest), torch.zeros(5, dtype=torch.float64))
    assert not gradient(lambda **k: dkd_loss(**k, **rest), x, "student_logits").any()
    binary = kl_divergence(x["student_logits"], x["teacher_logits"], temperature=4.0)
    torch.testing.assert_close(dkd_loss(**x, alpha=1.0, beta=8.0, temperature=4.0), binary)


def test_5_zero_at_match_and_under_a_shift_of_each_row() -> None:
    x = tensors(draw(), *NAMES)
    shift = torch.linspace(-5, 5, 5, dtype=torch.float64)[:, None]
    hp = {"alpha": 1.0, "beta": 8.0, "temperature": 4.0}
    assert dkd_loss(x["teacher_logits"] + shift, x["teacher_logits"], x["labels"], **hp).abs().max() < 1e-12
    torch.testing.assert_close(dkd_loss(x["student_logits"] + shift, x["teacher_logits"] - shift, x["labels"], **hp), dkd_loss(**x, **hp))


def test_7_gradient_of_the_target_part_in_the_target_logit() -> None:
    a = draw()
    slope = gradient(lambda **k: dkd_loss(**k, alpha=1.0, beta=0.0, temperature=3.0), tensors(a, *NAMES), "student_logits")
    rows = np.arange(5)
    p_s, p_t = softmax(a["student_logits"] / 3, axis=1)[rows, a["labels"]], softmax(a["teacher_logits"] / 3, axis=1)[rows, a["labels"]]
    np.testing.assert_allclose(slope[rows, a["labels"]], 3 * (p_s - p_t), atol=1e-13)


@pytest.mark.parametrize("scale", [1.0, -1.0])
def test_trap_finite_where_the_rest_underflows(scale: float) -> None:
    s = torch.tensor([[1e4, 0.0, -1e4]]) * scale
    s.requires_grad_(True)
    value = dkd_loss(s, -s.detach(), torch.tensor([0]), alpha=1.0, beta=8.0, temperature=1.0)
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert torch.isfinite(s.grad).all()


def test_warm_up_rises_once_and_stays() -> None:
    assert [ramp(p, 0.25) for p in (0.0, 0.125, 0.25, 0.9)] == [0.0, 0.5, 1.0, 1.0]
    assert ramp(0.0, 0.0) == 1.0


def test_warm_up_multiplies_the_decoupled_term_alone_and_follows_the_run() -> None:
    _, late, _ = short_run(dkd, warmup=0.5)
    _, none, _ = short_run(dkd, warmup=0.0)
    assert late.trace["fit/ce"][0] == none.trace["fit/ce"][0]
    assert late.trace["fit/dkd"][0] == 0.0 < none.trace["fit/dkd"][0]
    assert all(value > 0 for value in late.trace["fit/dkd"][1:])
