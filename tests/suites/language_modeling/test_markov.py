"""The analytic setting against brute force: every prompt and every response of a tiny chain is enumerated."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from distillbench.cards.options import options_of
from distillbench.errors import UserError
from distillbench.runs.suite import JudgeContext, TrainContext
from distillbench.suites.language_modeling import CARD, SUITE, markov
from distillbench.suites.language_modeling.nets import build
from distillbench.training.nets import Architecture
from distillbench.training.student import Student

VOCAB, LENGTH, EOS = 3, 3, 0
SEEDS = {"data": 1, "init": 2, "order": 3, "teacher": 4, "noise": 5}


def setting(order=2, **options):
    own = {
        "vocab": VOCAB,
        "order": order,
        "length": LENGTH,
        "mean_length": 4,
        "prompts": 40,
        "references": 10,
        "validation": 5,
        "student": {"name": "window-lm", "arguments": {"vocab": VOCAB, "order": order, "width": 2}},
    }
    whole = CARD.settings["markov"]
    return dataclasses.replace(whole, options={**whole.options, **own, **options})


def table(net):
    """Next-token probabilities of a net behind every context, asked one text at a time: {context: (V,)}."""
    found = {}
    for context in itertools.product(range(VOCAB), repeat=net.order):
        if EOS in context:
            continue
        ids = torch.tensor([context])
        with torch.no_grad():
            logits = net.project(net(ids, torch.ones_like(ids, dtype=torch.bool)))[0, -1].double().numpy()
        found[context] = np.exp(logits) / np.exp(logits).sum()
    return found


def responses():
    """Every response: up to three tokens, ended by token 0 or by the length."""
    for n in range(1, LENGTH + 1):
        for tokens in itertools.product(range(VOCAB), repeat=n):
            if EOS not in tokens[:-1] and (tokens[-1] == EOS or n == LENGTH):
                yield tokens


def log_probability(distributions, prompt, response):
    """The logarithm of a response's probability."""
    context, total = prompt, 0.0
    for token in response:
        total += np.log(distributions[context][token])
        context = (*context, token)[1:]
    return total


def brute_force(p, q, starts):
    """kl, reverse_kl and tv from the distributions of whole texts."""
    kl = reverse = length_p = length_q = tv = 0.0
    for prompt, weight in starts.items():
        for response in responses():
            a, b = (log_probability(x, prompt, response) for x in (p, q))
            kl += weight * np.exp(a) * (a - b)
            reverse += weight * np.exp(b) * (b - a)
            length_p += weight * np.exp(a) * len(response)
            length_q += weight * np.exp(b) * len(response)
            context = prompt
            for token in response:
                tv += weight * np.exp(a) * 0.5 * np.abs(p[context] - q[context]).sum()
                context = (*context, token)[1:]
    return {"kl": kl / length_p, "reverse_kl": reverse / length_q, "tv": tv / length_p}


def start_distributions(found, order):
    mass = found.start.numpy()
    return {c: mass[sum(v * VOCAB ** (order - 1 - i) for i, v in enumerate(c))] for c in itertools.product(range(1, VOCAB), repeat=order)}


def student(order=2, seed=0):
    net = build(Architecture("window-lm", {"vocab": VOCAB, "order": order, "width": 2}), seed)
    with torch.no_grad():
        net.output.weight.mul_(4)
    return net


def problem(*told, **more):
    return SUITE.problem(TrainContext(*told, **more))


def scores(net, where, split="test"):
    return {m.metric: m.value for m in SUITE.evaluate(Student.of(net), JudgeContext("markov", where, SEEDS, split=split)).measurements}


@pytest.mark.parametrize("order", [1, 2])
def test_metrics_are_those_of_every_text_enumerated(order):
    where, net = setting(order), student(order)
    chains = markov.chains(options_of(where, markov.Options), "test")
    starts = start_distributions(chains, order)
    np.testing.assert_allclose(sum(starts.values()), 1)  # prompts hold no end of sequence
    teacher = table(chains.teacher)
    for distribution in teacher.values():
        np.testing.assert_allclose(distribution[EOS], 1 / 4, rtol=1e-5)  # a text goes on for mean_length tokens
    expected = brute_force(teacher, table(net), starts)
    found = scores(net, where)
    assert set(found) == {"kl", "reverse_kl", "tv", "acceptance"}
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5)
        assert value > 0.01
    np.testing.assert_allclose(found["acceptance"], 1 - expected["tv"], rtol=1e-5)


