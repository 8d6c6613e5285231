"""Guard a student: judge exported weights again and compare them, example by example, with the record they must live up to."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from scipy.special import stdtrit

from distillbench.cards import registry
from distillbench.cards.card import Metric
from distillbench.errors import UserError
from distillbench.runs.record import Measurement, Record
from distillbench.runs.suite import JudgeContext, suite_of
from distillbench.training.student import Student


@dataclass(frozen=True)
class Verdict:
    """One metric, now and in the record.

    Attributes:
        worse_by: how much worse it is than the record, in the metric's unit; negative where it is better.
        at_most: upper end of the one-sided 95% interval of ``worse_by`` over examples; itself where there are no examples.
        holds: whether ``at_most`` is within the margin. None for a metric that is only shown.
    """

    metric: str
    recorded: float
    now: float
    worse_by: float
    at_most: float
    holds: bool | None


def guard(weights: Path, record: Record, *, margin: float, metrics: list[str] | None = None, data: Path | None = None) -> list[Verdict]:
    """Judge the student in ``weights`` on the record's track and split.

    Args:
        margin: the loss that is tolerated, in the metric's unit (non-inferiority: the whole interval must be within it).
        metrics: what must hold; the suite's primary metric by default. The others are shown.

    Raises:
        UserError: the file is no student, the record was not scored, or the suite is not installed.
    """
    if not record.finished:
        raise UserError(f"the record's status is {record.status}: nothing to compare with")
    student = Student.read(weights)
    card, suite = record.suite, suite_of(registry.find("suite", record.suite.slug))
    wanted = [card.metric(m).name for m in metrics] if metrics else [card.primary]
    for raw in {m.name for m in card.shown}.intersection(wanted):
        raise UserError(f"{raw}: neither more nor less of it is better, so no student can fall short; name another --metric")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    judging = JudgeContext(record.setting_name, record.setting, record.identity["seeds"], data=data, split=record.split, device=device)
    measured = suite.evaluate(student, judging).measurements
    judged = {m.name for m in card.metrics}
    then = {m.metric: m for m in record.measurements if m.metric in judged}
    return [
        _compare(card.metric(now.metric), then[now.metric], now, margin, now.metric in wanted) for now in measured if now.metric in then
    ]


def _compare(metric: Metric, then: Measurement, now: Measurement, margin: float, judged: bool) -> Verdict:
    sign = 1.0 if metric.better == "higher" else -1.0
    worse = sign * (then.value - now.value)
    at_most = worse
    if then.per_example is not None and now.per_example is not None:
        if len(then.per_example) != len(now.per_example):
            raise UserError(f"{metric.name}: the record scored {then.n} examples, this machine {now.n}: not the same split")
        losses = [sign * (a - b) for a, b in zip(then.per_example, now.per_example, strict=True)]
        n = len(losses)
        mean = math.fsum(losses) / n
        if n > 1:
            spread = math.sqrt(math.fsum((x - mean) ** 2 for x in losses) / (n - 1))
            at_most = mean + float(stdtrit(n - 1, 0.95)) * spread / math.sqrt(n)
    return Verdict(metric.name, then.value, now.value, worse, at_most, at_most <= margin if judged else None)
