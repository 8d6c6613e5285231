"""Checks of ``distill`` itself, by short trainings on the problem's analytic track."""

from __future__ import annotations

import copy
import dataclasses
import functools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distillbench.cards import registry
from distillbench.cards.card import Budget
from distillbench.checks.core import Failed, Skipped, Subject, check
from distillbench.identity import sha256
from distillbench.problems.classification.problem import Classification
from distillbench.problems.language_modeling.problem import LanguageModeling
from distillbench.problems.language_modeling.texts import TokenBatch
from distillbench.runs.suite import JudgeContext, TrainContext, suite_of
from distillbench.training.data import Batch, Batches, Request
from distillbench.training.learner import Learner
from distillbench.training.observer import Observer
from distillbench.training.oracle import ModuleOracle
from distillbench.training.run import Run
from distillbench.training.student import Student, tensor_digest

SHORT = 12  # batches of a short training: the fewest in which every phase of every method has its turn
FEW = 6  # batches of a training whose every step counts alike
ROWS = 64  # the most examples in a batch of a short training
WATCHED = 24  # batches of a training in which one example is followed
DEATHS = (1, SHORT // 2 - 1, SHORT // 2 - 2)  # checkpoints that each process in a row lives to write: after 1, 6 and 10 batches in all
PLAIN: dict[str, Any] = {
    "optimizer": "sgd",
    "learning_rate": 0.01,
    "momentum": 0.0,
    "weight_decay": 0.0,
    "clip": None,
    "schedule": "constant",
}


class _Killed(BaseException):
    """Stands for kill -9: nothing after the checkpoint is written."""


@dataclasses.dataclass
class Trial:
    """One short training: the student, the run, the problem and what the teacher was seen doing.

    Attributes:
        starts, ends: parameters of every trained network before its first and after its last loop.
        module: the network that was exported, or None.
    """

    student: Student
    run: Run
    problem: Any
    rebuild: Callable[[Student], nn.Module | Mapping[str, nn.Module]]
    teacher_faults: list[str]
    starts: dict[nn.Module, dict[str, Tensor]]
    ends: dict[nn.Module, dict[str, Tensor]]
    exported: Mapping[str, tuple[nn.Module | None, nn.Module | None]]


def train(
    subject: Subject,
    *,
    batches: int = SHORT,
    rows: int | None = None,
    seeds: Mapping[str, int] | None = None,
    folder: Path | None = None,
    kill_at: int | None = None,
    micro_batches: int = 1,
    edit: Callable[[Any], Any] | None = None,
    change: Callable[[Any], Any] | None = None,
    **training: Any,
) -> Trial:
    """Distil once on the subject's track.

    Args:
        rows: the most examples in a batch, where that is fewer than the track's.
        kill_at: die when this checkpoint (counted from 1) has been written.
        edit: the problem -> the problem that the method gets in its place.
        change: a batch -> the batch that every loss gets in its place.
        training: fields of the track's :class:`card.Training` to replace.
    """
    spec = subject.spec
    suite = suite_of(registry.find("suite", spec.suite))
    setting = spec.setting_card
    rows = min(setting.training.batch_size, rows or setting.training.batch_size)
    setting = dataclasses.replace(
        setting,
        budget=Budget(student_examples=batches * rows),
        training=dataclasses.replace(setting.training, batch_size=rows, **training),
    )
    roles = dict(seeds or spec.seeds)
    torch.set_num_threads(1)
    kept = answers() / "cache" if subject.card.problem == "language-modeling" else None
    problem: Any = suite.problem(TrainContext(spec.setting, setting, roles, cache=kept))
    frozen = [teacher for teacher in problem.teachers.values() if isinstance(teacher, ModuleOracle)]
    faults = [_watch(teacher) for teacher in frozen]
    if edit is not None:
        problem = edit(problem)
    seen = _Seen(kill_at, change)
    run = Run(seeds=roles, budget=setting.budget, training=setting.training, oracles=problem.teachers.values(), folder=folder,
              checkpoint_seconds=0.0, micro_batches=micro_batches, observer=seen)  # fmt: skip
    student = subject.module.distill(problem, run, **copy.deepcopy(spec.hyperparameters))
    if not isinstance(student, Student):
        raise Failed(f"distill returned {type(student).__name__}; return run.fit(...) or run.export(...)")
    for teacher, wrong in zip(frozen, faults, strict=True):
        wrong += _left(teacher)
    noted = list(dict.fromkeys(fault for wrong in faults for fault in wrong))
    rebuild = functools.partial(suite.rebuild, ctx=JudgeContext(spec.setting, setting, roles))
    return Trial(student, run, problem, rebuild, noted, seen.starts, seen.ends, seen.parts)


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


def answers() -> Path:
    """The store of this process, for as long as it lives: a language model's responses are made once for all methods, as files."""
    return Path(_folder().name)


@functools.lru_cache(maxsize=1)
def first_training(subject: Subject) -> Trial:
    """The training that several checks look at, made once. They read it and change nothing."""
    return train(subject, rows=ROWS)


@functools.lru_cache(maxsize=1)
def plain_training(subject: Subject) -> Trial:
    """A few steps of plain gradient descent, which several checks compare with, made once. They read it and change nothing."""
    return train(subject, batches=FEW, **PLAIN)


def _left(oracle: ModuleOracle) -> list[str]:
    """What is wrong with the teacher after a training."""
    faults = []
    if tensor_digest(dict(oracle._module.state_dict())) != oracle.digest:
        faults.append("its weights or buffers were changed")
    if oracle._module.training:
        faults.append("it was left in train mode")
    if any(p.requires_grad or p.grad is not None for p in oracle._module.parameters()):
        faults.append("a gradient reached its parameters")
    return faults


def _watch(oracle: ModuleOracle) -> list[str]:
    """Notes what is wrong with any forward pass of the teacher or of a part of it."""
    faults: list[str] = []
    parts = set(oracle._module.modules())  # copies carry the hook along, and may be trained

    def hook(module: nn.Module, *_: Any) -> None:
        graph = torch.is_grad_enabled() and not oracle.differentiable
        for wrong, note in ((module.training, "it answered in train mode"), (graph, "it was asked with gradients on")):
            if module in parts and wrong and note not in faults:
                faults.append(note)

    for part in parts:
        part.register_forward_pre_hook(hook)
    return faults


class _Seen(Observer):
    """Notes what loops do to weights, dies in time, and changes batches.

    Of the checkpoints before the one it dies after only the last of each loop is written: it is restored.
    """

    def __init__(self, kill_at: int | None, change: Callable[[Any], Any] | None) -> None:
        self.starts: dict[nn.Module, dict[str, Tensor]] = {}
        self.ends: dict[nn.Module, dict[str, Tensor]] = {}
        self.parts: Mapping[str, tuple[nn.Module | None, nn.Module | None]] = {}
        self._kill_at, self._change, self._count = kill_at, change, 0

    def began(self, learners: Sequence[Learner]) -> None:
        for learner in learners:
            self.starts.setdefault(learner.module, _weights(learner.module))

    def batch(self, learner: Learner, batch: Any) -> Any:
        return batch if self._change is None else self._change(batch)

    def ended(self, learners: Sequence[Learner]) -> None:
        for learner in learners:
            self.ends[learner.module] = _weights(learner.module)

    def saves(self, step: int, steps: int | None) -> bool:
        self._count += 1
        return self._kill_at is None or self._count == self._kill_at or step == steps

    def saved(self, written: bool) -> None:
        if self._count == self._kill_at:
            raise _Killed

    def exported(self, parts: Mapping[str, tuple[nn.Module | None, nn.Module | None]]) -> None:
        self.parts = parts


def _weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().cpu().clone() for name, p in module.named_parameters()}