def test_truth_and_estimated_teacher_are_two():
    where, net = setting(1, teacher_texts=60, smoothing=0.1), student(1)
    chains = markov.chains(options_of(where, markov.Options), "test")
    starts = start_distributions(chains, 1)
    truth, teacher, q = table(chains.truth), table(chains.teacher), table(net)
    found = scores(net, where)
    np.testing.assert_allclose(found["truth_kl"], brute_force(truth, q, starts)["kl"], rtol=1e-5)
    np.testing.assert_allclose(found["kl"], brute_force(teacher, q, starts)["kl"], rtol=1e-5)
    of_teacher = scores(chains.teacher, where)
    assert abs(of_teacher["kl"]) < 1e-9 and of_teacher["truth_kl"] > 1e-4
    np.testing.assert_allclose(of_teacher["truth_kl"], brute_force(truth, teacher, starts)["kl"], rtol=1e-5)


def test_more_texts_bring_the_teacher_to_the_truth():
    far, near = (
        scores(markov.chains(options_of(w, markov.Options), "test").teacher, w)["truth_kl"]
        for w in (setting(1, teacher_texts=n, smoothing=0.1) for n in (100, 6000))
    )
    assert near < far / 5 and near < 1e-3


def test_the_teacher_scores_zero_and_a_smaller_window_is_judged_too():
    where = setting()
    teacher = markov.chains(options_of(where, markov.Options), "test").teacher
    found = scores(teacher, where)
    assert found["acceptance"] == pytest.approx(1) and all(abs(found[n]) < 1e-9 for n in ("kl", "reverse_kl", "tv"))
    assert scores(student(1), where)["kl"] > 0.01
    with pytest.raises(UserError, match="looks at more than 2 tokens"):
        scores(student(3), where)


def test_sampled_texts_agree_with_the_sums():
    """The mean log-ratio of the teacher's sampled responses is the KL; the teacher's responses are those of its distribution."""
    where, net = setting(mean_length=3, samples=60), student()
    p = problem("markov", where, SEEDS)
    chains = markov.chains(options_of(where, markov.Options), "test")
    teacher, q = table(chains.teacher), table(net)
    texts = p.teacher.responses(p.prompts, samples=150, length=LENGTH)
    ratios, lengths = [], []
    for ids, real, mask in zip(texts.ids.tolist(), texts.attention, texts.response.tolist(), strict=True):
        response = tuple(v for v, keep in zip(ids, mask, strict=True) if keep)
        prompt = tuple(v for v, a, m in zip(ids, real.tolist(), mask, strict=True) if a and not m)
        ratios.append(log_probability(teacher, prompt, response) - log_probability(q, prompt, response))
        lengths.append(len(response))
    of_pool = dict.fromkeys(start_distributions(chains, 2), 0.0)
    for prompt in p.prompts.ids.tolist():
        of_pool[tuple(prompt)] += 1 / len(p.prompts)
    expected = brute_force(teacher, q, of_pool)["kl"]
    error = np.std(ratios) / np.sqrt(len(ratios)) / np.mean(lengths)
    assert abs(np.mean(ratios) / np.mean(lengths) - expected) < 4 * error
    assert error < expected / 5


def test_prompts_follow_their_distribution():
    where = setting(prompts=4000)
    starts = start_distributions(markov.chains(options_of(where, markov.Options), "test"), 2)
    pool = [tuple(x) for x in problem("markov", where, SEEDS).prompts.ids.tolist()]
    for prompt, mass in starts.items():
        assert abs(pool.count(prompt) / 4000 - mass) < 4 * np.sqrt(mass * (1 - mass) / 4000)


def test_the_tune_split_is_another_chain_and_seeds_another_pool():
    where = setting()
    chains = {split: markov.chains(options_of(where, markov.Options), split) for split in ("test", "tune")}
    assert not torch.equal(chains["test"].teacher.log_law, chains["tune"].teacher.log_law)
    assert not torch.equal(chains["test"].start, chains["tune"].start)
    assert scores(chains["test"].teacher, where, "tune")["kl"] > 0.01
    assert abs(scores(chains["tune"].teacher, where, "tune")["kl"]) < 1e-9
    one, same, other = (problem("markov", where, {**SEEDS, "data": s}) for s in (1, 1, 2))
    assert one.prompts.digest == same.prompts.digest != other.prompts.digest
    assert one.references.digest == same.references.digest != other.references.digest
    assert one.teacher.digest == other.teacher.digest  # the chain is the setting's, not the seed's
    assert one.prompts.digest != problem("markov", where, SEEDS, tuning=True).prompts.digest


def test_references_belong_to_the_pool_and_validation_does_not_repeat_them():
    p = problem("markov", setting(prompts=50, references=20), SEEDS)
    assert p.references.index.tolist() == list(range(20))
    np.testing.assert_array_equal(p.references.ids[:, :2], p.prompts.ids[:20])
    assert len(p.validation) == 5 and p.validation.digest != p.references.some(torch.arange(5)).digest
