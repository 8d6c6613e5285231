import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
TRACK = "image-classification/blobs"

# A throw-away method; ``body`` is what distill does, ``card`` is more of its card.
METHOD = """
import os, sys, time
import torch
from distillbench.cards.card import Card, Integer, Real
from distillbench.problems.classification.losses import cross_entropy, kl_divergence
from distillbench.training.run import Learner
CARD = Card(slug="{slug}", version=1, problem="{problem}", title="throw-away", control=True, {card})
def distill(problem, run, **hyper):
    def loss(batch):
        return run.loss(batch, kd=kl_divergence(problem.student(batch.inputs), problem.teacher.logits(batch), temperature=2.0))
{body}
"""
FIT = "return run.fit(problem.student, loss, problem.batches)"


@pytest.fixture
def write_method(tmp_path):
    """``write_method(slug, body, card=..., problem=...)`` writes a throw-away method file and returns its path."""

    def write(slug, body=FIT, card="", problem="classification"):
        path = tmp_path / f"{slug}.py"
        path.write_text(METHOD.format(slug=slug, body="\n".join(f"    {line}" for line in body.splitlines()), card=card, problem=problem))
        return path

    return write


@pytest.fixture
def cli(monkeypatch, capsys):
    """``cli("run", ...)`` calls the command in this process: (exit code, stdout, stderr)."""
    import distillbench.cli.arguments
    import distillbench.cli.main

    monkeypatch.setattr(distillbench.cli.arguments, "entry_points", lambda group: [])  # only the engine's own commands

    def call(*arguments):
        capsys.readouterr()
        code = distillbench.cli.main.main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def start(*arguments, **options):
    """The command as a child in a process group of its own."""
    command = [sys.executable, "-m", "distillbench", *(str(a) for a in arguments)]
    # A shell ignores Ctrl-C for what it runs in the background, and children inherit that: tests that send it must not depend on it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, **options
        )
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.fixture
def child():
    """Starts the command as a child (see :func:`start`); what is left of it at the end is killed."""
    children = []

    def launch(*arguments, **options):
        children.append(start(*arguments, **options))
        return children[-1]

    yield launch
    for process in children:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.communicate()


@pytest.fixture
def python():
    """``python(code, *argv)`` runs code in a fresh interpreter and returns its stdout."""

    def run(code, *argv):
        done = subprocess.run(
            [sys.executable, "-c", code, *(str(a) for a in argv)], env=ENVIRONMENT, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
