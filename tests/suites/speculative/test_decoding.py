"""The verifier is lossless, exactly; the wall clock counts only where the output is the target's."""

import itertools

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from distillbench.cards.options import options_of
from distillbench.errors import UserError
from distillbench.problems.language_modeling import models as language_models
from distillbench.problems.language_modeling.sampling import draw, respond
from distillbench.problems.language_modeling.texts import Prompts
from distillbench.suites.language_modeling import markov as chains
from distillbench.suites.language_modeling.nets import build
from distillbench.suites.speculative import CARD, decoding, markov
from distillbench.suites.speculative.decoding import measured_speedup, speculate, verify
from distillbench.training.nets import Architecture

# distributions of three tokens in quarters: four evenly spaced numbers are then as good as all numbers in [0, 1)
P = torch.tensor([[2, 1, 1], [1, 3, 0], [0, 2, 2], [1, 1, 2]]).double() / 4
Q = torch.tensor([[1, 2, 1], [2, 2, 0], [1, 1, 2]]).double() / 4
GRID = [(i + 0.5) / 4 for i in range(4)]


def first_tokens(rule, gamma):
    """The distribution of the next ``gamma`` + 1 tokens by going through every proposal and every number that decides on it.

    The distributions at position i are P[i] and Q[i] whatever came before; what a block leaves open is the target's.
    """
    distribution = {}
    for proposals in itertools.product(range(3), repeat=gamma):
        chance = np.prod([float(Q[i, x]) for i, x in enumerate(proposals)])
        if not chance:
            continue
        for uniforms in itertools.product(GRID, repeat=gamma + 1):
            accepted, behind = rule(P[: gamma + 1], Q[:gamma], torch.tensor(proposals), torch.tensor(uniforms).double())
            given = (*proposals[:accepted], behind)
            distribution[given] = distribution.get(given, 0.0) + chance / 4 ** (gamma + 1)
    whole = np.zeros([3] * (gamma + 1))
    for given, chance in distribution.items():
        rest = np.array(chance)
        for i in range(len(given), gamma + 1):
            rest = np.multiply.outer(rest, P[i].numpy())
        whole[given] += rest
    return whole


def expected(gamma):
    distribution = np.array(1.0)
    for i in range(gamma + 1):
        distribution = np.multiply.outer(distribution, P[i].numpy())
    return distribution


@pytest.mark.parametrize("gamma", [1, 2])
def test_the_distribution_of_a_block_is_the_targets_exactly(gamma):
    assert np.abs(first_tokens(verify, gamma) - expected(gamma)).max() < 1e-12


def always(p, q, x, u):
    return verify(p, q, x, torch.cat([torch.zeros_like(u[:-1]), u[-1:]]))


def eager(p, q, x, u):
    return verify(p, q / 1.5, x, u)


def from_target(p, q, x, u):
    accepted, _ = verify(p, q, x, u)
    return accepted, int(draw(p[accepted][None], u[-1:]))


@pytest.mark.parametrize("rule", [always, eager, from_target])
def test_another_rule_is_found_out(rule):
    assert np.abs(first_tokens(rule, 1) - expected(1)).max() > 0.01


def test_a_proposal_that_the_target_excludes_is_never_accepted():
    accepted, behind = verify(P[1:3], Q[:1], torch.tensor([2]), torch.tensor([0.0, 0.3]).double())
    assert (accepted, behind) == (0, 1)


def test_distributions_equal_up_to_rounding_still_give_a_token_of_the_target():
    p = torch.tensor([[0.5, 0.0, 0.5 - 1e-17], [1, 0, 0]]).double()
    q = torch.tensor([[0.5 + 1e-15, 0.0, 0.5]]).double()
    assert verify(p, q, torch.tensor([0]), torch.tensor([1.0, 0.9]).double()) == (0, 2)


# --- whole texts ---


