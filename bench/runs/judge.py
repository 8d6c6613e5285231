"""The process that judges: it gets the bytes of a student, alone holds the judged split and the evaluation seed, and meets no method."""

from __future__ import annotations

import base64
import contextlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import nn

from distillbench import code
from distillbench.cards import registry
from distillbench.cards.card import SuiteCard
from distillbench.cards.reading import to_data
from distillbench.errors import Diverged, SaveError
from distillbench.identity import canonical, derive_seed
from distillbench.runs import launcher
from distillbench.runs.caps import Own
from distillbench.runs.messages import Case, Message, send
from distillbench.runs.record import Measurement
from distillbench.runs.suite import JudgeContext, Suite, TrainContext, suite_of
from distillbench.training.nets import parameters
from distillbench.training.observer import Observer
from distillbench.training.student import Part, Student


class _Told(Observer):
    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def progress(self, phase: str, step: int, steps: int | None) -> None:
        send(self._connection, Message("progress", {"at": [f"judge: {phase}", step, steps or step]}))


def serve(connection: Connection) -> None:
    """Judge students until the parent is gone. A case is what the parent pickled; the student's bytes come after it.

    ``judged`` says the measurements and what the student is, ``failed`` why it cannot be judged, ``full`` that nothing can be written.
    """
    for name in launcher.SAID:
        os.environ.pop(name, None)  # a run may be spread over processes: its judge is one
    while True:
        try:
            case, content = connection.recv(), connection.recv_bytes()
        except (EOFError, OSError):
            return
        send(connection, _judge(case, content, connection))


def _judge(case: Case, content: bytes, connection: Connection) -> Message:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)
    context = replace(case.context, device=device, observer=_Told(connection))
    torch.manual_seed(derive_seed("judge", context.seeds["evaluation"]))  # nothing depends on which student came before
    said: dict[str, Any] = {}
    try:
        with code.hidden(case.planned) if case.planned is not None else contextlib.nullcontext():
            suite = suite_of(registry.find("suite", case.suite))
            student = Student.from_bytes(content, "the student")
            own = None if case.yardstick else _own(suite, context)
            if own is not None:
                own.refuse(student)
            rebuilt = suite.rebuild(student, context)
            said["student"] = about(student, rebuilt)
            judged = suite.evaluate(student, context)
            complete(judged.measurements, case.card, context.split)
            if own is not None:  # a yardstick may cost more than a student
                said["over"] = own.over(student, rebuilt) or suite.exceeds(student, context)
    except SaveError as error:
        return Message("full", {"text": str(error)})
    except Diverged as error:
        return Message("failed", {**said, "reason": str(error), "bill": dict(context.bill)})
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return Message("failed", {**said, "reason": reason, "bill": dict(context.bill)})
    measured = [[m.metric, m.value, m.n, m.examples] for m in judged.measurements]
    shown = {name: [a.kind, base64.b64encode(a.content).decode()] for name, a in judged.artifacts.items()}
    return Message("judged", {**said, "measurements": measured, "artifacts": shown, "bill": dict(context.bill)})


_measured: dict[bytes, Own] = {}  # the newest alone: runs come seed by seed, and a setting's own does not change between them


def _own(suite: Suite, context: JudgeContext) -> Own:
    """What the setting's own student and teachers are, from a problem that no method has met."""
    training = TrainContext(context.name, context.setting, context.seeds, data=context.data, cache=context.cache)
    key = canonical([type(suite).__module__, context.name, to_data(context.setting), dict(training.seeds), str(context.data)])
    if key not in _measured:
        found = Own.of(suite.problem(training), context.setting.caps)
        _measured.clear()
        _measured[key] = found
    return _measured[key]


def about(student: Student, rebuilt: nn.Module | Mapping[str, nn.Module]) -> dict[str, Any]:
    """What a record says of a student besides the SHA-256 of its file.   ``rebuilt``: as the suite rebuilds it."""
    if not isinstance(rebuilt, nn.Module):
        parts = {name: _part(part) for name, part in student.parts.items()}
        numbers = sum(part.numbers for part in student.parts.values())
        return {"parts": parts, "recipe": to_data(student.recipe), "parameters": numbers}
    return {
        "architecture": student.architecture.name,
        "arguments": to_data(student.architecture.arguments),  # as JSON has them: a record read is the record made
        "recipe": to_data(student.recipe),
        "averaged": bool(student.averaged),
        **({"average": student.averaged} if student.averaged else {}),  # which one
        "parameters": parameters(rebuilt),
    }


def _part(part: Part) -> dict[str, Any]:
    built = part.architecture
    return {
        "kind": part.kind,
        **({"how": part.how} if part.how else {}),
        **({"architecture": built.name, "arguments": to_data(built.arguments)} if built is not None else {}),
        **({"base": part.base} if part.base is not None else {}),
        **({"text_bytes": len(part.text.encode())} if part.text is not None else {"numbers": part.numbers}),
    }


def complete(measurements: Sequence[Measurement], card: SuiteCard, split: str) -> None:
    """Raise ValueError unless every metric on the card was scored, is finite and in its range: anything else is a defect of the suite.

    A metric that is only shown may be missing, and has its range where it is there.
    On the split for tuning the primary metric is enough: what is held out of training need not resemble every test set.
    """
    scored = {m.metric: m for m in measurements}
    for name, m in scored.items():
        if not all(map(math.isfinite, (m.value, *(m.per_example or ())))):
            raise ValueError(f"{name} = {m.value} is not finite, or one of its examples is not")
    for metric in (*card.metrics, *card.shown):
        if metric.name not in scored:
            if metric.better is None or (split == "tune" and metric.name != card.primary):
                continue
            raise ValueError(f"the suite did not score {metric.name}")
        value = scored[metric.name].value
        low, high = metric.range or (None, None)
        if (low is not None and value < low) or (high is not None and value > high):
            raise ValueError(f"{metric.name} = {value} is outside {metric.range}")
