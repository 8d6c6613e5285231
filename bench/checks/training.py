"""Checks of ``distill`` itself, by short trainings on the problem's analytic track, and by long ones where only the last step may show."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distillbench.checks.core import Failed, Skipped, Subject, check
from distillbench.checks.draws import Draws, another_day
from distillbench.checks.teacher import apart
from distillbench.checks.trial import (
    FEW,
    LONG_ROWS,
    PLAIN,
    ROWS,
    SHORT,
    first_training,
    long_training,
    plain_training,
    steps,
    train,
    updated,
)
from distillbench.checks.watch import Killed
from distillbench.problems.classification.problem import Classification
from distillbench.problems.language_modeling.problem import LanguageModeling
from distillbench.problems.language_modeling.texts import TokenBatch
from distillbench.training.data import Batch, Batches, Request

WATCHED = 24  # batches of a training in which one example is followed
DEATHS = (1, SHORT // 2 - 1, SHORT // 2 - 2)  # checkpoints that each process in a row lives to write: after 1, 6 and 10 batches in all


@check
def trains(subject: Subject) -> str:
    """The card says rightly whether a student is trained."""
    trial = first_training(subject)
    steps = int(trial.run.meter.counts["student_steps"])
    if steps and not subject.card.trains:
        raise Failed(f"the card says trains=False, and a loop updated the student {steps} times")
    if not steps and subject.card.trains:
        raise Failed("no loop updated the student: train through run.fit or run.loop, or say trains=False on the card")
    return f"{steps} updates"


@check
def teacher_intact(subject: Subject) -> None:
    """The teacher answers in evaluation mode and without a graph to the last step, and leaves as it came; so do its copies."""
    faults = first_training(subject).teacher_faults or long_training(subject).teacher_faults
    if faults:
        raise Failed(f"the teacher is to be asked through problem.teacher only: {'; '.join(faults)}")


@check
def seeds(subject: Subject) -> str:
    """The same seeds give the same student bit for bit; another init or data order gives another one."""
    trains = updated(first_training(subject))
    base = subject.spec.seeds
    ours, others = Draws(), Draws()
    first = train(subject, batches=FEW, draws=ours, **PLAIN)
    again = train(subject, batches=FEW, **PLAIN)
    if first.digest != again.digest:
        raise Failed("two trainings with the same seeds differ: draw randomness from run.generator(...) or torch's global generator only")
    with another_day():
        whole = train(subject, batches=steps(subject), rows=LONG_ROWS, closely=True)
    if whole.digest != long_training(subject).digest:
        raise Failed(
            f"two trainings of {steps(subject)} steps with the same seeds differ, and two of {FEW} do not: what changes on the way?"
        )
    if not trains:
        return "the same student twice (nothing is trained)"
    for role in ("init", "order"):
        if train(subject, batches=FEW, seeds={**base, role: base[role] + 1}, **PLAIN).digest == first.digest:
            raise Failed(f"another seed for {role!r} gives the same student: use problem.student (or new_student) and problem.batches")
    elsewhere = {**base, **{role: base[role] + 1 for role in ("init", "order", "noise")}}
    train(subject, batches=FEW, seeds=elsewhere, draws=others, **PLAIN)
    if constant := ours.alike(others):
        raise Failed(
            f"{constant} under every seed: a seed of its own; draw from the batch (batch.noise), run.generator(...) or run.seed(...)"
        )
    return f"bit-identical, over {steps(subject)} steps too; init and order matter"


@check
def resume(subject: Subject) -> str:
    """A training that is killed and resumed, several times over, gives the same student bit for bit."""
    whole = first_training(subject)
    if not updated(whole):
        raise Skipped("nothing is trained")
    died = 0
    with tempfile.TemporaryDirectory() as name:
        for life in (*DEATHS, None):
            try:
                resumed = train(subject, rows=ROWS, folder=Path(name), kill_at=life)
            except Killed:
                died += 1
            else:
                break  # at its end, or with fewer checkpoints than it was to be killed after
    if resumed.digest != whole.digest:
        raise Failed(f"killed {died} times and resumed, the student is another one: is there state outside modules and run.generator?")
    if resumed.run.meter.counts["student_examples"] != whole.run.meter.counts["student_examples"]:
        raise Failed("a resumed run is metered differently")
    return f"killed {died} times"


@check
def micro_batches(subject: Subject) -> str:
    """Three unequal micro-batches whose gradients are summed train the same student: the denominator is the whole batch.

    By plain gradient descent: Adam divides by the size of the gradient, and would hide a loss that is three times too large.
    """
    whole = plain_training(subject)
    if not updated(whole):
        raise Skipped("nothing is trained")
    differ, moved = apart(whole, train(subject, batches=FEW, micro_batches=3, **PLAIN))
    if not differ <= 1e-3 * moved:
        raise Failed(
            f"after {FEW} steps in 3 micro-batches the weights are off by {differ / moved if moved else differ:.2g} of the way they went: "
            "reduce with run.loss, and divide by nothing that is summed over a batch"
        )
    return f"weights differ by {differ:.1g} after {FEW} steps"


@check
def token_padding(subject: Subject) -> str:
    """Fifty tokens of padding before the prompts and fifty behind the responses change no loss and no gradient."""

    if not isinstance(first_training(subject).problem, LanguageModeling):
        raise Skipped("only for language models")

    def padded(batch: TokenBatch) -> TokenBatch:
        by_token = {f.name: x for f in dataclasses.fields(batch) if getattr(x := getattr(batch, f.name), "shape", None) == batch.ids.shape}
        # Not the usual padding token: what is not attended to may be anything.
        wide: dict[str, Any] = {name: nn.functional.pad(x, (50, 50), value=int(name == "ids")) for name, x in by_token.items()}
        return dataclasses.replace(batch, **wide)

    whole = plain_training(subject)
    if not updated(whole):
        raise Skipped("nothing is trained")
    differ, moved = apart(whole, train(subject, batches=FEW, change=padded, **PLAIN))
    if not differ <= 1e-3 * moved:
        raise Failed(
            f"with padding around the texts the weights are off by {differ / moved if moved else differ:.2g} of the way they went: "
            "give attention to the networks, and take only what batch.predicted counts"
        )
    return f"weights differ by {differ:.1g} after {FEW} steps"


@check
def alignment(subject: Subject) -> str:
    """What is said of an example, by its label or by the teacher, moves that example: labels and teacher's answers are not shifted.

    One example's label or teacher's answer is changed; the gradient in the inputs shows whom that reaches first. The answer is
    changed in the loss alone, or, where the loss does not ask, also in passes before the training. There it may reach many at
    once, through a mean over a class, but not one or two others alone. Of a text the teacher's answer at one token is changed, and the
    gradient in the student's states shows which token that reaches.
    """
    if issubclass(subject.problem, LanguageModeling):
        return _of_tokens(subject)
    seen: list[tuple[Tensor, Tensor]] = []
    train(subject, batches=WATCHED, edit=functools.partial(_altered, seen=seen))
    if all(not _gradient(x).any() for _, x in seen):
        raise Skipped("no gradient reaches the inputs of problem.batches")
    last = seen[-1][0]  # of the last batch, because a method may begin with a weight of zero
    row = int(last[len(last) // 2])
    found = []
    for what, few in (("label", len(last)), ("answer", len(last)), ("answer everywhere", 2)):
        if what == "answer everywhere" and "answer" in found:
            continue
        changed: list[tuple[Tensor, Tensor]] = []
        train(subject, batches=WATCHED, edit=functools.partial(_altered, seen=changed, what=what, row=row))
        for (index, before), (_, after) in zip(seen, changed, strict=True):
            change = (_gradient(after) - _gradient(before)).norm(dim=1)
            if change.max() <= 1e-5 * _gradient(before).norm(dim=1).max():
                continue
            moved = index[change > 0.1 * change.max()]
            if row in moved:
                found.append(what)
                break
            if len(moved) <= few:
                said = "label" if what == "label" else "answer of the teacher"
                raise Failed(f"another {said} for one example moves another example and not that one: are rows shifted or mixed up?")
    if not found:
        raise Skipped("no one example's label or teacher's answer changes its gradient")
    return f"follows {' and '.join(found)}"


def _of_tokens(subject: Subject) -> str:
    """:func:`alignment` for texts, at the first update that the teacher's answers to its batch move."""
    plain, other = _Tokens(altered=False), _Tokens(altered=True)
    for tokens in (plain, other):
        train(subject, batches=FEW, edit=tokens.edit, change=tokens.begin)
    for position, ids, before, now, after in zip(plain.positions, plain.ids, plain.slopes, other.ids, other.slopes, strict=False):
        if ids.shape != now.shape or not torch.equal(ids, now):
            break  # other texts: the teacher chose or wrote them
        if before is None or after is None:
            continue
        change = (after - before).norm(dim=2).sum(0)
        if change.max() <= 1e-5 * before.norm(dim=2).sum(0).max():
            continue
        moved = (change > 0.1 * change.max()).nonzero().flatten().tolist()
        if position in moved:
            return "follows the teacher's answer at a token"
        raise Failed(
            f"another answer of the teacher at token {position} moves the student at token {moved[0]} and not at that one: "
            "are the teacher's distributions shifted?"
        )
    raise Skipped("no answer of the teacher at a token changes a gradient there")


