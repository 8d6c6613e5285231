"""The exact setting: closed forms against a literal enumeration, identities, and the judge that samples against both."""

import dataclasses

import numpy as np
import pytest
import torch

from distillbench.cards.options import options_of
from distillbench.errors import UserError
from distillbench.problems.language_modeling.sampling import respond
from distillbench.problems.language_modeling.texts import Texts
from distillbench.runs.identities import seeds_by_role
from distillbench.runs.suite import JudgeContext, TrainContext
from distillbench.suites import speculative as suite
from distillbench.suites.language_modeling import markov as chains
from distillbench.suites.language_modeling.nets import build
from distillbench.suites.speculative import markov
from distillbench.suites.speculative.judge import judge
from distillbench.training.nets import Architecture
from distillbench.training.student import Student
from tests.oracles.language_modeling import speculative as oracle

SETTING = suite.CARD.settings["markov"]
SEEDS = seeds_by_role(0)


def distributions(seed, vocab=3, end=0.2):
    """A target and a draft of order 1, and where texts begin; ``end`` is the target's chance of token 0."""
    random = np.random.default_rng(seed)
    p, q = random.dirichlet(np.ones(vocab), vocab), random.dirichlet(np.ones(vocab), vocab)
    if end is not None:
        p[:, 0] = 0
        p = (1 - end) * p / p.sum(1, keepdims=True)
        p[:, 0] = end
    start = random.dirichlet(np.ones(vocab))
    start[0] = 0
    return p, q, start / start.sum()


def exact(p, q, start, length, gamma):
    return markov.efficiency(torch.tensor(p), torch.tensor(q), torch.tensor(start), length, gamma)


