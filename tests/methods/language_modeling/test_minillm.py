"""MiniLLM: its gradient against an enumerated sequence KL, the weights, the traps of padding, the authors' numbers, rollouts."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from distillbench.cards.reading import resolve
from distillbench.methods.language_modeling.minillm import CARD, Rollouts, advantages, distill, importance, policy_loss, rewards
from distillbench.problems.language_modeling.token_losses import token_losses
from distillbench.training.student import Student
from tests.keyed import reduced
from tests.methods.language_modeling.chains import Killed, digest, markov, run, scores
from tests.oracles.language_modeling import minillm as oracle

GOLDEN = json.loads((Path(__file__).parents[2] / "goldens" / "minillm.json").read_text())
V = T = 3
SEQUENCES = torch.tensor(oracle.sequences(V, T))
PREFIXES = [y for n in range(T) for y in oracle.sequences(V, n)]
ROWS = torch.tensor([[PREFIXES.index(tuple(y[:t].tolist())) for t in range(T)] for y in SEQUENCES])  # (27, T): the prefix's row


def toy(seed=0):
    """Student and teacher logits of every prefix, (13, 3) each."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(len(PREFIXES), V, generator=generator, dtype=torch.float64) for _ in range(2)]


def chosen(logits, length=T):
    """log-probabilities of every token of every sequence, (27, T)."""
    return logits.log_softmax(1)[ROWS[:, :length]].gather(2, SEQUENCES[:, :length, None]).squeeze(2)


def enumerated(student, teacher):
    """The gradient of KL(q || p) over whole sequences, by autograd."""
    q, p = chosen(student).sum(1), chosen(teacher).sum(1)
    return torch.autograd.grad((q.exp() * (q - p)).sum(), student)[0]


def long_term(student, teacher, mixing=0.0, weights="single", own=False, baseline=0.0):
    """The expected loss of the method's own functions under its sampling distribution, without normalising lengths."""
    log_q, log_p = chosen(student), chosen(teacher)
    old = log_q.detach()
    single = importance(log_p, old, mixing=mixing)
    distribution = (old - single.log()).sum(1).exp()  # the distribution that is sampled from
    everything = torch.ones_like(old, dtype=torch.bool)
    advantage = advantages(rewards(log_p, old, clip=1e9), everything, discount=1.0, own=own, whiten=False)
    advantage = advantage * (torch.arange(T, 0, -1) - (0 if own else 1)) - baseline
    weight = single if weights == "single" else single.prod(1, keepdim=True).expand(-1, T)
    return (distribution[:, None] * policy_loss(log_q, old, weight, advantage, clip=1e9)).sum()


def single_step(student, teacher, mixing=0.0, weights=None):
    """The expected exact reverse KL of every token, with gradient in the token's own distribution alone."""
    log_q, log_p = chosen(student), chosen(teacher)
    single = importance(log_p, log_q.detach(), mixing=mixing)
    distribution = (log_q.detach() - single.log()).sum(1).exp()
    values = token_losses(student, torch.eye(V, dtype=torch.float64), lambda rows: teacher[rows], "reverse_kl")[ROWS]
    if weights == "single":
        values = values * single
    elif weights == "exact":
        values = values * single.prod(1, keepdim=True)
    return (distribution[:, None] * values).sum()


# --- identity 1: both gradients are that of the sequence KL ---


