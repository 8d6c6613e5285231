"""What the harness costs over the same loop written bare: at most 3%. Ratios on one machine; run with ``pytest benchmarks``."""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distillbench.methods.classification import kd
from distillbench.problems.classification.losses import cross_entropy, kl_divergence
from distillbench.runs.identities import seeds_by_role
from distillbench.runs.suite import TrainContext
from distillbench.suites import image_classification as suite
from distillbench.training.data import Batch, Batches, Request
from distillbench.training.run import Run

SETTING = suite.CARD.settings["digits"]
SEEDS = seeds_by_role(0)
STEPS = SETTING.budget.student_examples // 64
T, CE, KD = 4.0, 0.1, 0.9
TURN = 9  # steps before the other one is let on
REPEATS = 9
MOST = 1.03

Player = Callable[[Any, Path], dict[str, Tensor]]


class Baton:
    """Lets two threads run in turns, never both at once, and times each turn in CPU seconds."""

    def __init__(self) -> None:
        self.condition = threading.Condition()
        self.turn = 0
        self.running = {0, 1}
        self.turns: list[list[float]] = [[], []]
        self.start = 0.0

    def take(self, me: int) -> None:
        with self.condition:
            self.condition.wait_for(lambda: self.turn == me)
        self.start = time.thread_time()

    def give(self, me: int, leave: bool = False) -> None:
        self.turns[me].append(time.thread_time() - self.start)
        with self.condition:
            if leave:
                self.running.discard(me)
            if 1 - me in self.running:
                self.turn = 1 - me
            self.condition.notify_all()
        if not leave:
            self.take(me)


class InTurns(Batches[Batch]):
    """Batches that hand the baton on after every few."""

    def __init__(self, batches: Batches[Batch], baton: Baton, me: int) -> None:
        self.batches, self.baton, self.me, self.batch_size = batches, baton, me, batches.batch_size

    def rows(self, position: int) -> Tensor:
        return self.batches.rows(position)

    def take(self, request: Request) -> Batch:
        return self.batches.take(request)

    def load(self, requests: Iterator[Request]) -> Iterator[Batch]:
        for i, batch in enumerate(self.batches.load(requests), 1):
            yield batch
            if i % TURN == 0:
                self.baton.give(self.me)


def problem(baton: Baton, me: int) -> Any:
    made = suite.SUITE.problem(TrainContext("digits", SETTING, SEEDS))
    made.teacher.logits(next(made.batches.stream(0)))  # the table is there, for the one and for the other
    return dataclasses.replace(made, batches=InTurns(made.batches, baton, me))


def harness(given: Any, folder: Path) -> dict[str, Tensor]:
    """kd through the engine, with a folder for checkpoints and the default interval."""
    run = Run(seeds=SEEDS, budget=SETTING.budget, training=SETTING.training, oracles=[given.teacher], folder=folder)
    return kd.distill(run.watching(given, kd.CARD), run, temperature=T, ce_weight=CE, kd_weight=KD).weights


def bare(given: Any, _: Path) -> dict[str, Tensor]:
    """The same training as a loop by hand."""
    student, table = given.student, given.teacher._tables["logits"]
    rate = SETTING.training.learning_rate
    optimizer = torch.optim.AdamW(student.parameters(), lr=rate, weight_decay=0.0, fused=True)
    stream = given.batches.stream(0)
    student.train()
    for step in range(STEPS):
        batch = next(stream)
        for group in optimizer.param_groups:
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        optimizer.zero_grad()
        logits = student(batch.inputs)
        ce = (CE * cross_entropy(logits, batch.labels)).mean()
        soft = (KD * kl_divergence(logits, table[batch.index], temperature=T)).mean()
        (ce + soft).backward()
        optimizer.step()
    return {k: v.detach().clone() for k, v in student.state_dict().items()}


def race(folder: Path, players: Sequence[Player]) -> tuple[list[list[float]], list[dict[str, Tensor]]]:
    """CPU seconds of every turn, and the weights, of two trainings that run in turns."""
    baton = Baton()
    given = [problem(baton, me) for me in (0, 1)]
    weights: list[dict[str, Tensor]] = [{}, {}]

    def play(me: int) -> None:
        torch.set_num_threads(1)
        baton.take(me)
        try:
            weights[me] = players[me](given[me], folder)
        finally:
            baton.give(me, leave=True)

    threads = [threading.Thread(target=play, args=(me,)) for me in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return baton.turns, weights


def compare(folder: Path, one: Player, other: Player) -> tuple[float, float]:
    """Cost of ``one`` over ``other``, and milliseconds a step of the latter.

    The trainings are repeated, first the one ahead and then the other. A turn does the same work every time, so its least
    time is its cost and all above is the machine's noise; the sum over turns keeps what happens in a few of them only.
    """
    turns: list[list[list[float]]] = [[], []]
    for i in range(REPEATS):
        first = i % 2
        seconds, weights = race(folder / str(i), (one, other) if first == 0 else (other, one))
        assert weights[1] and all(torch.equal(weights[0][k], v) for k, v in weights[1].items())  # the same training, bit for bit
        turns[0].append(seconds[first])
        turns[1].append(seconds[1 - first])
    ours, theirs = (sum(min(times) for times in zip(*repeats, strict=True)) for repeats in turns)
    return ours / theirs, 1e3 * theirs / STEPS


def test_the_harness_costs_at_most_three_percent(tmp_path: Path) -> None:
    race(tmp_path / "warm", (harness, bare))
    ratio, step = compare(tmp_path, harness, bare)
    print(f"\nharness / bare: {ratio:.4f} over {REPEATS} trainings; bare {step:.3f} ms per step")
    assert ratio <= MOST
