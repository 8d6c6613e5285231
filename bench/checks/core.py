"""Finding, running and reporting checks."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch

from distillbench.cards import registry
from distillbench.cards.card import Card
from distillbench.errors import NotApplicable, UserError
from distillbench.runs.plan import RunSpec, plan
from distillbench.runs.plan import track as find_track
from distillbench.training.examples import Draw, Input
from distillbench.training.problem import Problem

Outcome = Literal["passed", "failed", "unproven", "skipped", "exempt"]


@dataclass(frozen=True)
class Result:
    """What one check found."""

    name: str
    outcome: Outcome
    message: str


class Failed(Exception):
    """The contract does not hold; the message says what was seen and what to do."""


class Skipped(Exception):
    """The check cannot apply; the message says why."""


class Unproven(Exception):
    """The check applies, and what it needs from the author is not there (an oracle, inputs); the message says what to add."""


@dataclass(frozen=True)
class Objective:
    """A pure objective with its hyper-parameters filled from the card.

    Attributes:
        inputs: what the kind of problem says of each of its arguments.  hyper: keyword-only hyper-parameters at the card's defaults.
    """

    name: str
    function: Callable[..., Any]
    inputs: Mapping[str, Input]
    hyper: dict[str, Any]

    def __call__(self, values: Mapping[str, torch.Tensor], **changed: Any) -> list[torch.Tensor]:
        """The terms, as a list of tensors."""
        given = {n: v if (given_as := self.inputs[n].given_as) is None else given_as(v) for n, v in values.items()}
        out = self.function(**given, **{**self.hyper, **changed})
        return list(out) if isinstance(out, tuple | list) else [out]

    def values(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
        """Random values of its arguments; whole numbers keep their type."""
        draw = Draw(seed)
        drawn = {name: x.draw(draw) for name, x in self.inputs.items()}
        return {name: v.to(dtype) if v.is_floating_point() else v for name, v in drawn.items()}


class Subject:
    """The method under check: its card, module, objectives and the analytic track to train on."""

    def __init__(self, name: str, track: str | None = None) -> None:
        self.name = name
        self.entry = registry.find("method", name, *(find_track(track)[1].kinds if track is not None else ()))
        self.card: Card = registry.method_card(self.entry)
        self._track = track

    @functools.cached_property
    def module(self) -> ModuleType:
        """The imported method."""
        return self.entry.load()

    @functools.cached_property
    def problem(self) -> type[Problem]:
        """The kind of problem it takes, from the annotation of ``distill``: whoever brings a kind, it is found."""
        distill = getattr(self.module, "distill", None)
        first = next(iter(inspect.signature(distill).parameters), None) if callable(distill) else None
        try:
            kind = typing.get_type_hints(distill).get(first or "")
        except NameError as error:
            raise Unproven(f"the annotations of distill cannot be read at run time: {error}") from None
        if not (isinstance(kind, type) and issubclass(kind, Problem)):
            raise Unproven("say which kind of problem distill takes: def distill(problem: Classification, run: Run, ...)")
        return kind

    @functools.cached_property
    def objectives(self) -> list[Objective]:
        """The card's objectives. Raises Skipped where there are none."""
        if not self.card.objectives:
            raise Skipped("the card names no objective")
        return [self._objective(name) for name in self.card.objectives]

    def _objective(self, name: str) -> Objective:
        function = getattr(self.module, name, None)
        if not callable(function):
            raise Failed(f"the card's objective {name} is not a function of the module")
        known = self.problem.examples()
        inputs: dict[str, Input] = {}
        hyper: dict[str, Any] = {}
        for parameter in inspect.signature(function).parameters.values():
            if parameter.kind is parameter.KEYWORD_ONLY and parameter.name in self.card.hyperparameters:
                hyper[parameter.name] = self.card.hyperparameters[parameter.name].default
            elif parameter.name in known:
                inputs[parameter.name] = known[parameter.name]
            elif parameter.default is parameter.empty:
                raise Unproven(
                    f"{name} takes {parameter.name}, which is no hyper-parameter on the card and not among "
                    f"{self.problem.__name__}.examples(): {', '.join(sorted(known)) or 'there are none'}"
                )
        return Objective(name, function, inputs, hyper)

    @functools.cached_property
    def oracle(self) -> ModuleType:
        """The independent numpy oracle: see :attr:`registry.Entry.oracle`."""
        if (place := self.entry.oracle) is not None:
            return _module(place)
        path = self.entry.path
        raise Unproven(f"no oracle: write {path.stem}_oracle.py beside the method, or tests/oracles/{path.parent.name}/{path.stem}.py")

    @functools.cached_property
    def track(self) -> str:
        """The analytic track of the method's problem."""
        if self._track is not None:
            return self._track
        for entry, name in analytic_tracks(self.card.problem):
            return f"{entry.slug}/{name}"
        raise Skipped(f"no installed suite has an analytic setting for {self.card.problem}")

    @functools.cached_property
    def spec(self) -> RunSpec:
        """The run with seed 0 on the track, which short trainings follow; planned once, and to be copied from."""
        [spec] = plan(self.track, [self.name], [0], controls=False)
        return spec

    @property
    def own_track(self) -> bool:
        """Whether the track is the analytic one that checks choose themselves, not one that was asked for."""
        return self._track is None


