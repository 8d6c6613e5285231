"""Proof of distillspec: numpy oracle, whose text is trained on, and the identities of Zhou et al. 2023."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distillbench.methods.language_modeling import distillspec, gkd, undistilled
from distillbench.problems.language_modeling.oracle import LanguageOracle
from distillbench.problems.language_modeling.problem import Sampled
from distillbench.runs.suite import JudgeContext
from distillbench.suites import language_modeling
from tests.keyed import stream
from tests.methods.language_modeling.policy import MARKOV, by_logits, captured, logits, short_run
from tests.oracles.differences import gradient
from tests.oracles.language_modeling import distillspec as oracle

DIVERGENCES = ("forward_kl", "reverse_kl", "js", "tv")
HEAVY = ((0.9, 0.1), (0.1, 0.9))  # the target's distributions in two contexts


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_value_and_gradient_equal_the_oracle(divergence: str) -> None:
    rng = np.random.default_rng(0)
    s, t = 2 * rng.standard_normal((5, 7)), 3 * rng.standard_normal((5, 7))
    x = torch.tensor(s, requires_grad=True)
    value = by_logits(x, torch.tensor(t), divergence)
    np.testing.assert_allclose(value.detach(), oracle.between(s, t, divergence), rtol=1e-10)
    found = torch.autograd.grad(value.sum(), x)[0]
    np.testing.assert_allclose(found, gradient(lambda z: oracle.between(z, t, divergence), s), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_loss_of_the_method_equals_the_oracle_in_both_reductions(divergence: str) -> None:
    for reduction in ("token", "sequence"):
        problem, _, loss, batches = captured(distillspec, divergence=divergence, reduction=reduction)
        batch = next(stream(batches))
        s, t, rows = logits(problem, batch)
        values = oracle.between(s, t, divergence)
        expected = values.mean() if reduction == "token" else np.mean([values[rows == r].mean() for r in np.unique(rows)])
        assert loss(batch)["distillspec"].item() == pytest.approx(expected, rel=1e-5)


def test_whose_text_each_policy_trains_on(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, _, _, batches = captured(distillspec, data="references")
    assert next(stream(batches)).text == problem.references.digest
    problem, _, _, batches = captured(distillspec, data="teacher")
    assert next(stream(batches)).text == problem.teacher_text().texts.digest
    _, _, _, batches = captured(distillspec, data="mixed")
    drawn = stream(batches)
    assert {next(drawn).text == "" for _ in range(12)} == {True, False}

    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("asked for text that this policy has no use for")

    with monkeypatch.context() as m:
        m.setattr(Sampled, "responses", forbidden)
        for data in ("references", "teacher"):
            short_run(distillspec, examples=32, data=data, fine_tuning=0.0)
    monkeypatch.setattr(LanguageOracle, "responses", forbidden)
    for data in ("references", "student"):
        short_run(distillspec, examples=32, data=data, fine_tuning=0.0)


def test_on_own_text_with_js_it_is_gkd_on_its_own_text() -> None:
    ours, theirs = short_run(distillspec, data="student", divergence="js", fine_tuning=0.0), short_run(gkd, on_policy=1.0)
    assert all(torch.equal(weight, theirs[0].weights[name]) for name, weight in ours[0].weights.items())


def test_the_draft_is_fine_tuned_on_the_references_first() -> None:
    _, run, _ = short_run(distillspec, fine_tuning=0.5)
    cost = run.cost()["phases"]
    assert cost["fine-tuning"]["student_examples"] == cost["fit"]["student_examples"] == 160
    assert cost["fine-tuning"]["teacher_examples"] == 0


def two_contexts(divergence: str, weights: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Weighted divergence over a grid of drafts that say q = (x, 1 - x) in both contexts."""
    x = np.linspace(0.01, 0.99, 99)
    draft = torch.tensor(np.log(np.stack([x, 1 - x], 1)))
    values = [by_logits(draft, torch.tensor(np.log([p] * len(x))), divergence).numpy() for p in HEAVY]
    return x, weights[0] * values[0] + weights[1] * values[1]


def test_3_a_draft_that_cannot_match_is_best_accepted_where_tvd_is_least_and_not_where_kl_is() -> None:
    x, tv = two_contexts("tv", (0.7, 0.3))
    _, kl = two_contexts("forward_kl", (0.7, 0.3))
    accepted = sum(w * (np.minimum(p[0], x) + np.minimum(p[1], 1 - x)) for w, p in zip((0.7, 0.3), HEAVY, strict=True))
    np.testing.assert_allclose(tv, 1 - accepted, atol=1e-12)
    assert x[tv.argmin()] == pytest.approx(0.9)  # the weighted median of 0.9 and 0.1
    assert x[kl.argmin()] == pytest.approx(0.66)  # their mean
    assert accepted.argmax() == tv.argmin()
    assert accepted[kl.argmin()] < accepted.max() - 0.05


def test_3_with_equal_weights_tvd_cannot_choose_between_the_contexts() -> None:
    x, tv = two_contexts("tv", (0.5, 0.5))
    between = (x >= 0.1 - 1e-9) & (x <= 0.9 + 1e-9)
    np.testing.assert_allclose(tv[between], tv.min(), atol=1e-12)
    assert (tv[~between] > tv.min() + 1e-3).all()
    _, kl = two_contexts("forward_kl", (0.5, 0.5))
    assert x[kl.argmin()] == pytest.approx(0.5)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_1_rejection_is_at_most_the_root_of_half_of_either_kl(divergence: str) -> None:
    rng = np.random.default_rng(1)
    for scale in (1e-3, 0.3, 3.0):
        s, t = (torch.tensor(scale * rng.standard_normal((200, 6))) for _ in range(2))
        assert (by_logits(s, t, "tv") <= (by_logits(s, t, divergence) / 2).sqrt() + 1e-12).all()


def test_1_at_match_every_divergence_is_0_and_everything_is_accepted() -> None:
    t = torch.tensor(np.random.default_rng(2).standard_normal((4, 6)))
    for divergence in DIVERGENCES:
        assert by_logits(t + 1, t, divergence).abs().max() < 1e-12


def test_5_greedy_decoding_asks_whether_the_two_agree_on_the_first_token() -> None:
    """Sharpened to temperature 0, 1 - TVD is 1 where the most probable tokens agree and 0 elsewhere."""
    rng = np.random.default_rng(3)
    s, t = (torch.tensor(rng.standard_normal((300, 3))) for _ in range(2))
    clear = (s.topk(2).values.diff().abs().squeeze(1) > 1e-2) & (t.topk(2).values.diff().abs().squeeze(1) > 1e-2)
    accepted = 1 - by_logits(5000 * s, 5000 * t, "tv")
    agree = (s.argmax(1) == t.argmax(1)).double()
    torch.testing.assert_close(accepted[clear], agree[clear], atol=1e-9, rtol=0)
    assert 0.2 < agree.mean() < 0.8


def test_training_raises_the_acceptance_of_the_draft() -> None:
    def acceptance(method: object, **hp: object) -> float:
        student, run, _ = short_run(method, examples=3200, **hp)  # type: ignore[arg-type]
        scores = language_modeling.SUITE.evaluate(student, JudgeContext("markov", MARKOV, run.seeds, split="tune")).measurements
        return next(m.value for m in scores if m.metric == "acceptance")

    assert acceptance(distillspec) > acceptance(undistilled) + 0.05
