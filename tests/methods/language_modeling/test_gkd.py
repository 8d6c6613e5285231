"""Proof of gkd: numpy oracle, the identities of Agarwal et al. 2023, and numbers of TRL's code."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import entr, softmax

from distillbench.methods.language_modeling import gkd
from distillbench.problems.language_modeling.oracle import LanguageOracle
from distillbench.problems.language_modeling.problem import Sampled
from tests.keyed import stream
from tests.methods.language_modeling.policy import by_logits, captured, logits, short_run
from tests.oracles.differences import gradient
from tests.oracles.language_modeling import gkd as oracle

BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)


def draw(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    return torch.tensor(2 * rng.standard_normal((5, 7))), torch.tensor(3 * rng.standard_normal((5, 7)))


def slope(student: torch.Tensor, teacher: torch.Tensor, mix: str = "js", **options: float) -> torch.Tensor:
    x = student.clone().requires_grad_(True)
    return torch.autograd.grad(by_logits(x, teacher, mix, **options).sum(), x)[0]


@pytest.mark.parametrize("beta", BETAS)
def test_value_and_gradient_equal_the_oracle(beta: float) -> None:
    s, t = draw()
    np.testing.assert_allclose(by_logits(s, t, "js", beta=beta), oracle.between(s.numpy(), t.numpy(), beta), rtol=1e-10)
    expected = gradient(lambda z: oracle.between(z, t.numpy(), beta), s.numpy())
    np.testing.assert_allclose(slope(s, t, beta=beta), expected, rtol=1e-6, atol=1e-8)


def test_numbers_of_trl() -> None:
    kept = json.loads((Path(__file__).parents[2] / "goldens" / "gkd.json").read_text())
    rng = np.random.default_rng(kept["inputs"]["seed"])
    shape, counts = tuple(kept["inputs"]["shape"]), np.array(kept["inputs"]["counts"])
    s, t = (torch.tensor((scale * rng.standard_normal(shape))[counts]) for scale in (2, 3))
    for case, value, gradients in zip(kept["cases"], kept["values"], kept["gradients"], strict=True):
        assert by_logits(s, t, "js", **case).mean().item() == pytest.approx(value, rel=1e-12)
        np.testing.assert_allclose(slope(s, t, **case) / len(s), gradients["student_logits"], rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("reduction", ["token", "sequence"])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_the_loss_of_the_method_on_its_own_text_equals_the_oracle(beta: float, reduction: str) -> None:
    problem, _, loss, batches = captured(gkd, on_policy=1.0, beta=beta, reduction=reduction)
    batch = next(stream(batches))
    s, t, rows = logits(problem, batch)
    assert len({int((rows == r).sum()) for r in rows}) > 1  # responses of unlike length, or the reductions are one
    assert loss(batch)["gkd"].item() == pytest.approx(oracle.reduced(oracle.between(s, t, beta), rows, reduction), rel=1e-5)


def test_1_a_divergence_symmetric_at_half_mirrored_in_beta_and_bounded_by_the_entropy_of_beta() -> None:
    s, t = draw()
    for beta in (0.1, 0.5, 0.9):
        value = by_logits(s, t, "js", beta=beta)
        assert by_logits(t, t, "js", beta=beta).abs().max() < 1e-12
        assert (value > 0).all()
        torch.testing.assert_close(value, by_logits(t, s, "js", beta=1 - beta))
        far = by_logits(50 * s, -50 * s, "js", beta=beta)
        assert (torch.cat([value, far]) <= float(entr(beta) + entr(1 - beta)) + 1e-12).all()
    assert by_logits(50 * s, -50 * s, "js", beta=0.5).max() == pytest.approx(math.log(2))


def test_2_divided_by_its_weight_it_tends_to_kl_forward_at_0_and_reverse_at_1() -> None:
    s, t = (x / 2 for x in draw())
    for beta, weight, name in ((1e-6, 1e-6, "forward_kl"), (1 - 1e-6, 1e-6, "reverse_kl")):
        torch.testing.assert_close(by_logits(s, t, "js", beta=beta) / weight, by_logits(s, t, name), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(slope(s, t, beta=beta) / weight, slope(s, t, name), rtol=1e-4, atol=1e-5)
    # At the ends themselves it is the divergence unscaled.
    assert torch.equal(by_logits(s, t, "js", beta=0.0), by_logits(s, t, "forward_kl"))
    assert torch.equal(by_logits(s, t, "js", beta=1.0), by_logits(s, t, "reverse_kl"))


def test_3_without_own_text_and_at_beta_0_it_is_word_level_distillation_minus_the_teachers_entropy() -> None:
    problem, _, loss, batches = captured(gkd, on_policy=0.0, beta=0.0)
    batch = next(stream(batches))
    s, t, _ = logits(problem, batch)
    p = softmax(t, axis=1)
    word = -(p * np.log(softmax(s, axis=1))).sum(1).mean()
    assert loss(batch)["gkd"].item() == pytest.approx(word - entr(p).sum(1).mean(), rel=1e-5)


def test_4_gradient_of_forward_kl_is_q_minus_p() -> None:
    s, t = draw()
    torch.testing.assert_close(slope(s, t, beta=0.0), s.softmax(1) - t.softmax(1))


def test_5_a_constant_in_either_logits_changes_nothing() -> None:
    s, t = draw()
    torch.testing.assert_close(by_logits(s + 3, t - 5, "js", beta=0.3), by_logits(s, t, "js", beta=0.3))


def _forbidden(*args: object, **kwargs: object) -> None:
    raise AssertionError("asked for text that this setting has no use for")


def test_5_lambda_0_lets_the_student_generate_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sampled, "responses", _forbidden)
    short_run(gkd, examples=64, on_policy=0.0)


def test_5_lambda_1_asks_for_no_text_of_the_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LanguageOracle, "responses", _forbidden)
    _, run, _ = short_run(gkd, examples=64, on_policy=1.0)
    assert 0 < run.meter.counts["student_tokens"] <= 64 * 16 and run.meter.counts["teacher_tokens"] == 0


def test_lambda_is_the_share_of_batches_that_are_own_text() -> None:
    _, _, _, batches = captured(gkd, on_policy=0.3)
    drawn = stream(batches)
    own = [next(drawn).text == "" for _ in range(150)]
    assert abs(np.mean(own) - 0.3) < 0.13  # 3.5 standard deviations


@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_6_a_batch_in_which_nothing_counts_is_0(reduction: str) -> None:
    _, _, loss, batches = captured(gkd, reduction=reduction)
    batch = next(stream(batches))
    empty = dataclasses.replace(batch, response=torch.zeros_like(batch.response))
    value = loss(empty)["gkd"]
    value.backward()
    assert value.item() == 0.0


def test_no_gradient_flows_through_the_sampling_or_to_the_teacher() -> None:
    problem, _, loss, batches = captured(gkd, on_policy=1.0)
    batch = next(stream(batches))
    assert not batch.ids.is_floating_point()
    loss(batch)["gkd"].backward()
    assert all(p.grad is None for p in problem.teacher.module.parameters())
    assert any(p.grad is not None for p in problem.student.parameters())


def test_training_comes_closer_to_the_teacher() -> None:
    _, run, _ = short_run(gkd, examples=3200)
    trace = run.trace["fit/gkd"]
    assert np.mean(trace[-5:]) < 0.8 * np.mean(trace[:3])
