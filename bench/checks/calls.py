"""Checks of how a training calls the functions that the card names: with what, and whether its losses come of them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from distillbench.cards.card import Real
from distillbench.checks.core import Failed, Objective, Skipped, Subject, Unproven, check
from distillbench.checks.objective import losses
from distillbench.checks.trial import FEW, ROWS, renamed, shuffle, train
from distillbench.checks.watch import tensors
from distillbench.problems.language_modeling.texts import TokenBatch
from distillbench.training.learner import Learner
from distillbench.training.oracle import Oracle

ROOM = "distillbench.problems."
HELPERS = ("row_mean", "per_row")  # of a kind's room: they reduce and reshape what others have computed
SOME = slice(0, 8)  # rows that a teacher's answer is compared at where it is a function of rows


@dataclasses.dataclass
class Call:
    """The first call of an objective in a training.

    Attributes:
        loss: at which it was, counted from 1.  numbers: what is the teacher's or the student's by its name.
        hyper: hyper-parameters of the card.
    """

    loss: int
    numbers: dict[str, list[Tensor]]
    hyper: dict[str, Any]


class Calls:
    """Notes how functions are called while a training runs.

    Attributes:
        first: function -> its first call within a loss.
        fixed: (function, option) -> a value that it was called with and is not the option's default; hyper-parameters are none of them.
        leaks: (function, argument or ``return``) -> the largest gradient that came through it.
        mislabelled: objectives that were handed other labels than the batch's.
        reached: objectives that a term was computed with.  bare: terms with a gradient past all functions that somebody checks.
    """

    def __init__(self, objectives: list[Objective], frozen: Mapping[str, set[str]], module: types.ModuleType) -> None:
        self.first: dict[str, Call] = {}
        self.fixed: dict[tuple[str, str], Any] = {}
        self.leaks: dict[tuple[str, str], float] = {}
        self.mislabelled: list[str] = []
        self.reached: set[str] = set()
        self.bare: list[str] = []
        self.losses = 0
        self._labels: Tensor | None = None  # of the batch under way
        self._nodes: dict[Any, str] = {}  # of the graph under way: what the functions gave
        self._objectives = {o.name: o for o in objectives}
        self._frozen, self._module = frozen, module

    def count(self, batch: Any) -> Any:
        """A loss is about to begin."""
        self.losses += 1
        self._nodes = {}
        found = getattr(batch, "predicted", batch) if isinstance(batch, TokenBatch) else batch
        self._labels = getattr(found, "labels", None)
        return batch

    def look(self, learner: Learner, terms: Mapping[str, Tensor]) -> None:
        """Walk the graph of every term from its value to the learner's parameters, as far as no function is met that is checked."""
        own = {id(p) for p in learner.parameters}
        for name, term in terms.items():
            left, seen = [term.grad_fn], set()
            while left:
                node = left.pop()
                if node is None or node in seen:
                    continue
                seen.add(node)
                if node in self._nodes:
                    self.reached.add(self._nodes[node])
                elif id(getattr(node, "variable", None)) in own:
                    if name not in self.bare:
                        self.bare.append(name)
                else:
                    left += [parent for parent, _ in node.next_functions]

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Inside, the functions are noted wherever a module of ours has them."""
        places = [m for name, m in list(sys.modules.items()) if name.startswith(ROOM) or m is self._module]
        with contextlib.ExitStack() as stack:
            for name in {*self._objectives, *self._frozen}:
                function = getattr(self._module, name)
                for place in places:
                    for key, value in list(vars(place).items()):
                        if value is function:
                            stack.enter_context(mock.patch.object(place, key, self._wrapped(name, function)))
            for place in places:
                for key, value in list(vars(place).items()):
                    if isinstance(value, types.FunctionType) and value.__module__.startswith(ROOM) and value.__name__ not in HELPERS:
                        stack.enter_context(mock.patch.object(place, key, self._marked(value)))
            yield

    def _marked(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function of a kind's room: what it gives for each row, by that kind's own tests, is right."""

        @functools.wraps(function)
        def noted(*args: Any, **named: Any) -> Any:
            out = function(*args, **named)
            self._mark("", [x for x in out if isinstance(x, Tensor)] if isinstance(out, tuple) else [out])
            return out

        return noted

    def _mark(self, name: str, given: list[Any]) -> None:
        for x in given:
            if isinstance(x, Tensor) and x.grad_fn is not None and (name or x.dim() <= 1):
                self._nodes[x.grad_fn] = name or self._nodes.get(x.grad_fn, "")

    def _wrapped(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        signature, held = inspect.signature(function), self._frozen.get(name, set())

        @functools.wraps(function)
        def noted(*args: Any, **named: Any) -> Any:
            bound = signature.bind(*args, **named)
            for key in held & bound.arguments.keys():
                value = bound.arguments[key]
                if isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
                    bound.arguments[key] = alias = value.view_as(value)
                    alias.register_hook(self._leak(name, key))
            within = self.losses and name in self._objectives and torch.is_grad_enabled()
            if within:
                known = {*self._objectives[name].inputs, *self._objectives[name].hyper}
                self.fixed |= {(name, key): value for key, value in _unlike(signature, bound.arguments, known).items()}
            if within and name not in self.first:
                inputs = self._objectives[name].inputs
                numbers = {key: _numbers(bound.arguments[key]) for key, x in inputs.items() if x.of and key in bound.arguments}
                hyper = {key: bound.arguments[key] for key in self._objectives[name].hyper if key in bound.arguments}
                self.first[name] = Call(self.losses, numbers, hyper)
            mine = bound.arguments.get("labels") if name in self._objectives else None
            if isinstance(mine, Tensor) and isinstance(self._labels, Tensor) and mine.shape == self._labels.shape:
                self.mislabelled += [] if torch.equal(mine, self._labels) else [name]
            out = function(*bound.args, **bound.kwargs)
            if name in self._objectives:
                self._mark(name, list(out) if isinstance(out, tuple | list) else [out])
            if "return" in held and isinstance(out, Tensor) and out.requires_grad:
                out.register_hook(self._leak(name, "return"))
            return out

        return noted

    def _leak(self, name: str, argument: str) -> Callable[[Tensor], None]:
        def note(gradient: Tensor) -> None:
            size = float(gradient.abs().max()) if gradient.numel() else 0.0
            self.leaks[name, argument] = max(self.leaks.get((name, argument), 0.0), size)

        return note


def _unlike(signature: inspect.Signature, given: Mapping[str, Any], known: set[str]) -> dict[str, Any]:
    """The options among ``given`` that differ from their default; ``known`` are none."""
    plain = str | int | float | bool | None
    found = {}
    for key, parameter in signature.parameters.items():
        option = parameter.kind is parameter.KEYWORD_ONLY and parameter.default is not parameter.empty and key not in known
        if option and key in given and isinstance(given[key], plain) and given[key] != parameter.default:
            found[key] = given[key]
    return found


def _numbers(value: Any) -> list[Tensor]:
    """Copies of the tensors in an argument; of a function of rows what it says of some."""
    if callable(value) and not isinstance(value, torch.nn.Module) and not list(tensors(value)):
        with torch.no_grad(), contextlib.suppress(TypeError, IndexError):
            value = value(SOME)
    return [x.detach().clone() for _, x in tensors(value)]


def frozen(subject: Subject) -> dict[str, set[str]]:
    """Function -> its arguments that the kind of problem or the card declares frozen. Raises Failed where the card is wrong."""
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
    teachers: list[Oracle] = []

    def begin(batch: Any) -> Any:
        calls.count(batch)
        if calls.losses == roll_from:
            for teacher in teachers:
                renamed(teacher)
        return batch

    def edit(problem: Any) -> Any:
        if not roll_from:
            return problem
        teachers.extend(problem.teachers.values())
        return shuffle(problem, lambda: calls.losses >= roll_from)

    with calls.noted():
        train(subject, rows=ROWS, change=begin, edit=edit, look=calls.look, **how)
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
    for (name, key), value in calls.fixed.items():
        raise Failed(f"{name} is called with {key}={value!r}, and is checked without: make it a hyper-parameter, or a function of its own")
    if calls.mislabelled:
        raise Failed(f"{calls.mislabelled[0]} gets other labels than the batch's: whose are they?")
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
def used(subject: Subject) -> str:
    """Losses come of the functions that the card names: no gradient goes past them, and past those of the kind's own room."""
    if subject.card.control:
        raise Skipped("a control is a yardstick")
    objectives = subject.objectives
    calls = _calls(subject, objectives)
    if not calls.losses:
        raise Skipped("nothing is trained")
    named = [o.name for o in losses(subject)]
    unused = [name for name in named if name not in calls.reached]
    if unused == named:
        raise Failed(f"no term of a loss is computed by {' or '.join(named)}, which the card names: what is checked is not what trains")
    if calls.bare and unused:
        raise Failed(
            f"the term {calls.bare[0]!r} is not computed by a function that the card names, and {unused[0]}, which it names, is in no "
            "term: what is checked is not what trains"
        )
    if calls.bare:
        raise Unproven(
            f"part of {', '.join(calls.bare)} is computed past the functions that the card names: name them among its objectives"
        )
    return ", ".join(sorted(filter(None, calls.reached)))


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