def small():
    """A chain of order 1 over 3 tokens, and a draft."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for _ in range(2):
        net = build(Architecture("chain", {"vocab": 3, "order": 1}), 0)
        net.load_state_dict({"log_law": torch.randn(3, 3, generator=generator).log_softmax(1)})
        found.append(net.eval())
    return found


def statistic(count, gamma):
    """Chi-square of the texts of 3 tokens at most from one prompt, and its degrees of freedom."""
    target, draft = small()
    decoded = speculate(
        target,
        draft,
        Prompts.of([[1]] * count, "abc", 0),
        gamma=gamma,
        length=3,
        eos=0,
        generator=torch.Generator().manual_seed(7),
        vocab=3,
    )
    distribution = chains.distributions(target, 3, 1)
    seen = {}
    for d in decoded:
        assert sum(d.emitted) == len(d.tokens)
        assert all(0 <= a <= gamma and 1 <= e <= a + 1 for a, e in zip(d.accepted, d.emitted, strict=True))
        seen[tuple(d.tokens)] = seen.get(tuple(d.tokens), 0) + 1
    texts = [t for n in (1, 2, 3) for t in itertools.product(range(3), repeat=n) if 0 not in t[:-1] and (t[-1] == 0 or n == 3)]
    assert set(seen) <= set(texts)
    value = 0.0
    for text in texts:
        chance = np.prod([float(distribution[c, v]) for c, v in zip((1, *text), text, strict=False)])
        value += (seen.get(text, 0) - count * chance) ** 2 / (count * chance)
    return value, len(texts) - 1


@pytest.mark.parametrize("gamma", [1, 3])
def test_whole_texts_have_the_targets_distribution(gamma):
    value, freedom = statistic(600, gamma)
    assert chi2.sf(value, freedom) > 0.01


def test_whole_texts_of_another_rule_do_not(monkeypatch):
    monkeypatch.setattr(decoding, "verify", eager)
    value, freedom = statistic(600, 3)
    assert chi2.sf(value, freedom) < 1e-6


def test_what_the_verifier_counts_is_the_closed_form():
    setting = CARD.settings["markov"]
    found = chains.chains(options_of(setting, chains.Options), "test")
    draft = build(Architecture("window-lm", setting.options["student"]["arguments"]), 3).eval()
    prompts = chains.starts(found, 120, 4)
    decoded = speculate(
        found.truth, draft, prompts, gamma=4, length=found.length, eos=0, generator=torch.Generator().manual_seed(1), vocab=16
    )
    per_call, accepted = markov.efficiency(
        chains.distributions(found.truth, 16, 2), chains.distributions(draft, 16, 2), found.start, found.length, 4
    )
    for counts, value in (([d.emitted for d in decoded], per_call), ([d.accepted for d in decoded], accepted)):
        sums, calls = (np.array([f(c) for c in counts], float) for f in (sum, len))
        error = np.std(sums - value * calls, ddof=1) / np.sqrt(len(sums)) / calls.mean()
        assert abs(sums.sum() / calls.sum() - value) < 4 * error
        assert error < 0.06


def test_greedy_output_is_the_targets():
    target, draft = llama(0), llama(1)
    prompts = Prompts.of([[3, 4, 5], [6], [9, 10]], "letters", 0)
    ids, real = respond(target, prompts, torch.zeros(3, 10), eos=0, temperature=0)
    for gamma in (1, 4):
        generator = torch.Generator().manual_seed(0)
        decoded = speculate(target, draft, prompts, gamma=gamma, length=10, eos=0, generator=generator, vocab=64, temperature=0)
        assert [d.tokens for d in decoded] == [row[mask].tolist() for row, mask in zip(ids, real, strict=True)]
    itself = speculate(target, target, prompts, gamma=4, length=10, eos=0, generator=generator, vocab=64, temperature=0)
    assert all(d.emitted in ([5, 5], [5, len(d.tokens) - 5], [len(d.tokens)]) for d in itself)


def test_a_block_without_proposals_is_refused():
    target, draft = small()
    with pytest.raises(UserError, match="at least 1 proposal"):
        speculate(target, draft, Prompts.of([[1]], "abc", 0), gamma=0, length=3, eos=0, generator=torch.Generator(), vocab=3)


# --- the wall clock ---


def llama(seed):
    config = {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,
    }
    return language_models.build(Architecture("transformers", {"config": config}), seed).eval()


PROMPTS = Prompts.of([[3, 4, 5], [6], [9, 10]], "letters", 0)


def test_the_wall_clock_counts_identical_outputs():
    speedup, lossless = measured_speedup(llama(0), llama(1), PROMPTS, length=8, gamma=3, eos=0)
    assert (speedup.metric, lossless.metric) == ("measured_speedup", "lossless")
    assert lossless.value == 1 and lossless.per_example == (1.0, 1.0, 1.0)
    # a useless draft as large as the target: about a quarter of the speed
    assert 0.02 < speedup.value < 1 and speedup.n == 3


def test_every_call_gets_gamma_proposals(monkeypatch):
    target, draft = llama(0), llama(1)
    widths = []
    inner = decoding._generate

    def watched(model, ids, length, eos, helper):
        if helper is not None:
            forward = model.forward
            monkeypatch.setattr(model, "forward", lambda *a, **k: widths.append(k["input_ids"].shape[1]) or forward(*a, **k), raising=False)
        return inner(model, ids, length, eos, helper)

    monkeypatch.setattr(decoding, "_generate", watched)
    measured_speedup(target, draft, Prompts.of([[3]], "letters", 0), length=40, gamma=3, eos=0)
    assert widths and max(widths) == 4


def corrupted(at, ids=None):
    inner = decoding._generate

    def generate(model, prompt, length, eos, helper):
        out = inner(model, prompt, length, eos, helper)
        if helper is not None and (ids is None or prompt.tolist() == ids):
            out = out.clone()
            out[at] = (out[at] + 1) % 64
        return out

    return generate


def test_a_difference_refuses_the_speedup(monkeypatch):
    monkeypatch.setattr(decoding, "_generate", corrupted(2))
    with pytest.raises(UserError, match=r"prompt 0: .* from token 2 on: not lossless"):
        measured_speedup(llama(0), llama(1), PROMPTS, length=8, gamma=3, eos=0)


def test_a_text_that_stops_early_refuses_the_speedup(monkeypatch):
    inner = decoding._generate
    monkeypatch.setattr(decoding, "_generate", lambda m, i, n, e, h: inner(m, i, n, e, h)[: None if h is None else -1])
    with pytest.raises(UserError, match="not lossless"):
        measured_speedup(llama(0), llama(1), PROMPTS, length=8, gamma=3, eos=0)


def test_a_tie_counts_against_lossless_and_not_into_the_speedup(monkeypatch):
    monkeypatch.setattr(decoding, "_generate", corrupted(2, [[6]]))
    monkeypatch.setattr(decoding, "TIE", 1e9)
    speedup, lossless = measured_speedup(llama(0), llama(1), PROMPTS, length=8, gamma=3, eos=0)
    assert lossless.per_example == (1.0, 0.0, 1.0) and speedup.n == 2
    monkeypatch.setattr(decoding, "_generate", corrupted(2))
    with pytest.raises(UserError, match="no prompt gives the same"):
        measured_speedup(llama(0), llama(1), PROMPTS, length=8, gamma=3, eos=0)
