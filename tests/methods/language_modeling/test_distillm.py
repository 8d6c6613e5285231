"""DistiLLM: limits and bounds of the skewed divergences, the threshold, the buffer, the authors' numbers, resuming with a buffer."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from distillbench.cards.reading import resolve
from distillbench.methods.language_modeling.distillm import CARD, Adaptive, distill, fresh_chance, raised
from distillbench.problems.language_modeling.token_losses import token_losses
from distillbench.training.noise import Key, Rows
from distillbench.training.student import Student
from tests.keyed import stream
from tests.methods.language_modeling.chains import Killed, digest, markov, run, scores
from tests.oracles.language_modeling import distillm as oracle
from tests.oracles.language_modeling import token_losses as dense

GOLDEN = json.loads((Path(__file__).parents[2] / "goldens" / "distillm.json").read_text())
EYE = torch.eye(7, dtype=torch.float64)


def losses(student, teacher, name, alpha=0.1):
    """A divergence of logits (N, 7) each."""
    return token_losses(student, EYE, lambda rows: teacher[rows], name, alpha=alpha, beta=alpha)


def pair(seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(40, 7, generator=generator, dtype=torch.float64) for _ in range(2)]


# --- identities 1 to 4 ---


def test_without_skew_they_are_the_plain_kls_and_with_all_of_it_nothing():
    q, p = pair()
    assert torch.allclose(losses(q, p, "skew_kl", 0.0), losses(q, p, "forward_kl"), rtol=1e-12)
    assert torch.allclose(losses(q, p, "skew_reverse_kl", 0.0), losses(q, p, "reverse_kl"), rtol=1e-12)
    for name in ("skew_kl", "skew_reverse_kl"):
        point = q.clone().requires_grad_()
        value = losses(point, p, name, 1.0)
        value.sum().backward()
        assert not value.any() and not point.grad.any()


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("name", ["skew_kl", "skew_reverse_kl"])
def test_value_is_the_oracles_and_below_minus_log_alpha(name, alpha):
    q, p = pair()
    distributions = [torch.softmax(x, 1).numpy() for x in (p, q)]
    expected = [dense.DIVERGENCES[name](a, b, 0.5, alpha) for a, b in zip(*distributions, strict=True)]
    assert np.allclose(losses(q, p, name, alpha).numpy(), expected, rtol=1e-10)
    far = losses(*pair(scale=200.0), name, alpha)
    assert torch.isfinite(far).all() and float(far.max()) <= -np.log(alpha) + 1e-12
    assert float(far.max()) > -0.9 * np.log(alpha)  # the bound is near to being reached
    assert float(losses(p, p, name, alpha).abs().max()) < 1e-12 < float(losses(q, p, name, alpha).min())


def test_gradient_is_that_of_the_formula_and_its_ratio_is_bounded():
    (z, p), alpha = pair(3), 0.1
    point = z.clone().requires_grad_()
    losses(point, p, "skew_kl", alpha).sum().backward()
    p, q = p.softmax(1), z.softmax(1)
    r = p / (alpha * p + (1 - alpha) * q)
    assert torch.allclose(point.grad, -(1 - alpha) * (q * r - q * (q * r).sum(1, keepdim=True)), atol=1e-12)
    assert (r <= 1 / alpha).all() and (r <= p / ((1 - alpha) * q)).all()


def test_the_reverse_is_the_forward_with_the_distributions_exchanged():
    q, p = pair(1)
    assert torch.allclose(losses(q, p, "skew_reverse_kl", 0.3), losses(p, q, "skew_kl", 0.3), rtol=1e-11)


def test_together_they_are_gkds_generalised_js():
    q, p = pair(2)
    for beta in (0.1, 0.5, 0.7):
        both = beta * losses(q, p, "skew_kl", beta) + (1 - beta) * losses(q, p, "skew_reverse_kl", 1 - beta)
        assert torch.allclose(both, losses(q, p, "js", beta), rtol=1e-10)


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda c: f"{c['function']} {c['alpha']}")
def test_the_authors_numbers(case):
    rng = np.random.default_rng(GOLDEN["inputs"]["seed"])
    student, teacher = (torch.tensor(2 * rng.standard_normal((2, 4, 7))) for _ in range(2))
    mask = torch.tensor(GOLDEN["inputs"]["labels"]) != -100
    student.requires_grad_()
    forward = case["function"] == "skewed_forward_kl"
    value = losses(student[mask], teacher[mask], "skew_kl" if forward else "skew_reverse_kl", case["alpha"]).mean()
    value.backward()
    distribution = teacher[mask].softmax(1)
    entropy = float(-(distribution * distribution.log()).sum(1).mean()) if forward else 0.0  # which theirs leaves in
    assert value.item() + entropy == pytest.approx(case["value"], abs=1e-6)
    assert np.allclose(student.grad.numpy(), case["gradient"], atol=1e-6)


# --- the threshold ---


@pytest.mark.parametrize("compared", ["first", "best"])
def test_thresholds_match_the_oracle(compared):
    curve = [3.0, 2.0, 1.5, 1.7, 1.6, 3.2, 3.25, 3.31, 1.0, 1.05, 1.2, 9.0]
    phi, before, found = 0.0, curve[0], []
    for loss in curve[1:]:
        phi, before = raised(phi, before, loss, epsilon=0.1, compared=compared)
        found.append(phi)
    assert found == oracle.thresholds(curve, 0.0, 0.1, compared)
    assert raised(0.95, 1.0, 2.0, epsilon=0.1, compared=compared)[0] == 1.0


def test_the_stale_loss_hides_a_rise_after_an_early_minimum():
    curve = [3.0, 1.5, 2.0, 2.5]
    assert oracle.thresholds(curve, 0.0, 0.1, "first")[-1] == 0
    assert oracle.thresholds(curve, 0.0, 0.1, "best")[-1] == pytest.approx(0.2)


def test_chances_of_new_text():
    for replay, expected in (("decreasing", 0.6), ("constant", 0.4), ("increasing", 0.2), ("off", 0.8)):
        assert fresh_chance(0.8, 0.25, replay) == pytest.approx(expected)


# --- identities 5, 6: the batches ---


def walk(steps, **changes):
    """The batches of ``steps`` steps, and what is in the buffer after each."""
    options = {"threshold": 0.0, "epsilon": 0.1, "compared": "first", "interval": 1.0, "replay": "decreasing", "capacity": 100}
    setting, problem = markov()
    machine = run(setting, problem, steps)
    source = Adaptive(problem, machine, **{**options, "data": "teacher", "references": False, **changes})
    batches, held, source = [], [], stream(source)
    for step in range(steps):
        machine._progress_made = step / steps
        batches.append(next(source))
        ids = machine.state.get("ids", torch.zeros(0, 1))
        held.append((machine.state.get("index", torch.zeros(0)).clone(), ids.clone()))
    return problem, machine, batches, held


def test_phi_zero_is_the_given_text_and_asks_nobody():
    problem, machine, batches, held = walk(6)
    given = problem.teacher_text().stream(0)
    assert all(torch.equal(b.ids, next(given).ids) for b in batches)
    assert len(held[-1][0]) == 0
    assert machine.meter.counts["student_tokens"] == 0
    assert machine.meter.counts["teacher_tokens"] == int(problem.teacher_text().texts.response.sum())


def test_phi_one_without_replay_is_gkd_on_the_students_text_alone():
    _, _, batches, held = walk(6, threshold=1.0, replay="off")
    assert all(bool((b.rows == -1).all()) and bool(b.own.all()) for b in batches)
    assert len(held[-1][0]) == 0
    assert len({tuple(r) for b in batches for r in b.ids.tolist()}) > 150  # none is drawn twice


def test_the_buffer_is_first_in_first_out_and_never_above_its_capacity():
    _, _, batches, held = walk(8, threshold=1.0, replay="decreasing", capacity=70)
    history = []
    for (index, ids), batch in zip(held, batches, strict=True):
        assert len(index) <= 70
        newest = batch.index.tolist()
        if index[-len(newest) :].tolist() == newest:
            history += newest
        else:  # drawn from what was there, each response once
            width = batch.response.sum(1)
            kept = {(int(i), tuple(row[:n].tolist())) for i, row in zip(index, ids, strict=True) for n in (*{*width.tolist()},)}
            rows = [(int(i), tuple(b[m].tolist())) for i, b, m in zip(batch.index, batch.ids, batch.response, strict=True)]
            assert set(rows) <= kept
        assert index.tolist() == history[-70:]
    assert len(history) > 70


@pytest.mark.parametrize("replay", ["decreasing", "constant", "increasing"])
def test_the_kind_of_every_batch_matches_the_oracle(replay):
    steps, phi = 20, 0.7
    _, _, batches, held = walk(steps, threshold=phi, replay=replay, capacity=64)
    draws = [Rows(key=Key(1, 0, 0, s)).coin("whose text") for s in range(steps)]
    expected = oracle.kinds(draws, phi, steps, 32, 64, replay)
    found, before = [], torch.zeros(0)
    for batch, (index, _) in zip(batches, held, strict=True):
        own = bool((batch.rows == -1).all())
        found.append("given" if not own else "old" if torch.equal(index, before) else "new")
        before = index
    assert found == expected
    assert set(found) == {"new", "old", "given"}


def test_references_beside_the_text_take_half_of_the_batch():
    problem, _, batches, _ = walk(2, references=True)
    assert len(batches[0]) == 32 and int(batches[0].own.sum()) == 16
    rows = problem.references.ids[:, -problem.length :].tolist()
    batch = batches[0]
    assert all(any(r[: int(m.sum())] == b[m].tolist() for r in rows) for b, m in zip(batch.ids[16:], batch.response[16:], strict=True))


# --- training ---


def test_training_comes_closer_and_resumes_bit_for_bit_with_a_buffer(tmp_path):
    hyper = {**resolve(CARD, {}), "threshold": 0.8, "capacity": 100, "epsilon": 0.0, "replay": "increasing", "lm_weight": 0.5}
    setting, problem = markov()
    machine = run(setting, problem, 30)
    student = distill(problem, machine, **hyper)
    assert scores(setting, student)["kl"] < 0.95 * scores(setting, Student.of(markov()[1].student))["kl"]
    assert machine.meter.counts["student_examples"] == 30 * 32
    setting, problem = markov()
    with pytest.raises(Killed):
        distill(problem, run(setting, problem, 30, tmp_path, kill_at=17), **hyper)
    setting, problem = markov()
    resumed = run(setting, problem, 30, tmp_path)
    assert digest(distill(problem, resumed, **hyper)) == digest(student)
    assert torch.equal(resumed.state["ids"], machine.state["ids"])
    assert resumed.state["validated"] == machine.state["validated"] == 9


def test_the_threshold_rises_where_the_validation_loss_does():
    """A learning rate at which nothing is learnt: the loss goes up, and phi with it."""
    setting, problem = markov()
    machine = run(setting, problem, 12, learning_rate=1.0)
    distill(problem, machine, **{**resolve(CARD, {}), "epsilon": 0.0, "capacity": 40})
    assert machine.state["phi"] >= 0.1
    assert len(machine.state["index"]) <= 40