@pytest.mark.parametrize("gamma", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_closed_form_is_the_literal_algorithm(gamma, seed):
    p, q, start = distributions(seed)
    tokens, calls, accepted = oracle.decoded(p, q, start, gamma, 5, end=0)
    assert exact(p, q, start, 5, gamma) == pytest.approx((tokens / calls, accepted / calls), abs=1e-12)


@pytest.mark.parametrize("gamma", [1, 4])
def test_endless_texts_settle_at_the_distribution_of_block_starts(gamma):
    p, q, start = distributions(2, vocab=4, end=None)
    p[:, 0] = q[:, 0] = 0  # token 0 would end the text
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    # token 0 is never visited, so its own row says nothing
    expected = oracle.long_run(p[1:, 1:], q[1:, 1:], gamma)
    at_400, at_800 = (exact(p, q, start, n, gamma)[0] for n in (400, 800))
    assert at_800 == pytest.approx(expected, abs=5e-3)
    assert abs(at_800 - expected) < 0.6 * abs(at_400 - expected)  # what is left is the last block's, and falls with 1 / length


def test_equal_acceptance_everywhere_gives_the_geometric_sum():
    p = np.array([[0, 0.5, 0.5], [0, 0.8, 0.2], [0, 0.1, 0.9]])
    q = np.array([[0, 0.5, 0.5], [0, 0.5, 0.5], [0, 0.4, 0.6]])  # overlap 0.7 from both tokens that occur
    for gamma in (1, 3, 8):
        found, accepted = exact(p, q, np.array([0, 1.0, 0]), 3000, gamma)
        assert found == pytest.approx((1 - 0.7 ** (gamma + 1)) / 0.3, abs=3e-3)
        assert accepted == pytest.approx(found - 1, abs=3e-3)


def test_a_draft_that_is_the_target_fills_every_block():
    p, _, start = distributions(3, end=None)
    p[:, 0] = 0
    p /= p.sum(1, keepdims=True)
    for gamma in (1, 2, 8):
        assert exact(p, p, start, 5 * (gamma + 1), gamma) == pytest.approx((gamma + 1, gamma), abs=1e-12)
        assert exact(p, p, start, 5 * (gamma + 1) + 1, gamma)[0] == pytest.approx((5 * gamma + 6) / 6, abs=1e-12)


def test_a_draft_that_shares_nothing_gives_one_token_a_call():
    p, q = np.tile([0.0, 1, 0], (3, 1)), np.tile([0.0, 0, 1], (3, 1))
    assert exact(p, q, np.array([0, 1.0, 0]), 9, 4) == (1.0, 0.0)


def test_scores_are_bounded_and_best_at_the_target():
    p, q, start = (torch.tensor(x) for x in distributions(4, vocab=5))
    best = markov.scores(p, p, start, 7)
    for mixing in (0.0, 0.5, 0.9):
        found = markov.scores(p, mixing * p + (1 - mixing) * q, start, 7)
        for name, value in found.items():
            low, high = suite.CARD.metric(name).range
            assert low <= value <= high, name
            assert value <= best[name] + 1e-12, name
    efficiencies = [best[f"block_efficiency_{g}"] for g in markov.GAMMAS]
    assert efficiencies == sorted(efficiencies)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_judge_estimates_the_exact_values(temperature):
    found = chains.chains(options_of(SETTING, chains.Options), "test")
    draft = build(Architecture("window-lm", {"vocab": 16, "order": 2, "width": 6}), 3)
    with torch.no_grad():
        draft.output.weight.mul_(4)
    prompts = chains.starts(found, 3000, 1)
    ids, real = respond(
        found.truth, prompts, torch.rand(3000, 16, generator=torch.Generator().manual_seed(2)), eos=0, temperature=temperature
    )
    texts = Texts.join(prompts, torch.arange(3000), ids, real)
    p, q = ((chains.distributions(m, 16, 2).log() / temperature).softmax(1) for m in (found.truth, draft))
    expected = markov.scores(p, q, found.start, found.length)
    measured = {m.metric: m for m in judge(found.truth, draft, texts, vocab=16, temperature=temperature)}
    for name, value in expected.items():
        m = measured[name]
        error = np.std(m.per_example, ddof=1) / np.sqrt(m.n)
        assert 1e-4 < error < 0.02, name
        assert abs(m.value - value) < 4 * error, name


# --- the suite ---


def test_the_setting_scores_what_its_card_names():
    problem = suite.SUITE.problem(TrainContext("markov", SETTING, SEEDS))
    measured = suite.SUITE.evaluate(Student.of(problem.student), JudgeContext("markov", SETTING, SEEDS)).measurements
    assert [m.metric for m in measured] == list(SETTING.metrics)
    assert suite.CARD.at("markov").primary == "acceptance"
    teacher = {
        m.metric: m.value
        for m in suite.SUITE.evaluate(Student.of(problem.teacher.module), JudgeContext("markov", SETTING, SEEDS)).measurements
    }
    assert teacher["acceptance"] == teacher["acceptance_greedy"] == 1
    # texts of 16 tokens at most end within blocks: gamma + 1 is out of reach
    assert 5 < teacher["block_efficiency_8"] < 9


def test_acceptance_is_that_of_language_modeling():
    from distillbench.suites import language_modeling

    student = Student.of(suite.SUITE.problem(TrainContext("markov", SETTING, SEEDS)).student)
    theirs = {
        m.metric: m.value
        for m in language_modeling.SUITE.evaluate(
            student, JudgeContext("markov", language_modeling.CARD.settings["markov"], SEEDS)
        ).measurements
    }
    assert suite.SUITE.evaluate(student, JudgeContext("markov", SETTING, SEEDS)).measurements[0].value == pytest.approx(
        theirs["acceptance"], abs=1e-9
    )


def test_an_unknown_world_is_refused():
    setting = dataclasses.replace(SETTING, options={**SETTING.options, "world": "os"})
    with pytest.raises(UserError, match="unknown world 'os'"):
        suite.SUITE.problem(TrainContext("os", setting, SEEDS))
