"""What methods get of a language model: streams of texts, fresh and given, and losses whose denominator is the whole batch's."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools

import numpy as np
import pytest
import torch

from distillbench.cards.card import Budget, Training
from distillbench.errors import UserError
from distillbench.problems.language_modeling.oracle import LanguageOracle
from distillbench.problems.language_modeling.problem import LanguageModeling
from distillbench.problems.language_modeling.texts import Prompts
from distillbench.suites.language_modeling.nets import build
from distillbench.training.nets import Architecture
from distillbench.training.run import Run
from tests.keyed import reduced, stream

VOCAB, LENGTH = 20, 5
SEEDS = {"noise": 11, "order": 2, "init": 3}


def window(seed, scale=1.0):
    net = build(Architecture("window-lm", {"vocab": VOCAB, "order": 2, "width": 6}), seed)
    with torch.no_grad():
        net.output.weight.mul_(scale)
    return net


def make(cache=None, top_k=0, samples=2, batch_size=6, pool=10):
    rng = np.random.default_rng(0)
    prompts = Prompts.of([rng.integers(1, VOCAB, rng.integers(1, 4)).tolist() for _ in range(pool)], "tok", 0)
    references = prompts.with_responses([rng.integers(1, VOCAB, 1 + i % LENGTH).tolist() for i in range(pool)], pad=0)
    teacher = LanguageOracle(window(1, 8), tokenizer="tok", vocab=VOCAB, eos=0, seed=7, cache=cache, top_k=top_k)
    return LanguageModeling(
        setting="x",
        student=window(2),
        build=functools.partial(build, seed=2),
        teacher=teacher,
        prompts=prompts,
        references=references,
        validation=references,
        vocab=VOCAB,
        eos=0,
        length=LENGTH,
        samples=samples,
        batch_size=batch_size,
        order=5,
    )


def run(problem, seed=11, **options):
    training = Training(batch_size=6, optimizer="sgd", learning_rate=0.1)
    return Run(seeds={**SEEDS, "noise": seed}, budget=Budget(student_examples=60), training=training, oracles=[problem.teacher], **options)


def take(stream, count):
    return list(itertools.islice(stream, count))


def same(a, b):
    return all(torch.equal(getattr(a, x), getattr(b, x)) for x in ("ids", "attention", "response", "index", "rows")) and a.text == b.text


def fresh(batch):
    return bool((batch.rows == -1).all()) and batch.text == ""


@pytest.mark.parametrize("fraction", [0.0, 0.4, 1.0])
def test_streams_are_functions_of_seed_step_and_weights(fraction):
    p = make()
    r = run(p)
    whole = take(stream(p.sampled(r, p.student, fraction=fraction), 0), 12)
    for start in (0, 3, 7, 11):  # a resumed run begins anywhere; what was drawn elsewhere does not matter
        assert same(next(stream(p.sampled(r, p.student, fraction=fraction), start)), whole[start])
    if fraction > 0:
        other = take(stream(p.sampled(r, p.student, fraction=fraction), 0, seed=12), 12)
        assert not all(same(a, b) for a, b in zip(whole, other, strict=True))
        moved = copy.deepcopy(p.student)
        with torch.no_grad():
            moved.output.weight.mul_(-5)
        other = take(stream(p.sampled(r, moved, fraction=fraction), 0), 12)
        assert [fresh(b) for b in other] == [fresh(b) for b in whole]
        assert any(not same(a, b) for a, b in zip(whole, other, strict=True) if fresh(a))


@pytest.mark.parametrize("samples", [1, 2, 3])
def test_fresh_and_given_texts_answer_the_same_prompts_at_every_step(samples):
    p = make(samples=samples)
    given = [b.index.tolist() for b in take(p.teacher_text().stream(0), 11)]
    for fraction in (0.0, 0.5, 1.0):
        assert [b.index.tolist() for b in take(stream(p.sampled(run(p), p.student, fraction=fraction), 0), 11)] == given
    for start in (0, 1, 5, 10):
        assert p.prompt_rows(start, p.batch_size).tolist() == given[start]


def test_the_fraction_is_the_chance_of_a_fresh_batch():
    p = make()
    for fraction, low, high in ((0.0, 0, 0), (1.0, 60, 60), (0.3, 8, 29)):
        assert low <= sum(map(fresh, take(stream(p.sampled(run(p), p.student, fraction=fraction), 0), 60))) <= high
    text = take(p.teacher_text().stream(0), 4)
    assert all(same(a, b) for a, b in zip(text, take(stream(p.sampled(run(p), p.student, fraction=0.0), 0), 4), strict=True))


def test_fresh_responses_stand_behind_their_prompts():
    p = make()
    batch = next(stream(p.sampled(run(p), p.student), 0))
    assert fresh(batch) and batch.tokenizer == "tok"
    for i, row in enumerate(batch.index.tolist()):
        prompt = p.prompts.ids[row][p.prompts.attention[row]].tolist()
        real = batch.ids[i][batch.attention[i]].tolist()
        assert real[: len(prompt)] == prompt
        response = batch.ids[i][batch.response[i]].tolist()
        assert real[len(prompt) :] == response and 1 <= len(response) <= LENGTH and 0 not in response[:-1]


def test_generated_tokens_are_metered_as_they_are_drawn():
    p = make()
    r = run(p)
    batches = stream(p.sampled(r, p.student))
    assert p.teacher.meter.counts["student_tokens"] == 0
    drawn = sum(int(b.response.sum()) for b in take(batches, 3))
    assert p.teacher.meter.counts["student_tokens"] == drawn
    text = int(p.teacher.responses(p.prompts, samples=2, length=LENGTH).response.sum())
    p.teacher_text()
    p.sampled(r, p.student, fraction=0.5)
    assert r.meter.counts["student_tokens"] == drawn and r.meter.counts["teacher_tokens"] == text


def distill(p, folder, stop=None):
    """Half on-policy, and interrupted at an update where that is wanted."""
    r, done = run(p, folder=folder, checkpoint_seconds=0.0), itertools.count(1)

    def after(terms):
        if next(done) == stop:
            raise KeyboardInterrupt

    batches = p.sampled(r, p.student, fraction=0.5)
    r.fit(p.student, lambda b: r.loss(b, x=(p.divergence(b, "js"), "tokens")), batches, after=after)
    return r


@pytest.mark.parametrize("top_k", [0, 6])
def test_a_resumed_run_costs_and_learns_what_an_undisturbed_one_does(tmp_path, top_k):
    whole = make(tmp_path / "cache", top_k)
    distill(whole, None)
    for stop in (2, 4):
        with pytest.raises(KeyboardInterrupt):
            distill(make(tmp_path / "cache", top_k), tmp_path / "run", stop)
    resumed = make(tmp_path / "cache", top_k)
    distill(resumed, tmp_path / "run")
    assert all(torch.equal(a, b) for a, b in zip(whole.student.parameters(), resumed.student.parameters(), strict=True))
    for name in ("student_examples", "teacher_examples", "student_tokens", "teacher_tokens"):
        assert resumed.teacher.meter.counts[name] == whole.teacher.meter.counts[name] > 0, name


def test_the_teacher_shares_in_the_sampling_unmetered_and_unchanged():
    p = make()
    before = p.teacher.digest
    batch = next(stream(p.sampled(run(p), p.student, mixing=1.0), 0))
    as_teacher = next(stream(p.sampled(run(p), p.teacher.module), 0))
    assert same(batch, as_teacher)
    assert not same(batch, next(stream(p.sampled(run(p), p.student), 0)))
    assert LanguageOracle(p.teacher.module, tokenizer="tok", vocab=VOCAB, eos=0, seed=7).digest == before


@pytest.mark.parametrize("top_k", [0, 6])
@pytest.mark.parametrize("loss", ["nll", "divergence"])
def test_micro_batches_sum_to_the_mean_over_all_tokens(loss, top_k):
    """Unequal lengths: the objective is one mean over the tokens of the whole batch."""
    ends = []
    for parts in (1, 3, 6):
        p = make(top_k=top_k)
        r = run(p, micro_batches=parts)

        def objective(batch, p=p, r=r):
            return r.loss(batch, x=(getattr(p, loss)(batch), "tokens"))

        r.fit(p.student, objective, p.data, steps=3)
        ends.append(torch.cat([x.detach().flatten() for x in p.student.parameters()]))
    start = torch.cat([x.detach().flatten() for x in window(2).parameters()])
    assert (ends[0] - start).abs().max() > 1e-3
    for end in ends[1:]:
        np.testing.assert_allclose(end, ends[0], atol=1e-6)
    p = make(top_k=top_k)
    batch = next(p.data.stream(0))
    values = getattr(p, loss)(batch)
    assert len(set(batch.response.sum(1).tolist())) > 1
    np.testing.assert_allclose(reduced(batch, values, "tokens").item(), values.mean().item(), rtol=1e-5)


def dense(p, batch):
    logs = []
    for net in (p.teacher.module, p.student):
        with torch.no_grad():
            logs.append(net.project(batch.predicted.take(net(batch.ids, batch.attention))).double().log_softmax(1).numpy())
    return logs


def test_losses_are_the_divergences_of_the_next_token_distributions():
    p = make()
    batch = next(p.data.stream(0))
    t, s = dense(p, batch)
    np.testing.assert_allclose(p.divergence(batch).detach(), (np.exp(t) * (t - s)).sum(1), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(p.divergence(batch, "tv").detach(), 0.5 * np.abs(np.exp(t) - np.exp(s)).sum(1), rtol=1e-4)
    labels = batch.predicted.labels.numpy()
    np.testing.assert_allclose(p.nll(batch).detach(), -s[np.arange(len(labels)), labels], rtol=1e-5)
    np.testing.assert_allclose(p.divergence(batch, student=p.teacher.module).detach(), 0, atol=1e-6)


def test_cached_distributions_give_the_divergence_of_what_they_keep():
    exact, cached = make(), make(top_k=8)
    batch = next(cached.data.stream(0))
    t, s = dense(cached, batch)
    ids = np.argsort(-t, axis=1)[:, :8]
    a, b = (np.take_along_axis(x, ids, 1) for x in (t, s))
    rest_a, rest_b = 1 - np.exp(a).sum(1), 1 - np.exp(b).sum(1)
    expected = (np.exp(a) * (a - b)).sum(1) + rest_a * np.log(rest_a / rest_b)
    np.testing.assert_allclose(cached.divergence(batch).detach(), expected, atol=0.05)
    np.testing.assert_allclose(cached.divergence(batch).mean().item(), expected.mean(), rtol=0.03)
    assert abs(exact.divergence(batch).mean().item() - expected.mean()) > 1e-4  # there is something left out
    # a tail has no other temperature: the whole distribution is asked
    warm = cached.divergence(batch, temperature=2.0).detach()
    np.testing.assert_allclose(warm, exact.divergence(batch, temperature=2.0).detach(), rtol=1e-5)
    for b in (next(stream(cached.sampled(run(cached), cached.student))), dataclasses.replace(batch, text="")):
        np.testing.assert_allclose(cached.divergence(b).detach(), exact.divergence(b).detach(), rtol=1e-5)


def test_another_tokenizer_stops_the_loss():
    p = make(top_k=8)
    with pytest.raises(UserError, match="another tokenizer"):
        p.divergence(dataclasses.replace(next(p.data.stream(0)), tokenizer="x"))