class _Tokens:
    """The gradient in the student's states at every loss, with or without another answer of the teacher at one token of all rows.

    Attributes:
        positions, ids: that token, and the batch's tokens, by loss.  slopes: the gradient (B, T, D); None where the student was not asked.
    """

    def __init__(self, *, altered: bool) -> None:
        self.positions: list[int] = []
        self.ids: list[Tensor] = []
        self.slopes: list[Tensor | None] = []
        self._altered, self._open = altered, False

    def begin(self, batch: Any) -> Any:
        """A loss gets ``batch``."""
        predicts = batch.response[:, 1:].any(0).nonzero().flatten()
        self.positions.append(int(predicts[len(predicts) // 2]))
        self.ids.append(batch.ids)
        self.slopes.append(None)
        self._open = True
        return batch

    def edit(self, problem: Any) -> Any:
        """Listen to the problem's student and teacher."""
        problem.student.register_forward_hook(self._listen)
        if self._altered:
            problem.teacher._module.register_forward_hook(self._alter)
        return problem

    def _listen(self, _: nn.Module, inputs: Any, states: Tensor) -> None:
        if states.requires_grad and self._open:
            states.register_hook(self._note)

    def _note(self, gradient: Tensor) -> None:
        self._open = False  # the loss is computed: what the teacher is asked from here on is not about this batch
        self.slopes[-1] = gradient.clone()

    def _alter(self, _: nn.Module, inputs: Any, states: Tensor) -> Tensor | None:
        if not self._open or states.dim() != 3 or states.shape[1] <= self.positions[-1]:
            return None
        other = states.clone()
        other[:, self.positions[-1]] = states[:, self.positions[-1]].roll(1, -1)
        return other


def _gradient(inputs: Tensor) -> Tensor:
    """What reached ``inputs`` (B, ...), as (B, N)."""
    return (torch.zeros_like(inputs) if inputs.grad is None else inputs.grad).flatten(1)


class _Altered(Batches[Batch]):
    """Batches whose inputs collect their gradient and stand in ``seen``, with another label for example ``row``."""

    def __init__(self, batches: Batches[Batch], classes: int, row: int, seen: list[tuple[Tensor, Tensor]]) -> None:
        self.batches, self.classes, self.row, self.seen = batches, classes, row, seen
        self.batch_size = batches.batch_size

    def rows(self, position: int) -> Tensor:
        """As those of the batches."""
        return self.batches.rows(position)

    def take(self, request: Request) -> Batch:
        """A batch with what is altered in it."""
        batch = self.batches.take(request)
        inputs = batch.inputs.clone().requires_grad_()
        self.seen.append((batch.index, inputs))
        labels = torch.where(batch.index == self.row, (batch.labels + 1) % self.classes, batch.labels)
        altered: Batch = dataclasses.replace(batch, inputs=inputs, labels=labels)
        return altered


def _altered(problem: Any, seen: list[tuple[Tensor, Tensor]], what: str = "", row: int = -1) -> Any:
    """``problem`` with the inputs of its batches in ``seen`` and another label or teacher's answer for example ``row``."""
    if not isinstance(problem, Classification):
        raise Skipped("only for problems with labels")
    if what.startswith("answer"):
        teacher: Any = problem.teacher
        logits, outputs = teacher.logits, teacher.outputs

        def other(batch: Batch, answer: Tensor) -> Tensor:
            if what == "answer" and not batch.inputs.requires_grad:
                return answer  # not asked about a batch of the training
            mine = (batch.index == row).view(-1, *[1] * (answer.dim() - 1))
            return torch.where(mine, answer.roll(1, dims=1), answer)

        def other_outputs(batch: Batch) -> Any:
            true = outputs(batch)
            stages = tuple(other(batch, s) for s in true.stages)
            return dataclasses.replace(true, logits=other(batch, true.logits), embedding=other(batch, true.embedding), stages=stages)

        teacher.logits = lambda batch: other(batch, logits(batch))
        teacher.outputs = other_outputs
    altered = functools.partial(_Altered, classes=problem.classes, row=row if what == "label" else -1, seen=seen)
    return dataclasses.replace(problem, batches=altered(problem.batches), labelled=altered(problem.labelled))
