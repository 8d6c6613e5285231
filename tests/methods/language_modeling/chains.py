"""The analytic problem, and runs on it, for tests of methods that sample."""

import dataclasses

import torch

from distillbench.cards.card import Budget
from distillbench.runs.suite import JudgeContext, TrainContext
from distillbench.suites import language_modeling as suite
from distillbench.training.observer import Observer
from distillbench.training.run import Run
from distillbench.training.student import tensor_digest

SEEDS = {"teacher": 1, "init": 2, "data": 3, "order": 4, "noise": 5}


class Killed(Exception):
    pass


class Dies(Observer):
    """Kills a run when the checkpoint of step ``kill_at`` has been written, the only one."""

    def __init__(self, kill_at):
        self.kill_at = kill_at

    def saves(self, step, steps):
        return step == self.kill_at

    def saved(self, written):
        if written:
            raise Killed


def markov(**options):
    setting = suite.CARD.settings["markov"]
    setting = dataclasses.replace(setting, options={**setting.options, **options})
    return setting, suite.SUITE.problem(TrainContext("markov", setting, SEEDS, tuning=True))


def run(setting, problem, steps, folder=None, kill_at=None, **training):
    """A run of ``steps`` batches; with ``kill_at`` it dies when the checkpoint of that step has been written, the only one."""
    budget = Budget(student_examples=steps * setting.training.batch_size)
    return Run(
        seeds=SEEDS,
        budget=budget,
        training=dataclasses.replace(setting.training, **training),
        oracles=[problem.teacher],
        folder=folder,
        checkpoint_seconds=0.0 if kill_at else 3600.0,
        observer=Dies(kill_at) if kill_at else None,
    )


def scores(setting, student):
    """The exact metrics of an exported student."""
    torch.set_num_threads(1)
    return {m.metric: m.value for m in suite.SUITE.evaluate(student, JudgeContext("markov", setting, SEEDS, split="tune")).measurements}


def digest(student):
    return tensor_digest(student.weights)
