"""Short runs on the real tracks, for tests that need a whole method."""

from __future__ import annotations

import dataclasses
from typing import Any

from distillbench.cards import registry
from distillbench.cards.card import SuiteCard
from distillbench.cards.reading import resolve
from distillbench.problems.classification.problem import Classification
from distillbench.runs.identities import seeds_by_role
from distillbench.runs.suite import TrainContext, suite_of
from distillbench.training.run import Run
from distillbench.training.student import Student


def track(setting: str = "blobs", *, examples: int = 1280, seed: int = 0, **training: Any) -> tuple[Classification, Run]:
    """Problem and run of ``image-classification/<setting>`` with a small budget; ``training`` replaces fields of the recipe."""
    entry = registry.find("suite", "image-classification")
    card = entry.card
    assert isinstance(card, SuiteCard)
    about = card.settings[setting]
    seeds = seeds_by_role(seed)
    problem: Classification = suite_of(entry).problem(TrainContext(setting, about, seeds))
    budget = dataclasses.replace(about.budget, student_examples=examples)
    recipe = dataclasses.replace(about.training, **training)
    return problem, Run(seeds=seeds, budget=budget, training=recipe, oracles=[problem.teacher])


def distilled(
    slug: str, setting: str = "blobs", *, examples: int = 1280, seed: int = 0, **given: Any
) -> tuple[Student, Classification, Run]:
    """The student of a short run of method ``slug`` with ``given`` hyper-parameters over the card's."""
    entry = registry.find("method", slug)
    problem, run = track(setting, examples=examples, seed=seed)
    module = entry.load()
    student: Student = module.distill(problem, run, **resolve(module.CARD, given))
    return student, problem, run