def test_the_sequence_kl_is_the_oracles():
    student, teacher = toy()
    q, p = chosen(student).sum(1), chosen(teacher).sum(1)
    tables = [dict(zip(PREFIXES, x.numpy(), strict=True)) for x in (student, teacher)]
    assert float((q.exp() * (q - p)).sum()) == pytest.approx(oracle.sequence_kl(*tables, V, T), rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_policy_gradient_is_the_gradient_of_the_sequence_kl(seed):
    student, teacher = toy(seed)
    student.requires_grad_()
    expected = enumerated(student, teacher)
    [found] = torch.autograd.grad(long_term(student, teacher, own=True, baseline=1.0), student)
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_single_step_and_long_term_together_are_the_gradient_of_the_sequence_kl(seed):
    student, teacher = toy(seed)
    student.requires_grad_()
    expected = enumerated(student, teacher)
    [exact] = torch.autograd.grad(single_step(student, teacher), student)
    [later] = torch.autograd.grad(long_term(student, teacher), student)
    assert torch.allclose(exact + later, expected, rtol=0, atol=1e-12)
    assert later.abs().max() > 1e-2  # the exact term alone is another gradient
    [twice] = torch.autograd.grad(long_term(student, teacher, own=True), student)  # the authors' sum from t counts r_t twice
    assert (exact + twice - expected).abs().max() > 1e-2


# --- identities 2, 3, 6 ---


def test_equal_distributions_are_a_fixed_point():
    student, _ = toy()
    teacher = student.clone()
    student.requires_grad_()
    for own in (False, True):
        assert long_term(student, teacher, own=own).abs() == 0
    assert torch.autograd.grad(single_step(student, teacher), student)[0].abs().max() < 1e-15
    flat = advantages(torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool), discount=1.0, own=False, whiten=True)
    assert not flat.any()  # whitening does not make something of nothing


def test_one_token_has_no_long_term():
    one = torch.ones(5, 1, dtype=torch.bool)
    assert not advantages(torch.randn(5, 1), one, discount=1.0, own=False, whiten=False).any()
    assert advantages(torch.randn(5, 1), one, discount=1.0, own=True, whiten=False).any()


def test_reverse_kl_takes_a_mode_and_forward_kl_the_middle():
    x = torch.arange(21, dtype=torch.float64)
    two = torch.logaddexp(-((x - 4) ** 2) / 4, -((x - 16) ** 2) / 4)
    centres = torch.linspace(0, 20, 81, dtype=torch.float64)[:, None]
    students = -((x[None] - centres) ** 2) / 8
    found = {
        name: float(centres[token_losses(students, torch.eye(21, dtype=torch.float64), lambda r: two.expand(81, 21)[r], name).argmin()])
        for name in ("forward_kl", "reverse_kl")
    }
    assert found["forward_kl"] == pytest.approx(10, abs=0.3)
    assert min(abs(found["reverse_kl"] - 4), abs(found["reverse_kl"] - 16)) < 0.3


# --- identities 4, 5: importance weights ---


def test_weights_are_ratios_of_probabilities_and_bounded():
    log_q, log_p = (x.log_softmax(1) for x in toy(4))
    assert torch.equal(importance(log_p, log_q, mixing=0.0), torch.ones_like(log_q))
    for mixing in (0.2, 0.7):
        weight = importance(log_p, log_q, mixing=mixing)
        q, p = np.exp(log_q.numpy()), np.exp(log_p.numpy())
        assert np.allclose(weight.numpy(), q / (mixing * p + (1 - mixing) * q), rtol=1e-12)
        assert weight.max() <= 1 / (1 - mixing)
    far = importance(torch.tensor([-500.0, 0.0]), torch.tensor([0.0, -500.0]), mixing=0.2)
    assert torch.allclose(far, torch.tensor([1.25, 0.0]))  # no 0 / 0 where a probability underflows


def test_exact_weights_are_unbiased_and_single_ratios_are_not():
    student, teacher = toy()
    student.requires_grad_()
    expected = enumerated(student, teacher)

    def off(weights):
        loss = single_step(student, teacher, 0.2, weights) + long_term(student, teacher, 0.2, weights)
        return float((torch.autograd.grad(loss, student)[0] - expected).abs().max())

    assert off("exact") < 1e-12
    assert off("single") > 1e-3


def test_a_single_ratio_on_the_single_step_term_changes_nothing_in_expectation():
    """So that leaving it away, as the authors' code does, is no deviation from the paper's estimator but a smaller variance."""
    student, teacher = toy()
    student.requires_grad_()
    plain, weighted = (torch.autograd.grad(single_step(student, teacher, 0.2, w), student)[0] for w in (None, "single"))
    assert torch.allclose(plain, weighted, rtol=0, atol=1e-12)


# --- returns and the clipped objective ---

LENGTHS = [6, 3, 5, 1]
MASK = torch.arange(6)[None] < torch.tensor(LENGTHS)[:, None]


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("discount", [1.0, 0.95, 0.0])
def test_advantages_match_the_oracle(own, whiten, discount):
    reward = np.random.default_rng(0).standard_normal((4, 6))
    found = advantages(torch.tensor(reward), MASK, discount=discount, own=own, whiten=whiten)
    assert np.allclose(found.numpy(), oracle.advantages(reward, LENGTHS, discount, own, whiten), rtol=1e-12, atol=1e-13)