def _digest(trial: Trial) -> str:
    return sha256(trial.student.to_bytes())


def updated(trial: Trial) -> bool:
    """Whether a loop updated the student."""
    return trial.run.meter.counts["student_steps"] > 0


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
    """The teacher answers in evaluation mode and without a graph, and leaves as it came."""
    faults = first_training(subject).teacher_faults
    if faults:
        raise Failed(f"the teacher is to be asked through problem.teacher only: {'; '.join(faults)}")


@check
def seeds(subject: Subject) -> str:
    """The same seeds give the same student bit for bit; another init or data order gives another one."""
    trains = updated(first_training(subject))
    first, again = plain_training(subject), train(subject, batches=FEW, **PLAIN)
    if _digest(first) != _digest(again):
        raise Failed("two trainings with the same seeds differ: draw randomness from run.generator(...) or torch's global generator only")
    if not trains:
        return "the same student twice (nothing is trained)"
    base = subject.spec.seeds
    for role in ("init", "order"):
        if _digest(train(subject, batches=FEW, seeds={**base, role: base[role] + 1}, **PLAIN)) == _digest(first):
            raise Failed(f"another seed for {role!r} gives the same student: use problem.student (or new_student) and problem.batches")
    return "bit-identical; init and order matter"


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
            except _Killed:
                died += 1
            else:
                break  # at its end, or with fewer checkpoints than it was to be killed after
    if _digest(resumed) != _digest(whole):
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
    apart, moved = _apart(whole, train(subject, batches=FEW, micro_batches=3, **PLAIN))
    if not apart <= 1e-3 * moved:
        raise Failed(
            f"after {FEW} steps in 3 micro-batches the weights are off by {apart / moved if moved else apart:.2g} of the way they went: "
            "reduce with run.loss, and divide by nothing that is summed over a batch"
        )
    return f"weights differ by {apart:.1g} after {FEW} steps"


def _apart(one: Trial, other: Trial) -> tuple[float, float]:
    """The largest difference between the weights two trainings came to, and the longest way that one of them went."""
    apart = moved = 0.0
    for (module, end), theirs in zip(one.ends.items(), other.ends.values(), strict=True):
        for name, weight in end.items():
            moved = max(moved, float((weight - one.starts[module][name]).abs().max()))
            apart = max(apart, float((weight - theirs[name]).abs().max()))
    return apart, moved


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
    apart, moved = _apart(whole, train(subject, batches=FEW, change=padded, **PLAIN))
    if not apart <= 1e-3 * moved:
        raise Failed(
            f"with padding around the texts the weights are off by {apart / moved if moved else apart:.2g} of the way they went: "
            "give attention to the networks, and take only what batch.predicted counts"
        )
    return f"weights differ by {apart:.1g} after {FEW} steps"


@check
def alignment(subject: Subject) -> str:
    """What is said of an example, by its label or by the teacher, moves that example: labels and teacher's answers are not shifted.

    One example's label or teacher's answer is changed; the gradient in the inputs shows whom that reaches first. The answer is
    changed in the loss alone, or, where the loss does not ask, also in passes before the training. There it may reach many at
    once, through a mean over a class, but not one or two others alone.
    """
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
