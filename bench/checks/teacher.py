"""Checks of what a method makes of its teacher: it is asked, listened to, not remembered, and handed over as what it is."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from distillbench.cards.card import Real
from distillbench.checks.core import Failed, Objective, Skipped, Subject, Unproven, check
from distillbench.checks.trial import FEW, ROWS, Trial, first_training, shuffle, train, updated
from distillbench.checks.watch import tensors
from distillbench.problems.classification.oracle import ClassifierOracle

SLIGHT = 1e-3  # of the way that weights go: a smaller change is none
SOME = slice(0, 8)  # rows that a teacher's answer is compared at where it is a function of rows


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


# --- what objectives are handed -------------------------------------------------------------------------------------


@dataclasses.dataclass
class Call:
    """The first call of an objective in a training: at which loss (counted from 1), with what numbers and hyper-parameters."""

    loss: int
    numbers: dict[str, list[Tensor]]
    hyper: dict[str, Any]


class Calls:
    """Notes how functions are called while a training runs.

    Attributes:
        first: function -> its first call within a loss.
        leaks: (function, argument or ``return``) -> the largest gradient that came through it.
    """

    def __init__(self, objectives: list[Objective], frozen: Mapping[str, set[str]], module: ModuleType) -> None:
        self.first: dict[str, Call] = {}
        self.leaks: dict[tuple[str, str], float] = {}
        self.losses = 0
        self._objectives = {o.name: o for o in objectives}
        self._frozen, self._module = frozen, module

    def count(self, batch: Any) -> Any:
        """A loss is about to begin."""
        self.losses += 1
        return batch

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Inside, the functions are noted wherever a module of ours has them."""
        places = [m for name, m in list(sys.modules.items()) if name.startswith("distillbench.problems.") or m is self._module]
        with contextlib.ExitStack() as stack:
            for name in {*self._objectives, *self._frozen}:
                function = getattr(self._module, name)
                for place in places:
                    for key, value in list(vars(place).items()):
                        if value is function:
                            stack.enter_context(mock.patch.object(place, key, self._wrapped(name, function)))
            yield

    def _wrapped(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        signature, held = inspect.signature(function), self._frozen.get(name, set())

        def noted(*args: Any, **named: Any) -> Any:
            bound = signature.bind(*args, **named)
            for key in held & bound.arguments.keys():
                value = bound.arguments[key]
                if isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
                    bound.arguments[key] = alias = value.view_as(value)
                    alias.register_hook(self._leak(name, key))
            if self.losses and name not in self.first and name in self._objectives and torch.is_grad_enabled():
                inputs = self._objectives[name].inputs
                numbers = {key: _numbers(bound.arguments[key]) for key, x in inputs.items() if x.of and key in bound.arguments}
                hyper = {key: bound.arguments[key] for key in self._objectives[name].hyper if key in bound.arguments}
                self.first[name] = Call(self.losses, numbers, hyper)
            out = function(*bound.args, **bound.kwargs)
            if "return" in held and isinstance(out, Tensor) and out.requires_grad:
                out.register_hook(self._leak(name, "return"))
            return out

        return noted

    def _leak(self, name: str, argument: str) -> Callable[[Tensor], None]:
        def note(gradient: Tensor) -> None:
            size = float(gradient.abs().max()) if gradient.numel() else 0.0
            self.leaks[name, argument] = max(self.leaks.get((name, argument), 0.0), size)

        return note


def _numbers(value: Any) -> list[Tensor]:
    """Copies of the tensors in an argument; of a function of rows what it says of some."""
    if callable(value) and not isinstance(value, torch.nn.Module) and not list(tensors(value)):
        with torch.no_grad(), contextlib.suppress(TypeError, IndexError):
            value = value(SOME)
    return [x.detach().clone() for _, x in tensors(value)]


def frozen(subject: Subject) -> dict[str, set[str]]:
    """Function -> its arguments that the kind of problem or the card declares frozen. Raises Failed where the card names what is not there."""
    found: dict[str, set[str]] = {}
    with contextlib.suppress(Skipped, Unproven):
        found = {o.name: {n for n, x in o.inputs.items() if x.role == "frozen"} for o in subject.objectives}
    for name, held in subject.card.frozen.items():
        function = getattr(subject.module, name, None)
        if not callable(function):
            raise Failed(f"the card's frozen names {name}, which is not a function of the module")
        if strange := set(held) - {*inspect.signature(function).parameters, "return"}:
            raise Failed(f"the card's frozen names {', '.join(sorted(strange))}, which {name} does not take")
        found[name] = found.get(name, set()) | set(held)
    return found


def _calls(subject: Subject, objectives: list[Objective], *, roll_from: int = 0, **how: Any) -> Calls:
    """A short training, noted; from loss ``roll_from`` on (counted from 1; 0: never) teachers answer of other rows."""
    calls = Calls(objectives, frozen(subject), subject.module)
    teachers: list[ClassifierOracle] = []

    def begin(batch: Any) -> Any:
        calls.count(batch)
        if calls.losses == roll_from:
            for teacher in teachers:
                teacher._tables.clear()  # its answers were kept before
        return batch

    def edit(problem: Any) -> Any:
        if not roll_from:
            return problem
        teachers.extend(x for x in problem.teachers.values() if isinstance(x, ClassifierOracle))
        return shuffle(problem, lambda: calls.losses >= roll_from)

    with calls.noted():
        train(subject, rows=ROWS, change=begin, edit=edit, **how)
    return calls


@check
def arguments(subject: Subject) -> str:
    """What ``distill`` hands to its objectives is what their arguments are called: the teacher's answers, the student's, and the card's
    hyper-parameters as they are.

    The teacher is made to answer of other rows just before an objective is first called: what is called the teacher's must change by
    that, and what is called the student's or the fake score's must not.
    """
    if subject.card.control or not subject.own_track:
        raise Skipped("a control is a yardstick" if subject.card.control else "only on the analytic track")
    objectives = subject.objectives
    hyper = {name: moved for o in objectives for name in o.hyper if (moved := _moved(subject.card.hyperparameters[name])) is not None}
    calls, seen = _calls(subject, objectives, hyper=hyper), []
    for name, call in calls.first.items():
        for key, value in call.hyper.items():
            if key in hyper and value != hyper[key]:
                raise Failed(f"{name} gets {key}={value} where the hyper-parameter {key} is {hyper[key]}")
    for loss in sorted({call.loss for call in calls.first.values() if call.numbers}):
        others = _calls(subject, objectives, hyper=hyper, roll_from=loss)
        for name, call in calls.first.items():
            if call.loss == loss and name in others.first:
                _from_whom(name, next(o for o in objectives if o.name == name), call.numbers, others.first[name].numbers)
                seen += [f"{name}.{key}" for key, numbers in call.numbers.items() if numbers]
    if not seen and not any(call.hyper for call in calls.first.values()):
        raise Skipped("no objective takes what is the teacher's or the student's by its name, or a hyper-parameter")
    return ", ".join(seen)


def _moved(spec: Any) -> float | int | None:
    """Another value of a number's hyper-parameter, near its default and within its bounds; None where there is none."""
    if not isinstance(spec, Real):
        return None
    for value in (0.8 * spec.default, 1.25 * spec.default, 0.3, 1.0):
        with contextlib.suppress(ValueError):
            if value != spec.default:
                return spec.parse(value)
    return None


def _from_whom(name: str, objective: Objective, before: Mapping[str, list[Tensor]], after: Mapping[str, list[Tensor]]) -> None:
    for key, ours in before.items():
        theirs = after.get(key, [])
        if not ours or len(ours) != len(theirs):
            continue
        changed = any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        if objective.inputs[key].of == "teacher" and not changed:
            raise Failed(f"{name} gets as {key} what does not follow the teacher's answers: are arguments exchanged, or answers old?")
        if objective.inputs[key].of == "student" and changed:
            raise Failed(f"{name} gets as {key} what follows the teacher's answers at once: are arguments exchanged?")


@check
def held(subject: Subject) -> str:
    """In the training itself, no gradient passes through what the kind of problem or the card declares frozen."""
    names = frozen(subject)
    if not any(names.values()):
        raise Skipped("nothing is declared frozen")
    objectives: list[Objective] = []
    calls = _calls(subject, objectives, batches=2 * FEW)
    for (name, argument), size in calls.leaks.items():
        if size:
            what = f"what {name} gives" if argument == "return" else f"{name}'s {argument}"
            raise Failed(f"a gradient of {size:.2g} passes through {what}, which is declared frozen: detach it")
    return ", ".join(f"{name}.{key}" for name, keys in sorted(names.items()) for key in sorted(keys))
