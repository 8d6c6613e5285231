"""What a method keeps beside weights: ``after`` sees the whole batch once per update, and ``run.state`` survives a kill."""

from __future__ import annotations

import itertools
import math
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from distillbench.cards.card import Budget, Training
from distillbench.training.data import Arrays, Shuffled
from distillbench.training.nets import Architecture
from distillbench.training.run import Learner, Run, coupled
from distillbench.training.student import tensor_digest
from tests.bench.conftest import ENVIRONMENT

SGD = Training(batch_size=8, optimizer="sgd", learning_rate=0.1)


def linear():
    torch.manual_seed(0)
    net = nn.Linear(3, 1)
    net.architecture = Architecture("linear", {})
    return net


def batches():
    rows = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    data = Arrays(rows, rows.sum(1), torch.ones(40, dtype=torch.bool), tensor_digest({"rows": rows}))
    return Shuffled(data, torch.arange(40), 8, seed=5)


def make(steps=20, **options):
    seeds = {"noise": 1, "order": 2, "init": 3}
    return Run(seeds=seeds, budget=Budget(student_examples=8 * steps), training=SGD, **options)


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_after_gets_the_loss_of_the_whole_batch_once_an_update(parts):
    run, net, seen, examples = make(micro_batches=parts), linear(), [], []
    stream = batches().stream(0)

    def loss(batch):
        error = (net(batch.inputs).squeeze(1) - batch.labels).square()
        return run.loss(batch, square=error, half=0.5 * error)

    def whole(weights):
        batch = next(stream)
        return float((batch.inputs @ weights[0].T + weights[1] - batch.labels[:, None]).square().mean())

    before = [[p.detach().clone() for p in net.parameters()]]

    def after(terms):
        seen.append({k: float(v) for k, v in terms.items()})
        assert not any(v.requires_grad for v in terms.values())
        examples.append(run.meter.counts["student_examples"])
        before.append([p.detach().clone() for p in net.parameters()])

    run.fit(net, loss, batches(), after=after)
    assert len(seen) == 20
    expected = [whole(weights) for weights in before[:-1]]  # the loss before the step, the weights behind it
    np.testing.assert_allclose([x["square"] for x in seen], expected, rtol=1e-5)
    np.testing.assert_allclose([x["half"] for x in seen], np.array(expected) / 2, rtol=1e-5)
    assert all(not torch.equal(a[0], b[0]) for a, b in itertools.pairwise(before))


def test_every_learner_has_its_own_after():
    run, net, critic, seen = make(), linear(), linear(), []

    def error(module):
        return lambda b: run.loss(b, x=(module(b.inputs).squeeze(1) - b.labels).square())

    first = Learner(critic, error(critic), updates=2, counts=None, after=lambda terms: seen.append("critic"))
    run.loop([first, Learner(net, error(net), after=lambda terms: seen.append("student"))], batches(), steps=3)
    assert seen == ["critic", "critic", "student"] * 3


def train(run, die_at=None):
    """A schedule that follows the loss, a replay buffer, and nested values: all in ``run.state``."""
    net = linear()
    for phase in ("one", "two"):
        with run.phase(phase):
            state = run.state.setdefault(phase, {"weight": 1.0, "buffer": torch.zeros(4, 3), "seen": [], "nested": {"n": (1, None, "a")}})
            assert state["nested"] == {"n": (1, None, "a")}

            def loss(batch, phase=phase):
                state = run.state[phase]  # a resumed loop brings its own
                state["buffer"] = torch.cat([state["buffer"], batch.inputs[:1]])[-4:]
                pull = coupled(lambda: (net.weight - state["buffer"].mean(0)).square().mean())
                return run.loss(batch, fit=state["weight"] * (net(batch.inputs).squeeze(1) - batch.labels).square(), pull=pull)

            def after(terms, phase=phase):
                state = run.state[phase]
                state["weight"] = 0.9 * state["weight"] + 0.1 * math.tanh(float(terms["fit"]))
                state["seen"].append(float(terms["pull"]))
                if die_at == (phase, len(state["seen"])):
                    print("dying", flush=True)
                    os.kill(os.getpid(), signal.SIGKILL)

            run.fit(net, loss, batches(), share=0.5, after=after)
    return net


def plain(value):
    if isinstance(value, torch.Tensor):
        return value.tolist()
    return {k: plain(v) for k, v in value.items()} if isinstance(value, dict) else value


SCRIPT = """
import sys
from pathlib import Path
from tests.bench.training.test_run_state import make, train
phase, step = sys.argv[2:]
train(make(folder=Path(sys.argv[1]), checkpoint_seconds=0.0), (phase, int(step)))
"""


def test_state_survives_a_kill_bit_for_bit(tmp_path):
    whole = make()
    expected = train(whole)
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), "two", "4"]
    died = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=100, check=False)
    assert died.returncode == -signal.SIGKILL and died.stdout == "dying\n", died.stderr
    resumed = make(folder=tmp_path, checkpoint_seconds=0.0)
    net = train(resumed)
    assert torch.equal(net.weight, expected.weight) and torch.equal(net.bias, expected.bias)
    assert plain(resumed.state) == plain(whole.state)
    assert [len(resumed.state[p]["seen"]) for p in ("one", "two")] == [10, 10]
    assert resumed.meter.counts["student_examples"] == 160


def test_state_of_a_finished_loop_is_restored(tmp_path):
    first = make(folder=tmp_path, checkpoint_seconds=0.0)
    train(first)
    again = make(folder=tmp_path, checkpoint_seconds=0.0)
    train(again, ("two", 1))  # it would die if anything were computed anew
    assert plain(again.state) == plain(first.state)


def test_what_a_checkpoint_cannot_hold_is_loud(tmp_path):
    run, net = make(folder=tmp_path, checkpoint_seconds=0.0), linear()
    run.state["x"] = np.zeros(3)
    with pytest.raises(TypeError, match="cannot hold ndarray"):
        run.fit(net, lambda b: run.loss(b, x=net(b.inputs).squeeze(1).square()), batches())
