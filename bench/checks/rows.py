"""Checks of which rows a method learns from: views of examples as they come, and never those that are kept out of training."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from distillbench.checks.core import Failed, Skipped, Subject, Unproven, check
from distillbench.checks.teacher import SLIGHT, apart
from distillbench.checks.trial import FEW, ROWS, Trial, first_training, shuffle, train, updated
from distillbench.errors import NotApplicable
from distillbench.problems.classification.problem import Classification
from distillbench.problems.language_modeling.problem import LanguageModeling
from distillbench.training.data import Arrays, Batch, Batches, Request

VIEWS = 50  # batches of a training in which every example is seen several times
JITTER = 0.5  # of a view beside its example


class _Views(Batches[Batch]):
    """Batches in which an example looks different every time, as where a setting augments."""

    def __init__(self, batches: Batches[Batch]) -> None:
        self.batches, self.batch_size = batches, batches.batch_size

    def rows(self, position: int) -> Tensor:
        """As those of the batches."""
        return self.batches.rows(position)

    def take(self, request: Request) -> Batch:
        """A new view of each row, which is a function of its place alone."""
        batch = self.batches.take(request)
        generator = torch.Generator().manual_seed(1 + request.position)
        noise = torch.randn((self.batch_size, *batch.inputs.shape[1:]), generator=generator)[: len(batch)]
        view: Batch = dataclasses.replace(batch, inputs=batch.inputs + JITTER * noise)
        return view


def _augmented(subject: Subject, rows: int, *, roll_from: int | None = None, renamed: bool = False) -> Trial:
    """A training on views. From loss ``roll_from`` on teachers answer of other rows; ``renamed``: a pass over the examples numbers them
    otherwise than batches do."""
    count = 0

    def begin(batch: Any) -> Any:
        nonlocal count
        count += 1
        return batch

    def edit(problem: Any) -> Any:
        data: Arrays = problem.train
        problem.teacher._data = None

        def once(size: int) -> Iterator[Batch]:
            for rows in torch.arange(len(data)).split(size):
                batch = data.take(rows)
                yield dataclasses.replace(batch, index=(batch.index + 1) % len(data)) if renamed else batch

        views = dataclasses.replace(problem, batches=_Views(problem.batches), labelled=_Views(problem.labelled), train=None, once=once)
        return views if roll_from is None else shuffle(views, lambda: count >= roll_from)

    return train(subject, batches=VIEWS, rows=rows, edit=edit, change=begin)


@check
def fresh_answers(subject: Subject) -> str:
    """Where an example looks different every time, the teacher is asked about what the student sees: no answer is kept by its number."""
    if subject.card.control or not subject.own_track:
        raise Skipped("a control is a yardstick" if subject.card.control else "only on the analytic track")
    if not issubclass(subject.problem, Classification):
        raise Skipped("only for problems whose examples are numbered")
    first = first_training(subject)
    if not (updated(first) and first.asked):
        raise Skipped("no teacher is asked")
    count = len(first.problem.train)
    rows = next(n for n in range(min(ROWS, count), 0, -1) if count % n == 0)  # so that an epoch has no tail: all are seen in the first one
    try:
        plain = _augmented(subject, rows)
    except NotApplicable as nothing:
        raise Skipped(str(nothing)) from None
    except (AttributeError, TypeError) as error:
        raise Failed(
            f"where a setting augments, problem.train is None, and this fails ({error}): ask the teacher about the batch, or raise "
            "NotApplicable"
        ) from None
    differ, moved = apart(plain, _augmented(subject, rows, renamed=True))
    if differ > SLIGHT * moved:
        raise Failed("what the teacher says of an example is kept by its number, and given to other views of it: ask about the batch")
    later, moved = apart(plain, _augmented(subject, rows, roll_from=count // rows + 1))
    sooner, _ = apart(plain, _augmented(subject, rows, roll_from=1))
    if sooner > SLIGHT * moved >= later:
        raise Failed(
            "the teacher is asked about the first view of an example, and its answer is given to all later ones: ask about the batch"
        )
    return "asked about every view" if later > SLIGHT * moved else "no answer about an example enters"


@check
def splits(subject: Subject) -> str:
    """No student learns on rows that are kept out of training: those of ``tune``, or of ``validation``."""
    first = first_training(subject)
    if not updated(first):
        raise Skipped("nothing is trained")
    kept = _kept_out(first.problem)
    if kept is None:
        raise Skipped("the problem holds nothing that is kept out of training")
    name, rows = kept
    known = set(rows)
    learnt: set[str] = set()

    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if torch.is_grad_enabled() and module.training and inputs and isinstance(inputs[0], Tensor):
            seen = _keys(*inputs[:2])
            if 2 * sum(row in known for row in seen) > len(seen):  # short texts are sometimes sampled again
                learnt.add(name)

    def edit(problem: Any) -> Any:
        build = problem.build

        @functools.wraps(getattr(build, "func", build))
        def hooked(*args: Any, **named: Any) -> nn.Module:
            network: nn.Module = build(*args, **named)
            network.register_forward_pre_hook(hook)
            return network

        for network in problem.students.values():
            network.register_forward_pre_hook(hook)
        return dataclasses.replace(problem, build=hooked)

    train(subject, batches=FEW, rows=ROWS, edit=edit)
    if learnt:
        raise Failed(f"a network learns on rows of problem.{name}, which are there to choose by and not to train on")
    if isinstance(first.problem, Classification):
        few, moved = apart(first, train(subject, rows=ROWS, edit=functools.partial(_other_tune, some=FEW)))
        if few > 0:  # who chooses among a handful by a thousand rows chooses the same
            raise Failed(f"{FEW} other rows of problem.tune move the student by {few / moved:.2g} of its way: it learns on them")
        differ, moved = apart(first, train(subject, rows=ROWS, edit=_other_tune))
        if differ > 0:
            raise Unproven(
                f"the student follows problem.tune (by {differ / moved:.2g} of its way): that is fine where something is chosen by it, "
                "which nobody can tell"
            )
    return f"nothing learns on problem.{name}"


def _kept_out(problem: Any) -> tuple[str, list[bytes]] | None:
    if isinstance(problem, Classification) and problem.tune is not None:
        return "tune", _keys(problem.tune.inputs)
    if isinstance(problem, LanguageModeling):
        return "validation", _keys(problem.validation.ids, problem.validation.attention)
    return None


def _keys(rows: Tensor, attention: object = None) -> list[bytes]:
    """The bytes of each row; of a text without its padding."""
    masked = isinstance(attention, Tensor) and attention.dtype == torch.bool and attention.shape == rows.shape
    given = [row[real] for row, real in zip(rows, attention, strict=True)] if masked and isinstance(attention, Tensor) else list(rows)
    return [row.detach().cpu().contiguous().numpy().tobytes() for row in given]


def _other_tune(problem: Any, some: int | None = None) -> Any:
    """``problem`` with other inputs and labels in its tune split, in all rows or in ``some`` of them, spread over it."""
    tune = problem.tune
    rows = torch.arange(len(tune)) if some is None else torch.arange(some) * len(tune) // some
    inputs, labels = tune.inputs.clone(), tune.labels.clone()
    inputs[rows] *= 1.5
    labels[rows] = (labels[rows] + 1) % problem.classes
    other = dataclasses.replace(tune, inputs=inputs, labels=labels)
    return dataclasses.replace(problem, tune=other)