def test_padding_changes_no_advantage_and_counts_in_no_statistic():
    reward = torch.randn(4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    plain = advantages(reward, MASK, discount=0.95, own=True, whiten=True)
    wide = torch.nn.functional.pad(reward, (0, 50), value=7.0)
    padded = advantages(wide, torch.nn.functional.pad(MASK, (0, 50)), discount=0.95, own=True, whiten=True)
    assert torch.allclose(padded[:, :6], plain, atol=1e-14)
    assert not padded[:, 6:].any()
    tokens = plain[MASK]
    assert float(tokens.mean()) == pytest.approx(0, abs=1e-12)
    assert float(tokens.var()) == pytest.approx(1, rel=1e-6)


def test_policy_loss_matches_the_oracle_in_value_and_gradient():
    rng = np.random.default_rng(2)
    log_q, old, advantage = (rng.standard_normal((5, 8)) for _ in range(3))
    weight = rng.uniform(0.1, 2, (5, 8))
    point = torch.tensor(log_q, requires_grad=True)
    value = policy_loss(point, *map(torch.tensor, (old, weight, advantage)), clip=0.2)
    value.sum().backward()
    expected, slope = oracle.clipped(log_q, old, weight, advantage, 0.2)
    assert np.allclose(value.detach().numpy(), expected, rtol=1e-12)
    assert np.allclose(point.grad.numpy(), slope, rtol=1e-12)
    assert 0 < (slope == 0).sum() < slope.size  # both sides of the clip were seen


# --- the authors' numbers ---


def golden_inputs():
    rng = np.random.default_rng(GOLDEN["inputs"]["seed"])
    log_p, log_q = (np.log(rng.uniform(0.05, 0.9, (4, 6))) for _ in range(2))
    now, weight, advantage = log_q + 0.3 * rng.standard_normal((4, 6)), rng.uniform(0.3, 1.25, (4, 6)), rng.standard_normal((4, 6))
    logits = [2 * rng.standard_normal((4, 6, 7)) for _ in range(2)]
    return [torch.tensor(x) for x in (log_p, log_q, now, weight, advantage, *logits)]


@pytest.mark.parametrize("case", GOLDEN["values"]["advantages"], ids=lambda c: f"{c['discount']} {c['whiten']} {c['masked']}")
def test_advantages_of_the_authors(case):
    log_p, log_q = golden_inputs()[:2]
    mask = MASK if case["masked"] else torch.ones_like(MASK)
    found = advantages(rewards(log_p, log_q, clip=100), mask, discount=case["discount"], own=True, whiten=case["whiten"])
    theirs = torch.tensor(case["values"], dtype=torch.float64)
    off = float((found - theirs)[mask].abs().max())
    if case["masked"] and case["whiten"]:
        assert off > 0.05  # they whiten over padding as well
    else:
        assert off < 1e-5


def test_policy_and_single_step_losses_of_the_authors():
    _, old, now, weight, advantage, student, teacher = golden_inputs()
    golden = GOLDEN["values"]["policy_loss"]
    now.requires_grad_()
    loss = policy_loss(now, old, weight, advantage, clip=golden["clip"])[MASK].mean()
    loss.backward()
    assert loss.item() == pytest.approx(golden["value"], rel=1e-6)
    assert np.allclose(now.grad.numpy(), golden["gradient"], atol=1e-7)
    golden = GOLDEN["values"]["single_step"]
    student.requires_grad_()
    loss = token_losses(student[MASK], torch.eye(7, dtype=torch.float64), lambda rows: teacher[MASK][rows], "reverse_kl").mean()
    loss.backward()
    assert loss.item() == pytest.approx(golden["value"], rel=1e-6)
    assert np.allclose(student.grad.numpy(), golden["gradient"], atol=1e-7)


# --- rollouts ---


def rollouts(mixing=0.2, references=True, batches=3, epochs=2):
    setting, problem = markov()
    machine = run(setting, problem, 100)

    def normal(reward, mask):
        return advantages(reward, mask, discount=0.95, own=True, whiten=True)

    return problem, machine, Rollouts(problem, machine, batches, epochs, mixing, references, 50.0, normal)


def test_a_collection_is_scored_once_with_both_models_and_gone_through_epochs_times():
    problem, machine, source = rollouts()
    stream = source.stream(0)
    batches = [next(stream) for _ in range(6)]
    assert all(len(b) == source.batch_size == 32 and int(b.own.sum()) == 16 for b in batches)
    seen = [{tuple(row) for b in part for row in b.ids[:16].tolist()} for part in (batches[:3], batches[3:])]
    assert seen[0] == seen[1]
    assert machine.state["rollouts"]["ids"].shape[0] == 48
    for batch in batches[:2]:
        old, weight, _ = batch.values()
        log_q, log_p = -problem.nll(batch)[batch.own_tokens], problem.teacher.log_probs(batch)[batch.own_tokens]
        assert torch.allclose(old, log_q.detach(), atol=1e-6)
        assert torch.allclose(weight, 1 / (0.2 * (log_p - old).exp() + 0.8), atol=1e-5)
    of_all = torch.cat([b.values()[2] for b in batches[:3]])
    assert float(of_all.mean()) == pytest.approx(0, abs=1e-5)
    assert float(of_all.var()) == pytest.approx(1, abs=1e-4)
    again = next(stream)
    assert {tuple(row) for row in again.ids[:16].tolist()} != seen[0]


def test_stored_values_survive_parts_and_padding():
    _, _, source = rollouts()
    batch = next(source.stream(0))
    parts = [batch.part(0, 5), batch.part(5, 20), batch.part(20, 32)]
    for i in range(3):
        assert torch.equal(torch.cat([p.values()[i] for p in parts]), batch.values()[i])
    wide = {name: torch.nn.functional.pad(getattr(batch, name), (50, 50)) for name in ("ids", "attention", "response")}
    padded = dataclasses.replace(batch, **wide)
    assert all(torch.equal(x, y) for x, y in zip(padded.values(), batch.values(), strict=True))
    values = torch.randn(int(batch.own_tokens.sum()), generator=torch.Generator().manual_seed(0))
    assert float(reduced(padded, values, "own")) == pytest.approx(float(values.mean()), rel=1e-5)
    at, total = 0, 0.0
    for part in parts:
        count = int(part.own_tokens.sum())
        total += float(reduced(part, values[at : at + count], "own"))
        at += count
    assert total == pytest.approx(float(values.mean()), rel=1e-5)


def test_a_stream_continues_within_a_collection():
    source = rollouts()[2]
    stream = source.stream(0)
    batches = [next(stream) for _ in range(5)]
    again = source.stream(4)
    assert torch.equal(next(again).ids, batches[4].ids)
    next(stream)
    next(again)
    assert torch.equal(next(again).ids, next(stream).ids)  # the next collection: the same prompts and random numbers


def test_without_mixing_weights_are_one_and_without_references_all_rows_are_rollouts():
    _, _, source = rollouts(mixing=0.0, references=False)
    batch = next(source.stream(0))
    assert bool(batch.own.all()) and len(batch) == 32
    assert torch.equal(batch.values()[1], torch.ones(int(batch.response.sum())))


# --- training ---


def test_training_comes_closer_in_reverse_kl_and_resumes_bit_for_bit(tmp_path):
    hyper = {**resolve(CARD, {}), "sft": 0.2}
    setting, problem = markov()
    machine = run(setting, problem, 60)
    student = distill(problem, machine, **hyper)
    untrained = Student.of(markov()[1].student)
    assert scores(setting, student)["reverse_kl"] < 0.9 * scores(setting, untrained)["reverse_kl"]
    counts = machine.meter.counts
    assert counts["student_examples"] == 60 * 32  # references beside rollouts are paid for
    setting, problem = markov()
    with pytest.raises(Killed):  # within a collection of the second phase
        distill(problem, run(setting, problem, 60, tmp_path, kill_at=23), **hyper)
    setting, problem = markov()
    resumed = run(setting, problem, 60, tmp_path)
    assert digest(distill(problem, resumed, **hyper)) == digest(student)
    for name in ("student_tokens", "teacher_examples", "student_examples"):
        assert resumed.meter.counts[name] == counts[name] > 0
