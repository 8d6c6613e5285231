"""Teachers that fall short of the truth: counted from texts, or of a limited rank. The exact identities that the studies rest on."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from distillbench.cards.options import options_of
from distillbench.identity import derive_seed
from distillbench.runs.plan import track
from distillbench.suites.language_modeling import markov
from distillbench.suites.language_modeling.nets import Chain

SMALL = {"vocab": 5, "order": 1, "mean_length": 6, "length": 10, "spread": 1.5}


def small(name, **options):
    setting = track(f"language-modeling/{name}")[2]
    return dataclasses.replace(setting, options={**setting.options, **SMALL, **options})


def distributions(chains):
    options = chains.truth.vocab, chains.truth.order
    return markov.distributions(chains.truth, *options), markov.distributions(chains.teacher, *options)


def distance(p, q, chains):
    return markov.divergences(p, q, chains.start, chains.length)["kl"]


# --- a teacher of limited rank ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2])
def test_the_limited_teacher_is_the_best_of_its_rank(rank):
    """Beside scipy's search from many starts, over a parametrisation of its own."""
    chains = markov.chains(options_of(small("markov-limited", teacher_rank=rank), markov.Options), "test")
    p, q = distributions(chains)
    weight = markov.visits(p, chains.start, chains.length).numpy()
    weight, distribution, (size, vocab) = weight / weight.sum(), p.numpy(), p.shape

    def kl(flat):
        a, b, bias = np.split(flat, [size * rank, (size + vocab) * rank])
        logits = a.reshape(size, rank) @ b.reshape(rank, vocab) + bias
        log_q = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        return float((weight[:, None] * distribution * (np.log(distribution) - log_q)).sum())

    rng = np.random.default_rng(0)
    found = min(minimize(kl, rng.normal(size=(size + vocab) * rank + vocab), method="L-BFGS-B").fun for _ in range(6))
    ours = distance(p, q, chains)
    assert ours == pytest.approx(found, abs=2e-4)
    logits = q.log()[weight > 0]
    assert np.linalg.matrix_rank((logits - logits[:1] - (logits - logits[:1]).mean(1, keepdim=True)).numpy(), tol=1e-4) <= rank


def test_more_rank_is_nearer_and_all_of_it_is_the_truth():
    distances = []
    for rank in (1, 2, 4):
        chains = markov.chains(options_of(small("markov-limited", teacher_rank=rank), markov.Options), "test")
        p, q = distributions(chains)
        distances.append(distance(p, q, chains))
        again = markov.chains(options_of(small("markov-limited", teacher_rank=rank), markov.Options), "test").teacher
        assert torch.equal(again.log_law, chains.teacher.log_law)
    assert distances[0] > distances[1] > distances[2] == pytest.approx(0, abs=1e-10)
    kept = markov.chains(options_of(small("markov-limited", teacher_rank=2), markov.Options), "test").teacher.log_law
    markov.chains.cache_clear()
    assert torch.equal(markov.chains(options_of(small("markov-limited", teacher_rank=2), markov.Options), "test").teacher.log_law, kept)


# --- teacher hacking, exactly (the sheet's third identity) -------------------------------------------------------------


def empirical(chains, texts, seed=0):
    """Counts (states, V) of fixed responses of the teacher to random prompts."""
    seed = derive_seed("teacher", seed)
    drawn = markov.draw(chains, chains.teacher, markov.starts(chains, texts, seed), seed)
    batch = drawn.take(torch.arange(texts))
    counts = np.zeros((chains.truth.vocab, chains.truth.vocab))
    ids, response = batch.ids.numpy(), batch.response.numpy()
    for row, counted in zip(ids, response, strict=True):
        for t in range(1, len(row)):
            if counted[t]:
                counts[row[t - 1], row[t]] += 1
    return batch, counts


@pytest.fixture
def estimated():
    return markov.chains(options_of(small("markov-estimated", teacher_texts=60), markov.Options), "test")


def test_the_minimiser_on_fixed_responses_is_their_empirical_chain(estimated):
    batch, counts = empirical(estimated, 400)
    student = Chain(5, 1)
    with torch.no_grad():
        student.log_law.copy_(torch.as_tensor(np.log(np.maximum(counts, 1e-3) / np.maximum(counts, 1e-3).sum(1, keepdims=True))))
    states = batch.predicted.take(student(batch.ids, batch.attention))
    weight, _ = student.head
    torch.nn.functional.cross_entropy(states @ weight.T, batch.predicted.labels).backward()
    assert student.log_law.grad.abs().max() < 1e-5
    at_teacher = Chain(5, 1)
    at_teacher.load_state_dict(estimated.teacher.state_dict())
    states = batch.predicted.take(at_teacher(batch.ids, batch.attention))
    torch.nn.functional.cross_entropy(states @ at_teacher.head[0].T, batch.predicted.labels).backward()
    assert at_teacher.log_law.grad.abs().max() > 1e-3  # the teacher itself is not it


def test_the_empirical_chain_goes_to_the_teacher_and_no_nearer_to_the_truth_as_texts_grow(estimated):
    p, teacher = distributions(estimated)
    floor = distance(p, teacher, estimated)
    proxies, goldens = [], []
    for texts in (30, 300, 10_000):
        counts = empirical(estimated, texts)[1] + 1e-3
        q = torch.as_tensor(counts / counts.sum(1, keepdims=True))
        proxies.append(distance(teacher, q, estimated))
        goldens.append(distance(p, q, estimated))
    assert proxies[0] > proxies[1] > proxies[2] and proxies[2] < 1e-3
    assert goldens[0] > floor * 1.05
    assert goldens[2] == pytest.approx(floor, rel=0.1)


def test_a_table_turns_on_fixed_responses_and_not_on_fresh_ones(estimated):
    """Gradient descent on exact losses: the likelihood of 30 fixed texts, and that of endless fresh ones."""
    p, teacher = distributions(estimated)
    visited = markov.visits(teacher, estimated.start, estimated.length)
    endless = (visited[:, None] * teacher / visited.sum()).numpy()
    fixed = empirical(estimated, 30)[1]

    def golden_along(weights):
        logits, path = np.zeros((5, 5)), []
        for step in range(8_001):
            q = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
            if step % 100 == 0:
                path.append(distance(p, torch.as_tensor(q), estimated))
            logits += 2.0 * (weights - weights.sum(1, keepdims=True) * q)
        return path

    offline, online = golden_along(fixed / fixed.sum()), golden_along(endless)
    floor = distance(p, teacher, estimated)
    assert offline[-1] > min(offline) * 1.1 and 0 < np.argmin(offline) < len(offline) - 1
    assert online[-1] == pytest.approx(floor, rel=0.05)
    assert offline[-1] > floor


def test_nothing_can_be_told_where_the_teacher_is_the_truth():
    """Identities 1 and 2: proxy and golden are one number, and a perfect copy of an estimated teacher has its distance."""
    chains = markov.chains(options_of(small("markov"), markov.Options), "test")
    p, teacher = distributions(chains)
    q = torch.full_like(p, 0.2)
    assert distance(p, q, chains) == distance(teacher, q, chains) and math.isfinite(distance(p, q, chains))
