"""Proof of first: numpy oracle, the identities of Shum et al. 2024, numbers of the authors' code, and the whole method."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from distillbench.errors import UserError
from distillbench.methods.language_modeling.first import (
    TEMPERATURES,
    best_temperature,
    calibration_error,
    confidence,
    first_loss,
    recalibrated,
    teacher_top,
)
from distillbench.problems.language_modeling.oracle import real_logits, top_log_probs
from distillbench.problems.language_modeling.problem import LanguageModeling
from distillbench.problems.language_modeling.texts import Texts
from distillbench.problems.language_modeling.token_losses import TopK
from tests.methods.language_modeling.short import distilled, score, track
from tests.oracles.differences import gradient
from tests.oracles.language_modeling import first as oracle

GOLDEN = json.loads((Path(__file__).parents[2] / "goldens" / "first.json").read_text())


def tops(seed: int, n: int = 6, k: int = 5, v: int = 9) -> tuple[np.ndarray, np.ndarray]:
    """Student and teacher probabilities of the teacher's k best of v tokens."""
    rng = np.random.default_rng(seed)
    q, p = (torch.tensor(2 * rng.standard_normal((n, v))).softmax(1) for _ in range(2))
    best = p.topk(k)
    return q.gather(1, best.indices).numpy(), best.values.numpy()


