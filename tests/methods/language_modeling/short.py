"""Short runs on the analytic track, for tests that need a whole method."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from distillbench.cards import registry
from distillbench.cards.card import SuiteCard
from distillbench.cards.reading import resolve
from distillbench.problems.language_modeling.problem import LanguageModeling
from distillbench.runs.identities import seeds_by_role
from distillbench.runs.suite import JudgeContext, TrainContext, suite_of
from distillbench.training.observer import Observer
from distillbench.training.run import Run
from distillbench.training.student import Student


def track(
    *,
    examples: int = 640,
    seed: int = 0,
    setting: str = "markov",
    folder: Path | None = None,
    observer: Observer | None = None,
    **training: Any,
) -> tuple[LanguageModeling, Run]:
    """Problem and run of ``language-modeling/<setting>`` with a small budget; ``training`` replaces fields of the recipe."""
    entry = registry.find("suite", "language-modeling")
    card = entry.card
    assert isinstance(card, SuiteCard)
    about = card.settings[setting]
    seeds = seeds_by_role(seed)
    problem: LanguageModeling = suite_of(entry).problem(TrainContext(setting, about, seeds))
    budget = dataclasses.replace(about.budget, student_examples=examples)
    recipe = dataclasses.replace(about.training, **training)
    run = Run(
        seeds=seeds,
        budget=budget,
        training=recipe,
        oracles=[problem.teacher],
        folder=folder,
        checkpoint_seconds=0.0,
        observer=observer,
    )
    return problem, run


def distilled(slug: str, *, examples: int = 640, seed: int = 0, **given: Any) -> tuple[Student, LanguageModeling, Run]:
    """The student of a short run of method ``slug`` with ``given`` hyper-parameters over the card's."""
    problem, run = track(examples=examples, seed=seed)
    module = registry.find("method", slug, "language-modeling").load()
    student: Student = module.distill(problem, run, **resolve(module.CARD, given))
    return student, problem, run


def score(student: Student, metric: str = "kl", seed: int = 0) -> float:
    """An exact metric of the track's test chain."""
    entry = registry.find("suite", "language-modeling")
    assert isinstance(entry.card, SuiteCard)
    found = suite_of(entry).evaluate(student, JudgeContext("markov", entry.card.settings["markov"], seeds_by_role(seed))).measurements
    return float({m.metric: m.value for m in found}[metric])
