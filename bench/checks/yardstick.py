"""The check of what a method is for: it does better than the same student without a teacher."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from distillbench.cards import registry
from distillbench.cards.card import Metric, SuiteCard
from distillbench.checks.core import Failed, Skipped, Subject, Unproven, check
from distillbench.checks.trial import answers, first_training, train
from distillbench.runs.plan import RunSpec, plan
from distillbench.runs.plan import track as find_track
from distillbench.runs.runner import execute
from distillbench.runs.store import Store
from distillbench.stats import Interval, paired_difference

SEEDS = 3
LONG = 76_800  # examples of a training that is judged where a short one does not show it


@dataclass(frozen=True)
class Short:
    """How short a training on a problem's analytic track shows that a method beats scratch.

    Attributes:
        examples: of the student.  training: what else of the track's is replaced.
        options: of the suite's, what is replaced; a long training is judged so too.
        grows: whether twice the examples must do better still. Where a method's start alone, before the teacher says a word, is
            ahead of a scratch that had as little time, being ahead says nothing; going on in the right direction does.
    """

    examples: int
    training: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    grows: bool = False


SHORT = {
    "classification": Short(6400, {"batch_size": 32}),
    "image-generation": Short(1600, {"batch_size": 64, "learning_rate": 0.01}, {"samples": 500}, grows=True),
    "language-modeling": Short(3200, {"batch_size": 16}),
}


def _specs(method: str, track: str, how: Short) -> list[RunSpec]:
    return plan(
        track,
        [method],
        range(SEEDS),
        controls=False,
        budget={"student_examples": how.examples},
        training=how.training,
        options=how.options,
    )


def _scores(method: str, track: str, how: Short) -> dict[int, float]:
    """Seed -> the track's primary metric for ``method``, trained and judged as ``how`` says."""
    values = {}
    store = Store(answers())
    for spec in _specs(method, track, how):
        record = execute(spec, store)
        value = record.value(record.suite.primary)
        if value is None or record.status != "ok":
            raise Failed(f"{method} seed {spec.seed} {record.status}: {record.reason}")
        values[spec.seed] = value
    return values


@functools.lru_cache(maxsize=8)
def _control(slug: str, track: str, key: str) -> dict[int, float]:
    """What a control scores in the way that ``key`` is JSON for: the same for every method of a track, so made once."""
    return _scores(slug, track, Short(**json.loads(key)))


def _ahead(one: Mapping[int, float], other: Mapping[int, float], metric: Metric) -> Interval:
    """How much better ``one`` is, seed by seed, with its 90% interval."""
    ahead = paired_difference(one, other, 0.9) if metric.better == "higher" else paired_difference(other, one, 0.9)
    assert ahead is not None
    return ahead


def _shown(subject: Subject, metric: Metric, how: Short) -> tuple[bool, str, dict[int, float]]:
    """Whether such a training shows the method ahead of the suite's floor, in what words, and its scores."""
    floor = _suite(subject).floor
    if not floor:
        raise Skipped(f"the suite of {subject.track} names no floor")
    ours = _scores(subject.name, subject.track, how)
    ahead = _ahead(ours, _control(floor, subject.track, json.dumps(dataclasses.asdict(how))), metric)
    line = f"{metric.name} better than {floor} by {_said(ahead)} over {SEEDS} seeds of {how.examples:,} examples"
    return ahead.low > 0, line, ours


def _said(interval: Interval) -> str:
    return f"{interval.estimate:.4f} [{interval.low:.4f}, {interval.high:.4f}]"


def shown_early(subject: Subject) -> str | None:
    """The words of a short training that shows the method ahead, or None where none does."""
    metric, how = _suite(subject).metric(), SHORT[subject.card.problem]
    shown, line, scores = _shown(subject, metric, how)
    if shown and how.grows:
        shown, line, twice = _shown(subject, metric, dataclasses.replace(how, examples=2 * how.examples))
        growth = _ahead(twice, scores, metric)
        shown = shown and growth.low > 0
        line += f", and than itself after half of them by {_said(growth)}"
    return line if shown else None


def _suite(subject: Subject) -> SuiteCard:
    """The card of the track's suite, at its setting."""
    suite, _, setting = subject.track.partition("/")
    return registry.suite_card(registry.find("suite", suite)).at(setting)


@check
def beats_scratch(subject: Subject) -> str:
    """Better than the suite's floor on the analytic track: the 90% interval of the paired difference says so.

    A short training is enough where it shows that. Where it does not, or the card says that the method does not beat scratch, the
    whole budget (or as much of it as a check may take) decides.
    """
    if subject.card.control:
        raise Skipped("a control is a yardstick")
    short = SHORT.get(subject.card.problem) if subject.own_track else None
    if short is not None and "beats_scratch" not in subject.card.exempt:
        line = shown_early(subject)
        if line is not None:
            return line
    whole = min(find_track(subject.track)[2].budget.student_examples, LONG)
    shown, said, _ = _shown(subject, _suite(subject).metric(), Short(whole, options=short.options if short is not None else {}))
    if not shown:
        raise Failed(said)
    return said


IGNORED = "itself with the teacher's answers to other examples"


@check
def gains(subject: Subject) -> str:
    """What a short training gains over the suite's strongest controls, and over itself where the teacher speaks of other examples.

    What it does not show to be ahead of is said in one line, and no pass: whoever is not ahead of ``pseudo_label`` has learnt nothing
    from the teacher but its decisions, and whoever is not ahead of itself under a shuffled teacher nothing of it at all.
    """
    short = SHORT.get(subject.card.problem) if subject.own_track else None
    if subject.card.control or short is None:
        raise Skipped("a control is a yardstick" if subject.card.control else "only on the analytic track")
    suite = _suite(subject)
    metric, ours = suite.metric(), _scores(subject.name, subject.track, short)
    ahead = {
        slug: _ahead(ours, _control(slug, subject.track, json.dumps(dataclasses.asdict(short))), metric)
        for slug in suite.controls
        if slug == "pseudo_label"
    }
    if first_training(subject).asked:
        ahead[IGNORED] = _ahead(ours, _ignoring(subject, short, metric), metric)
    said = "; ".join(f"over {name} by {_said(interval)}" for name, interval in ahead.items())
    if missing := [name for name, interval in ahead.items() if not interval.low > 0]:
        raise Unproven(f"no gain in {metric.name} is shown over {' nor over '.join(missing)} in {short.examples:,} examples: {said}")
    return f"{metric.name} {said}"


def _ignoring(subject: Subject, how: Short, metric: Metric) -> dict[int, float]:
    """Seed -> what the method scores where every teacher answers each example with what it says of another one."""
    values = {}
    for spec in _specs(subject.name, subject.track, how):
        trial = train(subject, spec=spec, batches=how.examples // spec.setting_card.training.batch_size, shuffled=True)
        values[spec.seed] = next(m.value for m in trial.judge(trial.student).measurements if m.metric == metric.name)
    return values
