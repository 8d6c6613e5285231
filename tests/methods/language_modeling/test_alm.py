"""Proof of alm: numpy oracle, numbers of the authors' code, the identities of the sheet, and a short training across tokenizers."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import entr, rel_entr
from torch import nn

from distillbench.cards.card import Budget
from distillbench.methods.language_modeling import alm, scratch
from distillbench.methods.language_modeling.alm import chunk_divergence, log1mexp
from distillbench.problems.language_modeling.alignment import AlignedBatch
from distillbench.problems.language_modeling.models import LanguageModel
from distillbench.problems.language_modeling.oracle import chosen_log_probs
from distillbench.problems.language_modeling.texts import TokenBatch
from distillbench.runs.identities import seeds_by_role
from distillbench.runs.suite import JudgeContext, TrainContext
from distillbench.suites import language_modeling
from distillbench.training.run import Run
from tests.keyed import reduced
from tests.oracles.differences import gradient as differences
from tests.oracles.language_modeling import alm as oracle

GOLDEN = json.loads((Path(__file__).parents[2] / "goldens" / "alm.json").read_text())
KINDS = ("binary_kl", "binary_ce", "limit")
DEFAULTS = {"divergence": "binary_kl", "tau": 100.0, "chunks": "shortest", "weight": "chunk", "nll": 0.0}


def likelihoods(n=40, seed=0):
    """Log-likelihoods of chunks from very likely to hopeless, the teacher's and the student's."""
    rng = np.random.default_rng(seed)
    return -np.exp(rng.uniform(-6, 3, n)), -np.exp(rng.uniform(-6, 3, n))


@pytest.mark.parametrize("divergence", KINDS)
@pytest.mark.parametrize("tau", [1.0, 10.0, 100.0])
def test_value_and_gradient_equal_the_oracle(divergence, tau):
    a, b = likelihoods()
    student = torch.tensor(b, requires_grad=True)
    ours = chunk_divergence(torch.tensor(a), student, divergence=divergence, tau=tau)
    np.testing.assert_allclose(ours.detach(), oracle.chunk_divergence(a, b, divergence=divergence, tau=tau), rtol=1e-8, atol=1e-9)
    (found,) = torch.autograd.grad(ours.sum(), student)
    # a step in units of b: the steepest are the likeliest
    expected = differences(lambda s: oracle.chunk_divergence(a, b * np.exp(s), divergence=divergence, tau=tau), np.zeros_like(b)) / b
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


# --- a whole batch, with the numbers of the authors' code ------------------------------------------------------------


class Table(LanguageModel):
    """Logits that are given, whatever the tokens."""

    def __init__(self, logits):
        super().__init__()
        self.table = nn.Parameter(torch.tensor(logits))

    def forward(self, ids, attention):
        return self.table

    @property
    def head(self):
        size = self.table.shape[-1]
        return torch.eye(size, dtype=self.table.dtype), None


def golden_inputs():
    rng = np.random.default_rng(GOLDEN["inputs"]["seed"])
    ids = {"student": rng.integers(0, 5, (2, 7)), "teacher": rng.integers(0, 7, (2, 6))}
    logits = {"student": 2 * rng.standard_normal((2, 7, 5)), "teacher": 2 * rng.standard_normal((2, 6, 7))}
    return ids, logits, {side: GOLDEN["inputs"][f"{side}_chunks"] for side in ids}


def batch_of(ids, chunks, rows):
    """The golden rows as an aligned batch: the first column is the prompt."""
    sides = {}
    for side in ("student", "teacher"):
        positions = torch.tensor([chunks[side][r] for r in rows])
        real = positions >= 0
        attention = real.clone()
        attention[:, 0] = True
        index = torch.arange(len(rows))
        sides[side] = (
            positions[:, 1:],
            TokenBatch(torch.tensor(ids[side][rows]), attention, real, index, index),
        )
    student = sides["student"][1]
    fields = {f.name: getattr(student, f.name) for f in dataclasses.fields(student)}
    return AlignedBatch(**fields, teacher=sides["teacher"][1], student_chunks=sides["student"][0], teacher_chunks=sides["teacher"][0])


def value(batch, student, teacher, *, divergence, tau, weight):
    """What distill minimises, over given networks."""

    def said(net, view):
        return chosen_log_probs(net, view.predicted.take(net(view.ids, view.attention)), view.predicted.labels, vocab=net.table.shape[-1])

    class Door:
        def log_probs(self, view):
            return said(teacher, view).detach()

    seen = {}

    class Runner:
        def loss(self, batch, **terms):
            return {name: reduced(batch, *term) for name, term in terms.items()}

        def fit(self, student, loss, batches):
            seen.update(loss(batch))

    class Problem:
        pass

    problem = Problem()
    problem.student, problem.teacher, problem.vocab = student, Door(), student.table.shape[-1]
    problem.teacher_text = problem.aligned = lambda *_, **__: None
    alm.distill(problem, Runner(), divergence=divergence, tau=tau, chunks="shortest", weight=weight, nll=0.0)
    return seen["alm"]


@pytest.mark.parametrize("case", range(len(GOLDEN["cases"])))
def test_numbers_of_the_authors_code(case):
    about = GOLDEN["cases"][case]
    ids, logits, chunks = golden_inputs()
    rows = about["rows"]
    student, teacher = (Table(logits[side][rows]) for side in ("student", "teacher"))
    divergence = {"binary_ce": "binary_ce", "binary_kl_temp_limit": "limit"}[about["kind"]]
    weight = {"chunk_count": "chunk", "token_count": "token", "log1p_token_count": "log1p_token"}[about["weight"]]
    ours = value(batch_of(ids, chunks, rows), student, teacher, divergence=divergence, tau=about["tau"], weight=weight)
    ours.backward()
    scale = 1.0 if divergence == "limit" else about["tau"]  # theirs is not multiplied by tau
    assert ours.item() / scale == pytest.approx(GOLDEN["values"][case], rel=2e-5)
    theirs = np.array(GOLDEN["gradients"][case])
    np.testing.assert_allclose(student.table.grad / scale, theirs, rtol=1e-3, atol=1e-3 * np.abs(theirs).max())
    if divergence == "binary_ce":  # the gradient is the divergence's own
        again = Table(logits["student"][rows])
        value(batch_of(ids, chunks, rows), again, teacher, divergence="binary_kl", tau=about["tau"], weight=weight).backward()
        np.testing.assert_allclose(again.table.grad / scale, theirs, rtol=1e-3, atol=1e-3 * np.abs(theirs).max())


@pytest.mark.parametrize("weight", ["chunk", "token", "log1p_token"])
@pytest.mark.parametrize("divergence", KINDS)
def test_the_loss_of_a_batch_equals_the_oracle(divergence, weight):
    ids, logits, chunks = golden_inputs()
    ours = value(
        batch_of(ids, chunks, [0, 1]), Table(logits["student"]), Table(logits["teacher"]), divergence=divergence, tau=20.0, weight=weight
    )
    about = (v for side in ("student", "teacher") for v in (logits[side], ids[side], chunks[side]))
    assert ours.item() == pytest.approx(oracle.loss(*about, divergence=divergence, tau=20.0, weight=weight), rel=1e-5)


# --- the identities of the sheet ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [1.0, 100.0])
def test_1_and_5_at_a_match_the_divergence_and_the_gradient_are_zero_and_the_cross_entropy_is_an_entropy(tau):
    a = likelihoods()[0]
    for divergence in KINDS:
        student = torch.tensor(a, requires_grad=True)
        values = chunk_divergence(torch.tensor(a), student, divergence=divergence, tau=tau)
        (slope,) = torch.autograd.grad(values.sum(), student)
        # the entropy's two halves cancel to zero from the size of 1 / (1 - x)
        np.testing.assert_allclose(slope, 0, atol=1e-8)
        x = np.exp(a / tau - alm.EPSILON)
        expected = tau * (entr(x) + entr(1 - x)) if divergence == "binary_ce" else 0.0
        np.testing.assert_allclose(values.detach(), expected, rtol=1e-7, atol=1e-8)


def test_2_one_tokenizer_and_chunks_of_one_token_are_a_binary_kl_below_the_forward_kl():
    rng = np.random.default_rng(3)
    p, q = rng.dirichlet(np.ones(6), 200), rng.dirichlet(np.ones(6), 200)
    token = rng.integers(0, 6, 200)
    rows = np.arange(200)
    a, b = (torch.tensor(np.log(probs[rows, token])) for probs in (p, q))
    ours = chunk_divergence(a, b, divergence="binary_kl", tau=1.0).numpy()
    both = [np.stack([probs[rows, token], 1 - probs[rows, token]], 1) for probs in (p, q)]
    np.testing.assert_allclose(ours, rel_entr(*both).sum(1), rtol=1e-3, atol=1e-5)
    assert (ours <= rel_entr(p, q).sum(1) + 1e-9).all() and (ours < rel_entr(p, q).sum(1) - 1e-2).any()
    # equal where the other tokens keep their proportions among themselves
    r = p * np.where(np.arange(6) == token[:, None], (0.5 / p[rows, token])[:, None], (0.5 / (1 - p[rows, token]))[:, None])
    equal = chunk_divergence(a, torch.full((200,), math.log(0.5)).double(), divergence="binary_kl", tau=1.0)
    np.testing.assert_allclose(equal, rel_entr(p, r).sum(1), rtol=1e-3, atol=1e-5)


def test_3_the_limit_in_tau_and_why_it_is_large():
    a, b = torch.tensor([math.log(0.02)]).double(), torch.tensor([math.log(0.2)]).double()
    found = {tau: chunk_divergence(a, b, divergence="binary_kl", tau=tau).item() for tau in (1.0, 100.0, 1e4)}
    assert [found[1.0], found[100.0]] == pytest.approx([0.1528, 1.1492], abs=1e-4)  # worked out beforehand
    limit = chunk_divergence(a, b, divergence="limit", tau=1.0).item()
    assert limit == pytest.approx(1.171955, abs=1e-5)
    assert abs(found[1e4] - limit) < 0.02 * limit  # EPSILON is a hundredth of a / tau here
    # a long chunk: both events are as good as impossible at tau 1, and nothing pulls
    slopes = {}
    for tau in (1.0, 100.0):
        long = torch.tensor([-40.0], requires_grad=True)
        chunk_divergence(torch.tensor([-30.0]), long, divergence="binary_kl", tau=tau).backward()
        slopes[tau] = abs(long.grad.item())
    assert slopes[1.0] < 1e-11 and slopes[100.0] > 0.1


def test_4_merging_chunks_does_not_add_their_losses():
    a, b = torch.tensor([-1.0, -2.0]), torch.tensor([-2.0, -1.0])
    for divergence in ("binary_kl", "limit"):
        apart = chunk_divergence(a, b, divergence=divergence, tau=100.0).sum()
        whole = chunk_divergence(a.sum()[None], b.sum()[None], divergence=divergence, tau=100.0)
        assert apart > 0.5 and whole.item() == pytest.approx(0.0, abs=1e-5)


def test_6_log1mexp_keeps_its_digits_and_a_likelihood_of_one_is_finite():
    x = -np.exp(np.linspace(math.log(1e-12), math.log(700), 200))
    exact = np.where(x > -0.1, np.log(-np.expm1(x)), np.log1p(-np.exp(x)))
    at = torch.tensor(x, requires_grad=True)
    np.testing.assert_allclose(log1mexp(at).detach(), exact, rtol=1e-12)
    (slope,) = torch.autograd.grad(log1mexp(at).sum(), at)
    np.testing.assert_allclose(slope, -1 / np.expm1(-x), rtol=1e-10)
    single = log1mexp(torch.tensor([-1e-6, -20.0]))  # one branch alone loses one of these in single precision
    np.testing.assert_allclose(single, [math.log(1e-6), -math.exp(-20.0)], rtol=1e-5)
    for divergence in KINDS:
        for a, b in ((0.0, 0.0), (0.0, -1e4), (-1e4, 0.0), (-1e4, -1e4)):
            student = torch.tensor([b], requires_grad=True)
            found = chunk_divergence(torch.tensor([a]), student, divergence=divergence, tau=100.0)
            found.sum().backward()
            assert torch.isfinite(found).all() and torch.isfinite(student.grad).all(), (divergence, a, b)


# --- on the problem -----------------------------------------------------------------------------------------------------


def trained(method, setting, batches, **hp):
    about = language_modeling.CARD.settings[setting]
    seeds = seeds_by_role(0)
    problem = language_modeling.SUITE.problem(TrainContext(setting, about, seeds))
    budget = Budget(student_examples=batches * about.training.batch_size)
    run = Run(seeds=seeds, budget=budget, training=about.training, oracles=[problem.teacher])
    student = method.distill(problem, run, **hp)
    [first, *_] = language_modeling.SUITE.evaluate(student, JudgeContext(setting, about, seeds)).measurements
    return first.value, run, student


def test_short_training_across_tokenizers_beats_scratch():
    ours, run, _ = trained(alm, "markov-bytes", 80, **DEFAULTS)
    theirs, *_ = trained(scratch, "markov-bytes", 80)
    assert ours < theirs - 0.02
    assert run.meter.counts["teacher_examples"] == run.meter.counts["student_examples"] == 80 * 32


def test_next_token_training_joins_in_with_its_weight():
    _, run, _ = trained(alm, "markov-bytes", 2, **{**DEFAULTS, "nll": 0.5})
    assert set(run.trace) == {"fit/alm", "fit/nll"}
    assert run.trace["fit/nll"][0] == pytest.approx(0.5 * math.log(9), rel=0.2)


def test_with_one_tokenizer_every_token_is_a_chunk():
    about = language_modeling.CARD.settings["markov"]
    problem = language_modeling.SUITE.problem(TrainContext("markov", about, seeds_by_role(0)))
    batch = next(problem.aligned(problem.teacher_text()).stream(0))
    assert batch.units()["chunks"] == batch.units()["tokens"] == batch.predicted.count
    values = torch.rand(batch.predicted.count)
    assert torch.equal(batch.of_student(values), values) and torch.equal(batch.of_teacher(values), values)
    assert torch.equal(reduced(batch, values, "chunks"), reduced(batch, values, "tokens"))
