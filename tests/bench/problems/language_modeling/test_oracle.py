"""The teacher of language models: metering, cached distributions, responses that survive a kill and that two processes share."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from distillbench.errors import UserError
from distillbench.problems.language_modeling.oracle import LanguageOracle, chosen_log_probs
from distillbench.problems.language_modeling.texts import Prompts
from distillbench.problems.language_modeling.token_losses import Projection, TopK
from distillbench.suites.language_modeling.nets import build
from distillbench.training.nets import Architecture

ROOT = Path(__file__).parents[4]
VOCAB = 60


def model(seed=0, vocab=VOCAB):
    net = build(Architecture("window-lm", {"vocab": vocab, "order": 3, "width": 8}), seed)
    with torch.no_grad():
        net.output.weight.mul_(8)
    return net


def oracle(cache=None, net=None, **options):
    return LanguageOracle(net or model(), tokenizer="tok", vocab=VOCAB, eos=0, seed=7, cache=cache, **options)


def prompts(count=100, tokenizer="tok"):
    rng = np.random.default_rng(0)
    return Prompts.of([rng.integers(1, VOCAB, rng.integers(1, 6)).tolist() for _ in range(count)], tokenizer, 0)


def references(count=100, seed=1):
    rng = np.random.default_rng(seed)
    return prompts(count).with_responses([rng.integers(1, VOCAB, rng.integers(1, 9)).tolist() for _ in range(count)], pad=0)


def exact_distributions(net, batch):
    """Next-token log-probabilities of the tokens that count, one text at a time, in numpy."""
    found = []
    weight, bias = (x.detach().double().numpy() for x in net.head)
    for i in range(len(batch)):
        real = batch.attention[i]
        with torch.no_grad():
            states = net(batch.ids[i, real][None], torch.ones(1, int(real.sum()), dtype=torch.bool))[0].double().numpy()
        found.append(log_softmax(states @ weight.T + bias, axis=1)[batch.response[i, real].nonzero()[:, 0].numpy() - 1])
    return np.concatenate(found)


# --- distributions -------------------------------------------------------------------------------------------------------


def test_exact_distributions_and_what_they_cost():
    teacher, batch = oracle(), references().take(torch.tensor([3, 50, 7]))
    distribution = teacher.distributions(batch)
    assert isinstance(distribution, Projection) and not distribution.hidden.requires_grad
    expected = exact_distributions(model(), batch)
    np.testing.assert_allclose((distribution.hidden @ distribution.weight.T + distribution.bias).log_softmax(1), expected, atol=1e-5)
    labels = batch.predicted.labels.numpy()
    np.testing.assert_allclose(teacher.log_probs(batch), expected[np.arange(len(labels)), labels], atol=1e-5)
    assert teacher.meter.counts["teacher_examples"] == teacher.meter.counts["teacher_forwards"] == 6


@pytest.mark.parametrize("kept", [True, False])
def test_known_texts_are_answered_from_the_cache(tmp_path, kept):
    texts = references()
    teacher = oracle(tmp_path if kept else None, top_k=12)
    teacher.remember(texts)
    batch = texts.take(torch.tensor([3, 99, 64, 3]))
    distribution = teacher.distributions(batch)
    counts = teacher.meter.counts
    assert isinstance(distribution, TopK) and distribution.temperature == 1
    assert counts["teacher_examples"] == 4 and counts["teacher_forwards"] == 100
    expected = exact_distributions(model(), batch)
    p = np.exp(np.take_along_axis(expected, distribution.ids.numpy(), 1))
    np.testing.assert_array_equal(distribution.ids, np.sort(np.argsort(-expected, axis=1)[:, :12], axis=1))
    np.testing.assert_allclose(distribution.tail, 1 - p.sum(1), atol=1e-5)
    assert (p * np.log(p / distribution.log_probs.exp().numpy())).sum(1).max() < 5e-3
    part = teacher.distributions(batch.part(1, 3))
    n = int(batch.response[0].sum())
    np.testing.assert_array_equal(part.log_probs, distribution.log_probs[n : n + part.log_probs.shape[0]])
    assert counts["teacher_examples"] == 6 and counts["teacher_forwards"] == 100
    again = oracle(tmp_path if kept else None, top_k=12)
    again.remember(texts)
    np.testing.assert_array_equal(again.distributions(batch).log_probs, distribution.log_probs)
    assert again.meter.counts["teacher_examples"] == 4
    assert again.meter.counts["teacher_forwards"] == (0 if kept else 100)


def test_what_is_not_known_is_answered_exactly():
    texts = references()
    teacher = oracle(top_k=12)
    batch = texts.take(torch.tensor([1, 2]))
    assert isinstance(teacher.distributions(batch), Projection)  # nobody remembers it
    teacher.remember(texts)
    assert isinstance(teacher.distributions(batch, exact=True), Projection)
    assert isinstance(teacher.distributions(dataclasses.replace(batch, rows=torch.tensor([1, -1]))), Projection)
    assert isinstance(teacher.distributions(dataclasses.replace(batch, text="")), Projection)
    altered = dataclasses.replace(batch, ids=batch.ids.where(~batch.response, 5))
    distribution = teacher.distributions(altered)  # the rows say one thing, the bytes another
    assert isinstance(distribution, Projection)
    np.testing.assert_allclose(
        (distribution.hidden @ distribution.weight.T + distribution.bias).log_softmax(1), exact_distributions(model(), altered), atol=1e-5
    )
    assert isinstance(teacher.distributions(batch), TopK)


def test_a_vocabulary_that_is_no_larger_than_k_stays_exact():
    texts = references()
    teacher = oracle(top_k=VOCAB)
    teacher.remember(texts)
    assert isinstance(teacher.distributions(texts.take(torch.tensor([1]))), Projection)
    with pytest.raises(UserError, match="top-k is -1"):
        oracle(top_k=-1)


def test_values_do_not_depend_on_who_asks_first(tmp_path):
    texts = references()
    distributions = []
    for i, first in enumerate(([0], [99, 3], list(range(50)))):
        teacher = oracle(tmp_path / str(i), top_k=5)
        teacher.remember(texts)
        teacher.distributions(texts.take(torch.tensor(first)))
        distributions.append(teacher.distributions(texts.take(torch.arange(100))).log_probs)
    assert torch.equal(distributions[0], distributions[1]) and torch.equal(distributions[0], distributions[2])


def test_other_networks_with_the_same_weights_share_nothing(tmp_path):
    """The tables of a network whose weights have the same bytes, but that is another function."""
    texts = references()

    def ask(net):
        teacher = oracle(tmp_path, net, top_k=5)
        teacher.remember(texts)
        return teacher, teacher.distributions(texts.take(torch.arange(9)))

    one, other = model(), model()
    other.mix[1] = torch.nn.ReLU()
    other.architecture = Architecture("window-lm", {"vocab": VOCAB, "order": 3, "width": 8, "relu": True})
    (first, distribution), (second, changed) = ask(one), ask(other)
    assert first.digest == second.digest and not torch.equal(distribution.log_probs, changed.log_probs)
    p = prompts(5)
    texts = [t.responses(p, samples=1, length=6).digest for t in (first, second)]
    assert texts[0] != texts[1]


def test_another_tokenizer_is_refused():
    texts = references()
    batch = dataclasses.replace(texts.take(torch.tensor([1])), tokenizer="other")
    teacher = oracle(top_k=5)
    teacher.remember(texts)
    for ask in (teacher.distributions, teacher.states, teacher.log_probs):
        with pytest.raises(UserError, match="another tokenizer than the teacher's"):
            ask(batch)
    with pytest.raises(UserError, match="another tokenizer than the teacher's"):
        teacher.responses(prompts(tokenizer="other"), samples=1, length=3)
    assert not any(teacher.meter.counts.values())


def test_chosen_log_probs_have_the_gradient_of_the_whole_table():
    net, texts = model(), references()
    batch = texts.take(torch.arange(6))
    states = batch.predicted.take(net(batch.ids, batch.attention)).detach().requires_grad_()
    labels = batch.predicted.labels
    dense = net.project(states)[:, :50].double().log_softmax(1).gather(1, labels.clamp(max=49)[:, None]).squeeze(1)
    ours = chosen_log_probs(net, states, labels.clamp(max=49), vocab=50, chunk=4)
    np.testing.assert_allclose(ours.detach(), dense.detach(), atol=1e-5)
    weights = torch.linspace(-1, 1, len(labels))
    slopes = [torch.autograd.grad((x * weights).sum(), states, retain_graph=True)[0] for x in (ours, dense)]
    np.testing.assert_allclose(*slopes, atol=1e-5)


# --- responses --------------------------------------------------------------------------------------------------


def test_responses_are_generated_and_metered_once_a_run(tmp_path):
    p, totals = prompts(70), []
    for _ in range(2):
        teacher = oracle(tmp_path)
        texts = [teacher.responses(p, samples=2, length=6) for _ in range(3)]
        assert texts[0].digest == texts[1].digest == texts[2].digest and len(texts[0]) == 140
        assert texts[0].index.tolist() == [*range(70), *range(70)]
        totals.append(teacher.meter.counts["teacher_tokens"])
        assert totals[-1] == int(texts[0].response.sum())
        teacher.responses(p, samples=2, length=6, temperature=0.5)
        assert teacher.meter.counts["teacher_tokens"] > totals[-1]
    assert totals[0] == totals[1]


def test_what_the_text_depends_on(tmp_path):
    p = prompts(20)
    plain = {"samples": 1, "length": 6}
    asked = [
        plain,
        {**plain, "role": "x"},
        {**plain, "temperature": 2.0},
        {**plain, "length": 5},
        {**plain, "top_p": 0.3},
        {**plain, "samples": 2},
    ]
    cached, fresh = oracle(tmp_path), oracle()
    digests = [cached.responses(p, **options).digest for options in asked]
    assert len(set(digests)) == len(asked)
    assert [fresh.responses(p, **options).digest for options in asked] == digests
    assert oracle(tmp_path, model(1)).responses(p, **plain).digest not in digests
    first = cached.responses(p, **{**plain, "samples": 2})
    assert not torch.equal(first.ids[:20], first.ids[20:])  # samples of a prompt differ


def test_responses_are_known_texts(tmp_path):
    teacher = oracle(tmp_path, top_k=5)
    texts = teacher.responses(prompts(10), samples=1, length=4)
    assert isinstance(teacher.distributions(texts.take(torch.tensor([2]))), TopK)


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_a_damaged_part_is_generated_anew(tmp_path, damage):
    p = prompts(70)
    whole = oracle(tmp_path).responses(p, samples=1, length=5).digest
    path = sorted(tmp_path.glob("texts/*/*.part"))[1]
    data = bytearray(path.read_bytes())
    sound = bytes(data)
    data[-1] ^= 1
    path.write_bytes({"cut": sound[:-9], "empty": b"", "flip": bytes(data)}[damage])
    assert oracle(tmp_path).responses(p, samples=1, length=5).digest == whole
    assert path.read_bytes() == sound


def test_no_responses_are_refused():
    with pytest.raises(UserError, match="at least one"):
        oracle().responses(prompts(3), samples=0, length=4)


# Five parts of responses, each of which leaves a line with the generating process in a log that both share.
PROCESS = """
import os, sys, time
from pathlib import Path
from tests.bench.problems.language_modeling.test_oracle import model, oracle, prompts
net = model()
def decode(ids, attention, state=None, decode=net.decode):
    if state is None:
        with open(sys.argv[2], "a") as log:
            log.write(f"{os.getpid()}" + chr(10))
    time.sleep(0.05)
    return decode(ids, attention, state)
net.decode = decode
print(oracle(Path(sys.argv[1]), net).responses(prompts(300), samples=1, length=6).digest)
"""


@pytest.mark.slow
def test_two_processes_share_the_work_and_one_goes_on_where_the_other_is_killed(tmp_path):
    cache, log = tmp_path / "cache", tmp_path / "log"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROCESS, str(cache), str(log)]
    both = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(2)
    ]

    def working():
        return log.read_text().split() if log.exists() else []

    deadline = time.monotonic() + 100
    while len(working()) < 3:  # somewhere within the third of five parts
        assert time.monotonic() < deadline and all(p.poll() is None for p in both), [p.communicate() for p in both]
        time.sleep(0.002)
    victim, other = sorted(both, key=lambda p: str(p.pid) != working()[2])
    victim.kill()
    victim.communicate()
    assert victim.returncode == -9
    out, error = other.communicate(timeout=100)
    assert other.returncode == 0, error
    assert len(working()) == 5 + 1, "only the part under way when one was killed is generated once more"
    assert out.split() == [oracle().responses(prompts(300), samples=1, length=6).digest]
    idle = model()
    idle.decode = None
    assert out.split() == [oracle(cache, idle).responses(prompts(300), samples=1, length=6).digest]
