"""Proof of taid: numpy oracle, the identities of Shing et al. 2025, numbers of the authors' code, and a run that is killed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distillbench.methods.language_modeling.taid import distill, interpolated, next_t
from distillbench.problems.language_modeling.token_losses import token_losses
from distillbench.training.run import Run
from tests.methods.language_modeling.chains import Dies, Killed
from tests.methods.language_modeling.short import distilled, score, track
from tests.oracles.differences import gradient
from tests.oracles.language_modeling import taid as oracle

GOLDEN = json.loads((Path(__file__).parents[2] / "goldens" / "taid.json").read_text())
HYPER: dict[str, Any] = {"start": 0.4, "end": 1.0, "alpha": 0.03, "beta": 0.99, "adaptive": True}


def logits(seed: int, n: int = 4, v: int = 6) -> np.ndarray:
    return 2 * np.random.default_rng(seed).standard_normal((n, v))


def loss_and_gradient(student: np.ndarray, teacher: np.ndarray, t: float) -> tuple[np.ndarray, np.ndarray]:
    """As the method computes it: the fused loss with a callable teacher; states are the logits, the projection is one."""
    z, p = torch.tensor(student, requires_grad=True), torch.tensor(teacher)
    eye = torch.eye(student.shape[1], dtype=torch.float64)
    own = z.detach()
    values = token_losses(z, eye, lambda rows: interpolated(own[rows], p[rows], t), "forward_kl", chunk=3)
    values.sum().backward()
    assert z.grad is not None
    return values.detach().numpy(), z.grad.numpy()


@pytest.mark.parametrize("t", [0.0, 0.1, 0.4, 0.9, 1.0])
def test_value_and_gradient_equal_the_oracle(t: float) -> None:
    student, teacher = logits(0), logits(1)
    still = oracle.interpolated(student, teacher, t)
    value, slope = loss_and_gradient(student, teacher, t)
    np.testing.assert_allclose(value, oracle.kl(student, still), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(slope, gradient(lambda z: oracle.kl(z, still), student), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("t", ["0.0", "0.4", "1.0"])
def test_numbers_of_the_authors_code(t: str) -> None:
    inputs = {k: np.array(v) for k, v in GOLDEN["inputs"].items() if k != "schedule_losses"}
    student, teacher, mask = (inputs[k].reshape(-1, *inputs[k].shape[2:]) for k in ("student", "teacher", "mask"))
    value, slope = loss_and_gradient(student, teacher, float(t))
    entropy = oracle.cross_entropy(student, oracle.interpolated(student, teacher, float(t))) - oracle.kl(
        student, oracle.interpolated(student, teacher, float(t))
    )
    ours = ((value + entropy) * mask).sum() / mask.sum()
    assert ours == pytest.approx(GOLDEN["values"]["cross_entropy"][t], rel=1e-5)
    theirs = np.array(GOLDEN["gradients"][t]).reshape(slope.shape)
    np.testing.assert_allclose(slope * mask[:, None] / mask.sum(), theirs, rtol=1e-4, atol=1e-7)


def path(losses: list[float], start: float, end: float, alpha: float, beta: float, adaptive: bool = True) -> list[float]:
    state, seen = {"t": start, "momentum": 0.0, "loss": math.inf}, []
    for n, loss in enumerate(losses):
        state = next_t(state, loss, start + (end - start) * n / len(losses), end=end, alpha=alpha, beta=beta, adaptive=adaptive)
        seen.append(state["t"])
    return seen


@pytest.mark.parametrize("name", ["paper", "fast", "capped", "linear"])
def test_the_schedule_is_that_of_the_authors_code_and_of_the_oracle(name: str) -> None:
    case, losses = GOLDEN["values"]["schedules"][name], GOLDEN["inputs"]["schedule_losses"]
    hyper = {"start": case["t_start"], "end": case.get("t_end", 1.0), "alpha": case.get("alpha", 5e-4), "beta": case.get("beta", 0.99)}
    ours = path(losses, **hyper, adaptive=name != "linear")
    np.testing.assert_allclose(ours, case["t"], atol=1e-6)
    if name != "linear":
        np.testing.assert_allclose(ours, oracle.schedule(losses, **hyper), atol=1e-12)


# --- the identities of the sheet ---


def test_1_at_0_there_is_no_gradient_and_at_1_it_is_forward_kl() -> None:
    student, teacher = logits(2), logits(3)
    value, slope = loss_and_gradient(student, teacher, 0.0)
    assert (value == 0).all() and abs(slope).max() < 1e-15  # a missing stop-gradient would leave an entropy term
    z, eye = torch.tensor(student, requires_grad=True), torch.eye(6, dtype=torch.float64)
    word = token_losses(z, eye, lambda rows: torch.tensor(teacher)[rows], "forward_kl")
    word.sum().backward()
    value, slope = loss_and_gradient(student, teacher, 1.0)
    assert z.grad is not None and (value == word.detach().numpy()).all() and (slope == z.grad.numpy()).all()


@pytest.mark.parametrize(("alpha", "adaptive"), [(0.0, True), (0.3, False)])
def test_2_without_adaptation_t_grows_linearly(alpha: float, adaptive: bool) -> None:
    losses = [2.0, 1.0, 3.0, 0.5, 0.1]
    assert path(losses, 0.2, 1.0, alpha, 0.9, adaptive) == [0.2 + 0.8 * n / 5 for n in range(5)]


def test_3_t_never_falls_stays_below_its_end_and_above_the_linear_floor() -> None:
    rng = np.random.default_rng(4)
    for _ in range(50):
        losses = list(rng.lognormal(0, 3, 40))  # jumps by factors of thousands
        t = path(losses, 0.2, 0.9, 0.5, float(rng.uniform()))
        assert (np.diff(t) >= 0).all() and max(t) <= 0.9
        assert all(now >= 0.2 + 0.7 * n / 40 - 1e-12 for n, now in enumerate(t))


def test_4_a_constant_loss_moves_t_by_half_of_alpha() -> None:
    state = next_t({"t": 0.5, "momentum": 0.0, "loss": 1.3}, 1.3, 0.0, end=1.0, alpha=0.01, beta=0.9, adaptive=True)
    assert state["t"] == pytest.approx(0.5 + 0.5 * 0.01 * 0.5, abs=1e-15) and state["momentum"] == 0.0


def test_a_falling_loss_moves_t_faster_than_a_rising_one() -> None:
    def step(loss: float) -> float:
        return next_t({"t": 0.4, "momentum": 0.0, "loss": 1.0}, loss, 0.0, end=1.0, alpha=0.1, beta=0.5, adaptive=True)["t"]

    assert step(0.5) > step(1.0) > step(2.0) > 0.4


def test_trap_the_cross_entropy_changes_less_than_the_kl() -> None:
    """Which is why a schedule that follows one is not the schedule that follows the other."""
    teacher, far, near = logits(5), logits(6), logits(5) + 0.3 * logits(6)
    change = []
    for of in (oracle.kl, oracle.cross_entropy):
        before, after = (of(z, oracle.interpolated(z, teacher, 0.8)).mean() for z in (far, near))
        change.append((before - after) / before)
    assert change[0] > change[1] > 0


def test_5_constants_in_the_logits_change_nothing_and_at_match_the_target_is_the_distribution_itself() -> None:
    student, teacher = logits(7), logits(8)
    plain = loss_and_gradient(student, teacher, 0.6)
    moved = loss_and_gradient(student + 3.0, teacher - 5.0, 0.6)
    for a, b in zip(plain, moved, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
    for t in (0.0, 0.3, 1.0):
        value, slope = loss_and_gradient(student, student, t)
        assert abs(value).max() < 1e-12 and abs(slope).max() < 1e-12


@pytest.mark.parametrize("t", [0.0, 1e-6, 0.5, 1.0])
def test_6_what_the_teacher_excludes_is_excluded_at_any_t_above_0(t: float) -> None:
    student, teacher = logits(9), logits(10)
    teacher[:, 2] = -np.inf
    p = interpolated(torch.tensor(student), torch.tensor(teacher), t).softmax(1)
    assert torch.isfinite(p).all()
    assert ((p[:, 2] == 0) == (t > 0)).all()
    value, slope = loss_and_gradient(student, teacher, t)
    assert np.isfinite(value).all() and np.isfinite(slope).all()


# --- the whole method ---


def test_at_the_ends_of_t_a_run_is_standing_still_or_forward_kl() -> None:
    # By plain gradient descent: Adam would make whole steps of a rounding error.
    problem, run = track(optimizer="sgd", learning_rate=1.0)
    before = {k: v.clone() for k, v in problem.student.state_dict().items()}
    still = distill(problem, run, **{**HYPER, "start": 0.0, "end": 1e-9, "adaptive": False})
    assert all((still.weights[k] - v).abs().max() < 1e-5 for k, v in before.items())
    # t rises from 1 - 1e-7: the same student as forward KL on the same text.
    ours, *_ = distilled("taid", start=1 - 1e-7)
    kl, *_ = distilled("gkd", divergence="forward_kl", on_policy=0.0)
    assert all(torch.allclose(ours.weights[k], v, atol=1e-4) for k, v in kl.weights.items())
    assert any((ours.weights[k] - before[k]).abs().max() > 0.01 for k in before)


def test_a_killed_run_continues_with_its_schedule(tmp_path: Path) -> None:
    problem, run = track()
    whole, state = distill(problem, run, **HYPER), run.state["taid"]
    problem, run = track(folder=tmp_path, observer=Dies(9))
    with pytest.raises(Killed):
        distill(problem, run, **HYPER)
    problem, again = track(folder=tmp_path)
    assert isinstance(again, Run)
    resumed = distill(problem, again, **HYPER)
    assert again.state["taid"] == state and 0.4 < state["t"] < 1.0
    assert all(torch.equal(resumed.weights[k], v) for k, v in whole.weights.items())


def test_it_comes_closer_to_the_teacher_than_the_references_alone() -> None:
    taid, _, run = distilled("taid", examples=3200)
    assert run.state["taid"]["t"] > 0.9
    scratch, *_ = distilled("scratch", examples=3200)
    assert score(taid) < 0.9 * score(scratch)
