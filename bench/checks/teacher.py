"""Checks of what a method makes of its teacher: it is asked and listened to, and nothing is remembered from one training to the next."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from unittest import mock

from distillbench.checks.core import Failed, Skipped, Subject, check
from distillbench.checks.trial import ROWS, Trial, first_training, train, updated

SLIGHT = 1e-3  # of the way that weights go: a smaller change is none


def apart(one: Trial, other: Trial) -> tuple[float, float]:
    """The largest difference between the weights two trainings came to, and the longest way that one of them went."""
    differ = moved = 0.0
    for (module, end), theirs in zip(one.ends.items(), other.ends.values(), strict=True):
        for name, weight in end.items():
            moved = max(moved, float((weight - one.starts[module][name]).abs().max()))
            differ = max(differ, float((weight - theirs[name]).abs().max()))
    return differ, moved


@check
def teacher_matters(subject: Subject) -> str:
    """Another student comes of it where the teacher answers each example with what it says of another one."""
    if subject.card.control:
        raise Skipped("a control is a yardstick")
    trial = first_training(subject)
    if not updated(trial):
        raise Skipped("nothing is trained")
    if not trial.problem.teachers:
        raise Skipped("the problem has no teacher")
    differ, moved = apart(trial, train(subject, rows=ROWS, shuffled=True))
    if differ > SLIGHT * moved:
        return f"answers of other examples move the weights by {differ / moved:.2g} of their way"
    if trial.asked == 0:
        raise Failed(
            "the teacher is never asked: what is learnt is what the batches hold without it; say so on the card (exempt) if it is meant"
        )
    raise Failed(
        f"the teacher is asked {trial.asked:.0f} times, and answers of other examples change nothing: its answers are not used, or are "
        "those of an earlier training, kept in the module"
    )


@check
def no_memory(subject: Subject) -> str:
    """A training is what it is in a fresh process: nothing is kept in the module from one to the next."""
    first = first_training(subject)
    if not updated(first):
        raise Skipped("nothing is trained")
    fresh = _again(subject)
    other = train(subject, rows=ROWS, shuffled=True, module=fresh)
    if other.digest != train(subject, rows=ROWS, shuffled=True).digest or train(subject, rows=ROWS, module=fresh).digest != first.digest:
        raise Failed(
            "a training depends on those that this process made before: keep nothing in the module, in defaults of arguments or in a "
            "cache of functions"
        )
    return "the same in a fresh module"


def _again(subject: Subject) -> ModuleType:
    """The method's module, run anew; the one that is imported stays."""
    package = (subject.entry.module or "").rpartition(".")[0]
    name = f"{package}._again_{subject.entry.path.stem}".lstrip(".")
    spec = importlib.util.spec_from_file_location(name, subject.entry.path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, {name: module}):
        spec.loader.exec_module(module)
    return module
