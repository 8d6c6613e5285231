"""Proof of kd: numpy oracle, the identities of Hinton et al. 2015, and numbers of the authors' peers' code."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import expit, rel_entr, softmax

from distillbench.methods.classification import kd
from distillbench.problems.classification.losses import cross_entropy, kl_divergence, soft_cross_entropy
from tests.methods.classification.proof import assert_equals_oracle, draw, golden, gradient, short_run, tensors
from tests.oracles.classification import kd as oracle

PAIR = ("student_logits", "teacher_logits")


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_value_and_gradient_equal_the_oracle(temperature: float) -> None:
    assert_equals_oracle(kl_divergence, oracle.kl_divergence, "student_logits", PAIR, temperature=temperature)


def test_numbers_of_mdistiller() -> None:
    arrays, cases = golden("kd")
    x = tensors(arrays, *PAIR)
    for hp, value, gradients in cases:
        assert kl_divergence(**x, **hp).mean().item() == pytest.approx(value, rel=1e-12)
        ours = gradient(lambda hp=hp, **k: kl_divergence(**k, **hp).mean(), x, "student_logits")
        np.testing.assert_allclose(ours, gradients["student_logits"], rtol=1e-10, atol=1e-15)


def test_1_gradient_is_the_difference_of_the_softened_probabilities_times_t() -> None:
    a = draw()
    slope = gradient(lambda **k: kl_divergence(**k, temperature=3.0), tensors(a, *PAIR), "student_logits")
    np.testing.assert_allclose(slope, 3 * (softmax(a["student_logits"] / 3, axis=1) - softmax(a["teacher_logits"] / 3, axis=1)), atol=1e-14)


def test_2_zero_at_match_and_under_a_shift_of_each_row() -> None:
    teacher = tensors(draw())["teacher_logits"]
    shifted = teacher + torch.linspace(-5, 5, len(teacher), dtype=torch.float64)[:, None]
    assert kl_divergence(shifted, teacher, temperature=4.0).abs().max() < 1e-13
    slope = gradient(
        lambda **k: kl_divergence(**k, temperature=4.0), {"student_logits": shifted, "teacher_logits": teacher}, "student_logits"
    )
    assert np.abs(slope).max() < 1e-13


def test_3_at_high_temperature_it_is_half_the_mean_squared_distance_of_centred_logits() -> None:
    x = tensors(draw(), *PAIR)
    s, t = (z - z.mean(1, keepdim=True) for z in x.values())
    limit = ((s - t) ** 2).sum(1) / (2 * s.shape[1])
    for temperature in (1e3, 1e4):
        found = kl_divergence(**x, temperature=temperature)
        assert ((found - limit).abs() / limit).max() < 10 / temperature


def test_4_at_temperature_1_the_convex_sum_is_one_soft_target() -> None:
    x = tensors(draw())
    s, p, y = x["student_logits"], x["teacher_logits"].softmax(1), x["labels"]
    both = 0.3 * cross_entropy(s, y) + 0.7 * soft_cross_entropy(s, p)
    one = soft_cross_entropy(s, 0.3 * torch.nn.functional.one_hot(y, s.shape[1]).double() + 0.7 * p)
    torch.testing.assert_close(both, one, rtol=1e-14, atol=1e-14)


def test_5_weights_switch_terms_off() -> None:
    _, plain, _ = short_run(kd, ce_weight=1.0, kd_weight=0.0)
    assert plain.trace["fit/kd"] == [0.0] * len(plain.trace["fit/kd"])
    _, soft, _ = short_run(kd, ce_weight=0.0)
    assert soft.trace["fit/ce"] == [0.0] * len(soft.trace["fit/ce"])


def test_6_a_one_hot_teacher_gives_cross_entropy_and_a_uniform_one_label_smoothing() -> None:
    x = tensors(draw())
    s, y = x["student_logits"], x["labels"]
    sure = 1e3 * torch.nn.functional.one_hot(y, s.shape[1]).double()
    torch.testing.assert_close(kl_divergence(s, sure), cross_entropy(s, y))
    uniform = torch.zeros_like(s)
    torch.testing.assert_close(kl_divergence(s, uniform), soft_cross_entropy(s, uniform.softmax(1)) - np.log(s.shape[1]))


def test_7_it_sums_over_classes_and_reduces_nothing_else() -> None:
    x = tensors(draw(rows=3), *PAIR)
    value = kl_divergence(**x)
    assert value.shape == (3,)
    p_s, p_t = x["student_logits"].softmax(1), x["teacher_logits"].softmax(1)
    every_element = (p_t * (p_t / p_s).log()).mean()
    assert value.mean().item() == pytest.approx(x["student_logits"].shape[1] * every_element.item())


def test_8_two_classes_are_a_bernoulli_divergence() -> None:
    a = draw(classes=2)
    p_s, p_t = (expit((a[n][:, 1] - a[n][:, 0]) / 4) for n in PAIR)
    bernoulli = 16 * (rel_entr(p_t, p_s) + rel_entr(1 - p_t, 1 - p_s))
    np.testing.assert_allclose(kl_divergence(**tensors(a, *PAIR), temperature=4.0).numpy(), bernoulli, rtol=1e-10)


def test_trap_no_underflow_where_softmax_then_log_has_one() -> None:
    s = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    value = kl_divergence(s, -s.detach())
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert torch.isfinite(s.grad).all()
