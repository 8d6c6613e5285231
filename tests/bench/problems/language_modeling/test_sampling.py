"""Sampling by inversion: the distribution of what is drawn, the ends of the unit interval, and what a row may depend on."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from distillbench.errors import UserError
from distillbench.problems.language_modeling.sampling import draw, pick, respond
from distillbench.problems.language_modeling.texts import Prompts
from distillbench.suites.language_modeling.nets import build
from distillbench.training.nets import Architecture

LAST = 1 - 2.0**-53
VOCAB, EOS = 4, 0


def chain(seed, order=1, vocab=VOCAB):
    net = build(Architecture("chain", {"vocab": vocab, "order": order}), 0)
    logits = torch.randn(vocab**order, vocab, generator=torch.Generator().manual_seed(seed))
    net.load_state_dict({"log_law": logits.log_softmax(1)})
    return net.eval().requires_grad_(False)


def prompts(lists):
    return Prompts.of(lists, "tok", EOS)


def uniforms(rows, width, seed=0):
    return torch.rand(rows, width, generator=torch.Generator().manual_seed(seed))


def tokens(value):
    return torch.as_tensor(value, dtype=torch.float64)


# --- one token --------------------------------------------------------------------------------------------------


def test_inversion_follows_the_distribution_function():
    distribution = np.array([0.1, 0.0, 0.4, 0.3, 0.2])
    edges = np.cumsum(distribution)
    u = np.random.default_rng(0).random(500)
    expected = [next(v for v in range(5) if x < edges[v]) for x in u]
    found = draw(tokens(distribution).expand(500, 5), torch.from_numpy(u))
    assert found.tolist() == expected


@pytest.mark.parametrize(
    ("distribution", "first", "last"),
    [
        ([0.0, 0.0, 0.5, 0.5, 0.0, 0.0], 2, 3),
        ([1.0, 0, 0], 0, 0),
        ([0, 0, 1.0], 2, 2),
        ([0.5, 0.0, 0.5], 0, 2),
        ([0.1] * 10, 0, 9),  # ten tenths are not quite one
        ([3.0, 0.0, 5.0], 0, 2),  # weights need not add up to 1
    ],
)
def test_the_ends_of_the_interval_never_give_a_token_without_mass(distribution, first, last):
    distribution = tokens([distribution])
    assert draw(distribution, torch.tensor([0.0])).item() == first
    for u in (LAST, 1.0):  # a float32 random number may be rounded up to 1
        token = draw(distribution, tokens([u])).item()
        assert distribution[0, token] > 0 and token == last


def test_a_boundary_belongs_to_the_next_token_that_has_mass():
    assert draw(tokens([[0.25, 0.25, 0.0, 0.5]]), tokens([0.5])).item() == 3
    assert draw(tokens([[0.25, 0.25, 0.0, 0.5]]), tokens([0.25])).item() == 1


def test_temperature_zero_is_greedy_and_takes_the_first_of_several():
    logits = tokens([[1, 3, 3, 0], [5, 1, 1, 5]])
    for u in (0.0, 0.5, LAST):
        assert pick(logits, tokens([u, u]), temperature=0).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.05, [2]), (0.399, [2]), (0.401, [2, 4]), (0.699, [2, 4]), (0.75, [0, 2, 4]), (0.999, [0, 1, 2, 3, 4])]
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p, kept):
    distribution = np.array([0.15, 0.1, 0.4, 0.05, 0.3])
    u = np.linspace(0, 1, 2000, endpoint=False)
    found = pick(tokens(np.log(distribution)).expand(2000, 5), torch.from_numpy(u), top_p=top_p).numpy()
    assert sorted(set(found)) == kept
    expected = distribution[kept] / distribution[kept].sum()
    np.testing.assert_allclose([(found == v).mean() for v in kept], expected, atol=1e-3)


def test_temperature_bends_the_distribution():
    logits = np.array([0.3, -1.0, 2.0])
    u = np.linspace(0, 1, 5000, endpoint=False)
    found = pick(tokens(logits).expand(5000, 3), torch.from_numpy(u), temperature=2.5).numpy()
    expected = np.exp(logits / 2.5) / np.exp(logits / 2.5).sum()
    np.testing.assert_allclose(np.bincount(found, minlength=3) / 5000, expected, atol=1e-3)


# --- responses --------------------------------------------------------------------------------------------------


def probability(distribution, start, response):
    p = 1.0
    for token in response:
        p, start = p * distribution[start, token], token
    return p


def every_response(length):
    """All responses of a vocabulary of 4 that stop behind token 0, or at the length."""
    whole, open_ = [], [()]
    for _ in range(length):
        grown = [(*r, v) for r in open_ for v in range(VOCAB)]
        whole += [r for r in grown if r[-1] == EOS]
        open_ = [r for r in grown if r[-1] != EOS]
    return whole + open_


def drawn(ids, real):
    return [tuple(row[keep].tolist()) for row, keep in zip(ids, real, strict=True)]


def assert_follows(found, distribution, start, length):
    outcomes = every_response(length)
    expected = np.array([probability(distribution, start, r) for r in outcomes])
    np.testing.assert_allclose(expected.sum(), 1, rtol=1e-6)
    counts = np.array([found.count(r) for r in outcomes])
    assert counts.sum() == len(found), "a response that cannot be"
    large = expected * len(found) >= 5
    observed, wanted = np.append(counts[large], counts[~large].sum()), np.append(expected[large], expected[~large].sum()) * len(found)
    keep = wanted > 0
    assert stats.chisquare(observed[keep], wanted[keep] * observed[keep].sum() / wanted[keep].sum()).pvalue > 1e-3


@pytest.mark.parametrize("options", [{}, {"temperature": 0.6}, {"mixing": 0.3}, {"mixing": 1.0}, {"mixing": 0.3, "temperature": 1.8}])
def test_responses_follow_the_distribution_of_the_chain(options):
    one, other, n = chain(1), chain(2), 6000
    ids, real = respond(one, prompts([[2]] * n), uniforms(n, 3, seed=5), eos=EOS, other=other if "mixing" in options else None, **options)
    t, mixing = options.get("temperature", 1), options.get("mixing", 0)
    p, q = (np.exp(x.log_law.double().numpy() / t) for x in (one, other))
    distribution = mixing * q / q.sum(1, keepdims=True) + (1 - mixing) * p / p.sum(1, keepdims=True)
    assert_follows(drawn(ids, real), distribution, 2, 3)


def test_greedy_and_nucleus_work_in_a_mixture():
    one, other = chain(1), chain(2)
    distribution = 0.5 * one.log_law.double().exp() + 0.5 * other.log_law.double().exp()
    rows = 400
    ids, _ = respond(one, prompts([[3]] * rows), uniforms(rows, 1), eos=EOS, other=other, mixing=0.5, top_p=1e-6)
    assert ids.unique().tolist() == [int(distribution[3].argmax())]
    ids, _ = respond(one, prompts([[3]] * rows), uniforms(rows, 1), eos=EOS, other=other, mixing=0.5, temperature=0)
    greedy = {int(one.log_law[3].argmax()), int(other.log_law[3].argmax())}
    assert set(ids.flatten().tolist()) == greedy and len(greedy) == 2


def test_rows_depend_on_their_own_numbers_alone_and_padding_is_nothing():
    net, u = chain(3, order=2), uniforms(5, 6)
    lists = [[1, 2, 3, 1], [2], [3, 3], [1, 1, 1], [2, 3]]
    ids, real = respond(net, prompts(lists), u, eos=EOS)
    for i, prompt in enumerate(lists):
        alone = drawn(*respond(net, prompts([prompt]), u[i : i + 1], eos=EOS))
        wide = Prompts(torch.tensor([[1] * 4 + prompt]), torch.tensor([[False] * 4 + [True] * len(prompt)]), "tok", "")
        assert alone == drawn(ids, real)[i : i + 1] == drawn(*respond(net, wide, u[i : i + 1], eos=EOS))


def test_a_response_stops_behind_its_end_and_the_batch_behind_the_last():
    net = chain(4)
    rows = 200
    ids, real = respond(net, prompts([[1]] * rows), uniforms(rows, 50), eos=EOS)
    for row, keep in zip(ids.tolist(), real.tolist(), strict=True):
        length = sum(keep)
        assert keep == [True] * length + [False] * (len(keep) - length)
        assert EOS not in row[: length - 1] and (row[length - 1] == EOS or length == 50)
        assert set(row[length:]) <= {EOS}
    assert real[:, -1].any() and ids.shape[1] < 50


def test_padding_entries_of_the_vocabulary_are_never_drawn():
    net = chain(5)
    ids, _ = respond(net, prompts([[1]] * 300), uniforms(300, 4), eos=EOS, vocab=3)
    assert int(ids.max()) == 2


def test_the_model_is_left_as_it_was():
    net = chain(1).train()
    ids, _ = respond(net, prompts([[1]]), uniforms(1, 3), eos=EOS)
    assert net.training and not ids.requires_grad
    assert not respond(net.eval(), prompts([[1]]), uniforms(1, 3), eos=EOS)[0].requires_grad and not net.training


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"mixing": 1.5}, "mixing"),
        ({"width": 0}, "length"),
    ],
)
def test_ranges_are_checked(options, says):
    u = uniforms(1, options.pop("width", 3))
    with pytest.raises(UserError, match=says):
        respond(chain(1), prompts([[1]]), u, eos=EOS, other=chain(2), **options)
