"""Proof of seqkd: the identities of Kim and Rush 2016, by enumeration of all responses, and what cut responses teach."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from distillbench.methods.language_modeling import seqkd
from distillbench.problems.language_modeling.oracle import chosen_log_probs
from distillbench.problems.language_modeling.texts import Prompts, TokenBatch
from distillbench.problems.language_modeling.token_losses import Projection, token_losses
from distillbench.suites.language_modeling.nets import Chain, build
from distillbench.training.nets import Architecture
from tests.keyed import stream
from tests.methods.language_modeling.policy import captured, logits, short_run

WORDS = 3


def chain(seed: int) -> Chain:
    """A chain over three words, none of which ends a text."""
    net = build(Architecture("chain", {"vocab": WORDS, "order": 1}), 0).double()
    assert isinstance(net, Chain)
    table = torch.tensor(np.random.default_rng(seed).standard_normal((WORDS, WORDS)))
    net.log_law.data = table.log_softmax(1)
    return net


def all_responses() -> tuple[list[tuple[int, ...]], TokenBatch]:
    """The nine responses of two words, and a batch of them behind one prompt."""
    pairs = list(itertools.product(range(WORDS), repeat=2))
    texts = Prompts.of([[1]], "", 0).with_responses([list(p) for p in pairs], torch.zeros(9, dtype=torch.long), pad=0)
    return pairs, texts.take(torch.arange(9))


def nll(model: Chain, batch: TokenBatch) -> torch.Tensor:
    """-log q of whole responses (9,), by what the method's loss is made of."""
    states = batch.predicted.take(model(batch.ids, batch.attention))
    tokens = -chosen_log_probs(model, states, batch.predicted.labels, vocab=WORDS)
    return tokens.view(9, 2).sum(1).double()


def slope(value: torch.Tensor, model: Chain) -> np.ndarray:
    """The gradient in the table of logits."""
    return torch.autograd.grad(value, model.log_law)[0].numpy()


def test_2_samples_have_the_gradient_of_the_kl_of_whole_responses_which_is_word_level_on_sampled_prefixes() -> None:
    teacher, student = chain(0), chain(1)
    _, batch = all_responses()
    with torch.no_grad():
        log_p = -nll(teacher, batch)
        p = log_p.exp()
        assert p.sum().item() == pytest.approx(1, rel=1e-6)
    expected = (p * nll(student, batch)).sum()  # E over samples of -log q
    theirs = Projection(batch.predicted.take(teacher(batch.ids, batch.attention)).detach(), teacher.head[0].detach())
    states = batch.predicted.take(student(batch.ids, batch.attention))
    word = (p[:, None] * token_losses(states, student.head[0], theirs, "forward_kl").view(9, 2)).sum()
    entropy = -(p * log_p).sum()
    assert expected.item() == pytest.approx((entropy + word).item(), rel=1e-6)
    np.testing.assert_allclose(slope(expected, student), slope(word, student), atol=1e-6)


def test_3_on_other_prefixes_word_level_distillation_is_not_that_gradient() -> None:
    teacher, student = chain(0), chain(1)
    _, batch = all_responses()
    p = nll(teacher, batch).neg().exp().detach()
    theirs = Projection(batch.predicted.take(teacher(batch.ids, batch.attention)).detach(), teacher.head[0].detach())
    states = batch.predicted.take(student(batch.ids, batch.attention))
    word = token_losses(states, student.head[0], theirs, "forward_kl").view(9, 2).sum(1).mean()  # every prefix alike
    assert np.abs(slope((p * nll(student, batch)).sum(), student) - slope(word, student)).max() > 1e-2


def test_4_at_the_teachers_weights_samples_pull_nowhere_and_the_mode_sharpens() -> None:
    model = chain(0)
    _, batch = all_responses()
    p = nll(model, batch).neg().exp().detach()
    assert np.abs(slope((p * nll(model, batch)).sum(), model)).max() < 1e-6
    assert np.abs(slope(nll(model, batch)[p.argmax()], model)).max() > 0.1


def test_1_a_teacher_that_has_one_response_is_matched_at_loss_0() -> None:
    problem, _, loss, batches = captured(seqkd, temperature=0.0)
    batch = next(stream(batches))
    greedy = build(Architecture("chain", {"vocab": 16, "order": 2}), 0)
    greedy.load_state_dict({"log_law": 1e4 * problem.teacher.module.head[0].T})  # all mass on the most probable word
    assert problem.nll(batch, greedy).abs().max() < 1e-3
    assert loss(batch)["nll"].item() > 1


@pytest.mark.parametrize("fresh", [False, True])
def test_the_loss_is_the_mean_over_tokens_of_the_teachers_text(fresh: bool) -> None:
    problem, _, loss, batches = captured(seqkd, fresh=fresh)
    batch = next(stream(batches))
    s, _, _ = logits(problem, batch)
    labels = batch.predicted.labels.numpy()
    assert loss(batch)["nll"].item() == pytest.approx(-log_softmax(s, axis=1)[np.arange(len(s)), labels].mean(), rel=1e-5)
    assert int(batch.response.sum()) == len(labels)  # prompts are no part of it


def test_text_comes_from_the_teacher_once_and_fresh_text_at_every_step() -> None:
    _, _, _, fixed = captured(seqkd)
    _, _, _, fresh = captured(seqkd, fresh=True)
    epoch = 1024 // 32
    assert torch.equal(fixed.texts.take(torch.arange(4)).ids, captured(seqkd)[3].texts.take(torch.arange(4)).ids)
    assert next(stream(fresh)).text == ""
    drawn = stream(fresh)
    one = next(drawn)
    later = next(itertools.islice(drawn, epoch - 1, None))
    assert one.ids.shape != later.ids.shape or not torch.equal(one.ids, later.ids)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_trap_responses_cut_at_the_length_limit_hold_no_end_and_are_not_taught_to_stop(temperature: float) -> None:
    problem, _, loss, batches = captured(seqkd, temperature=temperature)
    texts = batches.texts
    ends = ((texts.ids == problem.eos) & texts.response).any(1)
    tokens = texts.response.sum(1)
    assert 0.02 < ends.logical_not().float().mean() < 0.9
    assert (tokens[~ends] == problem.length).all()
    batch = texts.take((~ends).nonzero().squeeze(1)[:8])
    assert not (batch.predicted.labels == problem.eos).any()
    loss(batch)["nll"].backward()
    _, bias = problem.student.head
    assert bias is not None
    assert bias.grad is not None
    assert bias.grad[problem.eos] > 0  # a step lowers the chance to stop, never raises it


def test_whole_responses_end_with_one_end_of_sequence_that_counts() -> None:
    problem, _, _, batches = captured(seqkd)
    texts = batches.texts
    stops = (texts.ids == problem.eos) & texts.response
    assert (stops.sum(1) <= 1).all()
    last = texts.response.shape[1] - 1 - texts.response.flip(1).long().argmax(1)
    ended = stops.any(1)
    assert stops[ended].gather(1, last[ended][:, None]).all()


def test_training_lowers_the_loss_on_the_teachers_text() -> None:
    _, run, _ = short_run(seqkd, examples=3200)
    assert np.mean(run.trace["fit/nll"][-5:]) < run.trace["fit/nll"][0] - 0.2