def analytic_tracks(problem: str) -> list[tuple[registry.Entry, str]]:
    """The analytic settings for a kind of problem, as the suite and the setting's name; the first one is what checks train on."""
    suites = [e for _, e in sorted(registry.suites().items()) if e.card is not None and e.card.problem == problem]
    return [(e, name) for e in suites for name, s in registry.suite_card(e).settings.items() if s.tier == "analytic"]


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"oracle_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


Check = Callable[[Subject], str | None]
CHECKS: dict[str, Check] = {}


def check(function: Check) -> Check:
    """Register a check under its function's name."""
    CHECKS[function.__name__] = function
    return function


def one(name: str, subject: Subject) -> Result:
    """Run one check and honour the card's exemption."""
    reason = subject.card.exempt.get(name)
    try:
        message = CHECKS[name](subject)
    except (Skipped, Unproven, NotApplicable) as nothing:
        if reason:
            return Result(name, "failed", f"stale exemption ({nothing}): remove it from the card")
        return Result(name, "unproven" if isinstance(nothing, Unproven) else "skipped", str(nothing))
    except (Failed, UserError) as failure:
        return Result(name, "exempt" if reason else "failed", reason or str(failure))
    except Exception as error:  # a check must report a method's crash, not die of it
        return Result(name, "exempt" if reason else "failed", reason or f"{type(error).__name__}: {error}")
    if reason:
        return Result(name, "failed", "stale exemption: the check passes; remove it from the card")
    return Result(name, "passed", message or "")


def results(name: str, *, track: str | None = None, only: Iterable[str] | None = None) -> Iterator[Result]:
    """Run every check (or ``only`` some) on a method, and give what each found as it finishes.

    Args:
        name: a slug or the path of a file.  track: the track to train on; by default the problem's analytic one.

    Raises:
        UserError: at once, where there is no such method, its card cannot be read, or it cannot run on ``track``.
    """
    subject = Subject(name, track)
    if track is not None:
        plan(track, [name], [0], controls=False)  # what is wrong with the request is one line, not a failure of every check
    return _results(subject, list(CHECKS if only is None else only))


def _results(subject: Subject, names: list[str]) -> Iterator[Result]:
    checked = False
    for name in names:
        result = one(name, subject)
        checked = checked or (result.outcome in ("passed", "failed") and name not in ("card", "imports"))
        yield result
    unknown = sorted(set(subject.card.exempt) - set(CHECKS))
    if unknown:
        checked = True
        yield Result("exemptions", "failed", f"the card exempts checks that do not exist: {', '.join(unknown)}")
    if not checked:
        yield Result("something_checked", "failed", "no check could be made: nothing is known about this method")


def check_method(name: str, *, track: str | None = None, only: Iterable[str] | None = None) -> list[Result]:
    """All that :func:`results` gives."""
    return list(results(name, track=track, only=only))
