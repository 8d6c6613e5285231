"""What the proofs of the methods on given and own text share: the loss and the batches that ``distill`` trains on, and a short run."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from distillbench.cards.card import Budget
from distillbench.problems.language_modeling.problem import LanguageModeling
from distillbench.problems.language_modeling.texts import TokenBatch
from distillbench.problems.language_modeling.token_losses import Projection, token_losses
from distillbench.runs.identities import seeds_by_role
from distillbench.runs.suite import TrainContext
from distillbench.suites import language_modeling
from distillbench.training.run import Run
from distillbench.training.student import Student

MARKOV = language_modeling.CARD.settings["markov"]


def markov(seed: int = 0) -> LanguageModeling:
    return language_modeling.SUITE.problem(TrainContext("markov", MARKOV, seeds_by_role(seed), tuning=True))


def short_run(method: ModuleType, *, examples: int = 320, micro_batches: int = 1, **hp: Any) -> tuple[Student, Run, LanguageModeling]:
    """``distill`` with a small budget, the card's defaults and ``hp`` over them."""
    problem = markov()
    run = Run(
        seeds=seeds_by_role(0),
        budget=Budget(student_examples=examples),
        training=MARKOV.training,
        oracles=[problem.teacher],
        micro_batches=micro_batches,
    )
    defaults = {name: h.default for name, h in method.CARD.hyperparameters.items()}
    return method.distill(problem, run, **{**defaults, **hp}), run, problem


def captured(method: ModuleType, **hp: Any) -> tuple[LanguageModeling, Run, Callable[[Any], Any], Any]:
    """Problem, run, and the loss and batches that ``distill`` hands to its last ``run.fit``, which trains nothing here."""
    problem = markov()
    run = Run(seeds=seeds_by_role(0), budget=Budget(student_examples=320), training=MARKOV.training, oracles=[problem.teacher])
    found: list[Any] = []
    run.fit = lambda student, loss, batches, **options: found.append((loss, batches))  # type: ignore[method-assign, assignment]
    defaults = {name: h.default for name, h in method.CARD.hyperparameters.items()}
    method.distill(problem, run, **{**defaults, **hp})
    return problem, run, *found[-1]


def logits(problem: LanguageModeling, batch: TokenBatch) -> tuple[Any, Any, Any]:
    """Logits of student and teacher at the tokens that count, (N, V) float64 arrays, and the row of each token."""
    rows = batch.predicted.rows
    with torch.no_grad():
        both = [
            m.logits(batch.ids, batch.attention).flatten(0, 1)[rows].double().numpy() for m in (problem.student, problem.teacher.module)
        ]
    return both[0], both[1], (rows // batch.ids.shape[1]).numpy()


def by_logits(student: torch.Tensor, teacher: torch.Tensor, mix: str, **options: Any) -> torch.Tensor:
    """The token losses of logits (N, V): states that are the logits, projected by the identity."""
    eye = torch.eye(student.shape[1], dtype=student.dtype)
    return token_losses(student, eye, Projection(teacher, eye), mix, **options)