@pytest.mark.parametrize("normaliser", ["linear", "softmax"])
@pytest.mark.parametrize("other", [False, True])
def test_value_and_gradient_equal_the_oracle(normaliser: str, other: bool) -> None:
    q, p = tops(0)
    x = torch.tensor(q, requires_grad=True)
    values = first_loss(x, torch.tensor(p), normaliser=normaliser, other=other)
    values.sum().backward()
    np.testing.assert_allclose(values.detach().numpy(), oracle.first_loss(q, p, normaliser=normaliser, other=other), rtol=1e-9)
    slope = gradient(lambda q: oracle.first_loss(q, p, normaliser=normaliser, other=other), q, step=1e-6)
    assert x.grad is not None
    np.testing.assert_allclose(x.grad.numpy(), slope, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("normaliser", ["linear", "softmax"])
def test_numbers_of_the_authors_code(normaliser: str) -> None:
    inputs = {k: torch.tensor(v) for k, v in GOLDEN["inputs"].items()}
    z = inputs["student_logits"].double().requires_grad_()
    counts = inputs["mask"] == 1
    q = z.softmax(-1).gather(-1, inputs["ids"])[counts]
    loss = first_loss(q, inputs["teacher_top"].double()[counts], normaliser=normaliser, other=False).sum() / 2  # their batch size
    loss.backward()
    assert loss.item() == pytest.approx(GOLDEN["values"][normaliser], rel=1e-5)
    assert z.grad is not None
    np.testing.assert_allclose(z.grad.numpy(), np.array(GOLDEN["gradients"][normaliser]), rtol=1e-3, atol=1e-6)


# --- the identities of the sheet ---


@pytest.mark.parametrize("other", [False, True])
def test_1_with_the_whole_vocabulary_it_is_forward_kl(other: bool) -> None:
    q, p = (torch.tensor(x) for x in tops(1, k=9))
    kl = (p * (p / q).log()).sum(1)
    torch.testing.assert_close(first_loss(q, p, normaliser="linear", other=other), kl, rtol=1e-3, atol=1e-4)  # but for epsilon


def test_2_what_counts_is_the_proportion_under_linear_and_the_difference_under_softmax() -> None:
    _, p = (torch.tensor(x) for x in tops(2))
    assert first_loss(0.3 * p, p, normaliser="linear", other=False).abs().max() < 1e-4
    assert first_loss(p - 0.01, p, normaliser="softmax", other=False).abs().max() < 1e-12
    assert first_loss(0.3 * p, p, normaliser="softmax", other=False).min() > 1e-5
    assert first_loss(0.3 * p, p, normaliser="linear", other=True).min() > 1e-2  # where the rest is an outcome, it is not free


def test_3_a_softmax_of_probabilities_levels_at_1_and_sharpens_below() -> None:
    p = torch.tensor([[0.9, 0.05, 0.03, 0.01, 0.01]], dtype=torch.float64)
    for c, expected in ((1.0, [0.375, 0.160, 0.157, 0.154, 0.154]), (0.2, [0.952, 0.014, 0.012, 0.011, 0.011])):
        found = recalibrated(p, how="temperature", temperature=c, smoothing=0.0, other=False)
        np.testing.assert_allclose(found[0].numpy(), expected, atol=7e-4)


def test_4_with_the_others_as_an_outcome_it_is_below_the_full_kl() -> None:
    rng = np.random.default_rng(3)
    q, p = (torch.tensor(2 * rng.standard_normal((40, 9))).softmax(1) for _ in range(2))
    best = p.topk(5)
    lumped = first_loss(q.gather(1, best.indices), best.values, normaliser="linear", other=True)
    assert (lumped <= (p * (p / q).log()).sum(1) + 1e-6).all() and (lumped >= -1e-9).all()


def test_5_the_calibration_error_equals_the_oracle_and_finds_the_right_temperature() -> None:
    rng = np.random.default_rng(4)
    p = torch.tensor(rng.dirichlet(np.ones(6), 4000)).sort(1, descending=True).values[:, :5]  # a sixth outcome is the rest
    for other in (False, True):
        for c in (0.1, 0.5):
            taught = recalibrated(p, how="temperature", temperature=c, smoothing=0.0, other=other)
            right = torch.tensor(rng.uniform(size=4000)) < confidence(taught, other=other)  # right as often as that confidence says
            for one in (p[:, 0], confidence(taught, other=other)):
                ours = calibration_error(one, right)
                assert ours == pytest.approx(oracle.calibration_error(one.numpy(), right.numpy()), abs=1e-9)
            found = best_temperature(p, right, other=other)
            assert found is not None and abs(found - c) < 0.11 and c in TEMPERATURES
            few, came = p[:200], right[:200]
            theirs = oracle.best_temperature(few.numpy(), came.numpy(), TEMPERATURES, other=other)
            assert best_temperature(few, came, other=other) == theirs
    # Knows and always knows: no error. Certain and always wrong: all of it.
    assert calibration_error(torch.ones(3), torch.tensor([True] * 3)) == 0 and calibration_error(torch.ones(3), torch.zeros(3).bool()) == 1


@pytest.mark.parametrize("other", [False, True])
@pytest.mark.parametrize("c", [None, 0.05, 0.3, 2.0])
def test_what_is_taught_equals_the_oracle(other: bool, c: float | None) -> None:
    _, p = tops(6)
    ours = recalibrated(torch.tensor(p), how="temperature", temperature=c, smoothing=0.0, other=other)
    whole = torch.cat([ours, 1 - ours.sum(1, keepdim=True)], 1) if other else ours / ours.sum(1, keepdim=True)
    np.testing.assert_allclose(whole.numpy(), oracle.taught(p, c, other=other), rtol=1e-10)
    np.testing.assert_allclose(confidence(ours, other=other).numpy(), oracle.taught(p, c, other=other)[:, 0], rtol=1e-10)


@pytest.mark.parametrize("how", ["temperature", "smoothing", "none"])
def test_recalibration_keeps_the_mass_where_the_rest_is_an_outcome(how: str) -> None:
    _, p = (torch.tensor(x) for x in tops(5))
    p = 0.5 * p + torch.tensor([0.25, 0.1, 0.05, 0.0, 0.0])  # none so small at the top that smoothing would make it negative
    found = recalibrated(p, how=how, temperature=0.3, smoothing=0.1, other=True)
    torch.testing.assert_close(found.sum(1), p.sum(1))
    if how == "smoothing":
        torch.testing.assert_close((found - p)[0], torch.tensor([-0.1] + [0.025] * 4, dtype=torch.float64))


def known(problem: LanguageModeling, texts: Texts) -> tuple[torch.Tensor, torch.Tensor]:
    """The teacher's five best probabilities at every token of ``texts``, and whether its best one is the token that came."""
    batch = texts.take(torch.arange(len(texts)))
    ids, p = teacher_top(problem, batch, 5)
    return p, ids[:, 0] == batch.predicted.labels


@pytest.mark.parametrize("seed", range(5))
def test_what_is_taught_is_as_well_calibrated_as_the_teacher(seed: int) -> None:
    problem, _ = track(seed=seed)
    p, right = known(problem, problem.validation)
    unseen, came = known(problem, problem.references)  # other texts of the same truth: c was not chosen on them
    c = best_temperature(p, right, other=True)
    for found, truth in ((p, right), (unseen, came)):
        taught = recalibrated(found, how="temperature", temperature=c, smoothing=0.1, other=True)
        assert calibration_error(confidence(taught, other=True), truth) <= calibration_error(found[:, 0], truth)


@pytest.mark.parametrize("seed", range(5))
def test_a_teacher_that_is_too_sure_of_itself_is_mended_on_texts_that_were_not_seen(seed: int) -> None:
    problem, _ = track(seed=seed)
    pairs = []
    for texts in (problem.validation, problem.references):
        p, right = known(problem, texts)
        sure = p.pow(4) / (p.pow(4).sum(1, keepdim=True) + (1 - p.sum(1, keepdim=True)).pow(4))
        pairs.append((sure, right))
    (p, right), (unseen, came) = pairs
    c = best_temperature(p, right, other=True)
    assert c is not None
    taught = recalibrated(unseen, how="temperature", temperature=c, smoothing=0.1, other=True)
    assert calibration_error(confidence(taught, other=True), came) < 0.5 * calibration_error(unseen[:, 0], came)


def test_trap_tokens_outside_the_top_k_get_no_gradient_unless_they_are_an_outcome() -> None:
    z = torch.randn(3, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    ids = torch.arange(5).expand(3, 5)
    p = torch.full((3, 5), 0.15, dtype=torch.float64)
    for other in (False, True):
        [slope] = torch.autograd.grad(first_loss(z.softmax(1).gather(1, ids), p, normaliser="linear", other=other).sum(), z)
        assert (slope[:, 5:].abs().max() > 1e-3) == other


# --- the whole method ---


def test_chosen_entries_in_chunks_are_those_of_the_whole() -> None:
    problem, _ = track()
    batch = next(problem.teacher_text().stream(0))
    states = batch.predicted.take(problem.student(batch.ids, batch.attention))
    ids = torch.randint(16, (len(states), 3), generator=torch.Generator().manual_seed(0))
    whole = real_logits(problem.student, states, 16).log_softmax(1).gather(1, ids)
    weights = torch.randn(whole.shape, generator=torch.Generator().manual_seed(1))
    slopes = []
    for found in (whole, top_log_probs(problem.student, states, ids, vocab=16, chunk=50)):
        torch.testing.assert_close(found, whole)
        slopes.append(torch.autograd.grad((found * weights).sum(), list(problem.student.parameters()), retain_graph=True))
    for a, b in zip(*slopes, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_teachers_best_are_the_same_from_its_whole_distribution_and_from_a_kept_part() -> None:
    problem, _ = track()
    batch = next(problem.teacher_text().stream(0))
    ids, p = teacher_top(problem, batch, 5)
    distribution = real_logits(problem.teacher.module, batch.predicted.take(problem.teacher.states(batch)), 16).softmax(1)
    assert torch.equal(ids, distribution.topk(5).indices) and torch.equal(p, distribution.topk(5).values)
    kept = distribution.topk(8)
    shuffled = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    part = TopK(kept.indices[:, shuffled], kept.values[:, shuffled].log(), 1 - kept.values.sum(1))
    problem.teacher.distributions = lambda batch: part  # type: ignore[method-assign]
    again, same = teacher_top(problem, batch, 5)
    assert torch.equal(again, ids)
    torch.testing.assert_close(same, p)
    with pytest.raises(UserError, match="hold 8 tokens"):
        teacher_top(problem, batch, 9)


def test_it_comes_closer_to_the_teacher_than_the_references_alone() -> None:
    ours, *_ = distilled("first", examples=3200)
    scratch, *_ = distilled("scratch", examples=3200)
    assert score(ours) < 0.95 * score(scratch)
