"""A short or a long training of the method under check, and what is seen of its teacher and its data meanwhile."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import gc
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from distillbench.cards import registry
from distillbench.cards.card import Budget
from distillbench.checks.core import Failed, Subject
from distillbench.checks.draws import Draws
from distillbench.checks.watch import Seen, Watch, named_weights, tensors
from distillbench.identity import sha256
from distillbench.problems.classification.oracle import ClassifierOracle
from distillbench.problems.language_modeling.models import LanguageModel
from distillbench.runs.plan import RunSpec
from distillbench.runs.suite import JudgeContext, Judgement, TrainContext, suite_of
from distillbench.training.learner import Learner
from distillbench.training.oracle import ModuleOracle, Oracle
from distillbench.training.run import Run
from distillbench.training.student import Student, tensor_digest

SHORT = 12  # batches of a short training: the fewest in which every phase of every method has its turn
FEW = 6  # batches of a training whose every step counts alike
ROWS = 64  # the most examples in a batch of a short training
LONG, LONG_ROWS = 250, 32  # the most batches of a long training, and the most examples in one
PLAIN: dict[str, Any] = {
    "optimizer": "sgd",
    "learning_rate": 0.01,
    "momentum": 0.0,
    "weight_decay": 0.0,
    "clip": None,
    "schedule": "constant",
}


@dataclasses.dataclass
class Trial:
    """One training: the student, the run, the problem and what was seen.

    Attributes:
        seen: what the loops did.  teacher_faults: what was wrong with the teacher.  data_faults: what of the problem's data was changed.
        rebuild, judge: as the suite does.
    """

    student: Student
    run: Run
    problem: Any
    rebuild: Callable[[Student], nn.Module | Mapping[str, nn.Module]]
    judge: Callable[[Student], Judgement]
    seen: Seen
    teacher_faults: list[str]
    data_faults: list[str]

    @property
    def starts(self) -> dict[nn.Module, dict[str, Tensor]]:
        """Parameters of every trained network before its first loop."""
        return self.seen.starts

    @property
    def ends(self) -> dict[nn.Module, dict[str, Tensor]]:
        """The same after its last loop."""
        return self.seen.ends

    @property
    def exported(self) -> Mapping[str, tuple[nn.Module | None, nn.Module | None]]:
        """Part -> the network as it was exported and as it was trained."""
        return self.seen.parts

    @functools.cached_property
    def digest(self) -> str:
        """Of the exported student's bytes."""
        return sha256(self.student.to_bytes())

    @property
    def asked(self) -> float:
        """Questions to teachers: examples, and tokens that they generated."""
        return self.run.meter.counts["teacher_examples"] + self.run.meter.counts["teacher_tokens"]


def train(
    subject: Subject,
    *,
    spec: RunSpec | None = None,
    batches: int = SHORT,
    rows: int | None = None,
    seeds: Mapping[str, int] | None = None,
    folder: Path | None = None,
    kill_at: int | None = None,
    micro_batches: int = 1,
    edit: Callable[[Any], Any] | None = None,
    change: Callable[[Any], Any] | None = None,
    shuffled: bool = False,
    hyper: Mapping[str, Any] | None = None,
    module: ModuleType | None = None,
    look: Callable[[Learner, Mapping[str, Tensor]], None] | None = None,
    closely: bool = False,
    draws: Draws | None = None,
    **training: Any,
) -> Trial:
    """Distil once on the subject's track.

    Args:
        spec: another run than the subject's with seed 0.
        rows: the most examples in a batch, where that is fewer than the track's.
        kill_at: die when this checkpoint (counted from 1) has been written.
        edit: the problem -> the problem that the method gets in its place.
        change: a batch -> the batch that every loss gets in its place.
        look: gets the terms of every loss, with their graph.
        shuffled: every teacher answers each row with what it says of the row before.
        hyper: hyper-parameters with another value than the card's.  module: other code than the subject's.
        closely: look at every update: see :class:`Watch`.  draws: note what the method draws.
        training: fields of the track's :class:`card.Training` to replace.
    """
    spec = spec or subject.spec
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
    if shuffled:
        problem = shuffle(problem)
    frozen = [teacher for teacher in problem.teachers.values() if isinstance(teacher, ModuleOracle)]
    if edit is not None:
        problem = edit(problem)
    faults: list[str] = []
    seen = Watch([lambda: _modes(frozen, faults)]) if closely else Seen(kill_at, change, look)
    for teacher in frozen:
        _watch(teacher, seen, faults)
    before = {name: (x, tensor_digest({"": x})) for name, x in data(problem)} if closely else {}
    run = Run(seeds=roles, budget=setting.budget, training=setting.training, oracles=problem.teachers.values(), folder=folder,
              checkpoint_seconds=0.0, micro_batches=micro_batches, observer=seen)  # fmt: skip
    distill = (module or subject.module).distill
    starts = {network: named_weights(network) for network in problem.students.values()}
    with contextlib.ExitStack() as stack:
        if draws is not None:
            stack.enter_context(draws.noted())
        if isinstance(seen, Watch):
            stack.callback(register_optimizer_step_post_hook(seen.other).remove)
            stack.callback(gc.unfreeze)
        student = distill(problem, run, **{**copy.deepcopy(spec.hyperparameters), **(hyper or {})})
    if not isinstance(student, Student):
        raise Failed(f"distill returned {type(student).__name__}; return run.fit(...) or run.export(...)")
    if not shuffled:
        faults += [fault for teacher in frozen for fault in _left(teacher)]
    if isinstance(seen, Watch):
        seen.moved += [f"{name} before its first loop" for name in _moved_before(problem, starts, seen)]
    judging = JudgeContext(spec.setting, setting, roles, split=spec.split)
    changed = [name for name, (x, digest) in before.items() if tensor_digest({"": x}) != digest]
    if closely:
        changed += [f"the table of {name}" for teacher in frozen for name in _stale(teacher)]
    rebuild, judge = functools.partial(suite.rebuild, ctx=judging), functools.partial(suite.evaluate, ctx=judging)
    return Trial(student, run, problem, rebuild, judge, seen, list(dict.fromkeys(faults)), changed)


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


@functools.lru_cache(maxsize=1)
def long_training(subject: Subject) -> Trial:
    """As many steps as a run of the track has, or as a check may take, each looked at; made once."""
    return train(subject, batches=steps(subject), rows=LONG_ROWS, closely=True)


def steps(subject: Subject) -> int:
    """How many batches a long training has; a short one's on a track that somebody chose, whose networks may be of any size."""
    setting = subject.spec.setting_card
    return min(LONG if subject.own_track else SHORT, setting.budget.student_examples // setting.training.batch_size)


def updated(trial: Trial) -> bool:
    """Whether a loop updated the student."""
    return trial.run.meter.counts["student_steps"] > 0


# --- the teacher ----------------------------------------------------------------------------------------------------


def shuffle(problem: Any, active: Callable[[], bool] | None = None) -> Any:
    """``problem`` with teachers that answer each row with what they say of the row before: always, or while ``active``.

    Who is active only from some time on calls :func:`renamed` then.
    """

    def rolled(_: nn.Module | None, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if active is not None and not active():
            return None
        sizes = [len(x) for x in (*inputs, *named.values()) if isinstance(x, Tensor) and x.dim()]

        def roll(x: Any) -> Any:
            return x.roll(1, 0) if isinstance(x, Tensor) and x.dim() and len(x) == sizes[0] else x

        return tuple(map(roll, inputs)), {name: roll(x) for name, x in named.items()}

    for teacher in problem.teachers.values():
        if isinstance(teacher, ModuleOracle):
            teacher._module.register_forward_pre_hook(rolled, with_kwargs=True)
            if isinstance(teacher._module, LanguageModel):
                teacher._module.decode = _decoding(teacher._module.decode, rolled)  # type: ignore[method-assign]
            if active is None:
                renamed(teacher)
    # What is remembered by the teacher's digest is known under the new one.
    return dataclasses.replace(problem)


def renamed(teacher: Oracle) -> None:
    """From now on no text and no table of the true teacher stands for this shuffled one."""
    teacher.digest = sha256(f"shuffled {teacher.digest}".encode())
    if isinstance(teacher, ClassifierOracle):
        teacher._tables.clear()


def _decoding(decode: Callable[..., Any], rolled: Callable[..., Any]) -> Callable[..., Any]:
    def other(ids: Tensor, attention: Tensor, cache: object) -> Any:
        given = rolled(None, (ids, attention), {})
        return decode(*(given[0] if given is not None else (ids, attention)), cache)

    return other


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


def _watch(oracle: ModuleOracle, seen: Seen, faults: list[str]) -> None:
    """Notes what is wrong with any forward pass of the teacher, of a part of it, or of a copy that nothing trains."""
    parts = set(oracle._module.modules())

    def note(fault: str) -> None:
        if fault not in faults:
            faults.append(fault)

    def hook(module: nn.Module, *_: Any) -> None:  # copies carry it along
        graph = torch.is_grad_enabled() and not oracle.differentiable
        if module in parts:
            if module.training:
                note("it answered in train mode")
            if graph:
                note("it was asked with gradients on")
        elif seen.training and module not in seen.training:
            if module.training:
                note("a copy of it that nothing trains answered in train mode")
            if graph and any(p.requires_grad for p in module.parameters()):
                note("a copy of it that nothing trains was asked with gradients on")

    for part in parts:
        part.register_forward_pre_hook(hook)


def _modes(teachers: list[ModuleOracle], faults: list[str]) -> None:
    if any(part.training for teacher in teachers for part in teacher._module.modules()) and "it was put into train mode" not in faults:
        faults.append("it was put into train mode")


def _moved_before(problem: Any, starts: Mapping[nn.Module, Mapping[str, Tensor]], seen: Seen) -> list[str]:
    """The students that had other weights when their first loop began than when the method got them, and not a teacher's."""
    known = [tensor for x in problem.teachers.values() if isinstance(x, ModuleOracle) for tensor in x._module.state_dict().values()]
    found = []
    for name, network in problem.students.items():
        for key, weight in seen.starts.get(network, {}).items():
            if not torch.equal(weight, starts[network][key]) and not any(torch.equal(weight, t) for t in known):
                found.append(name)
                break
    return found


# --- the data -------------------------------------------------------------------------------------------------------


def data(problem: Any) -> list[tuple[str, Tensor]]:
    """(name, tensor) of all data of a problem: its examples, splits and texts, and what its teachers hold of them."""
    found: list[tuple[str, Tensor]] = []
    for field in dataclasses.fields(problem):
        value = getattr(problem, field.name)
        held = {k: v for k, v in vars(value).items() if k != "_module"} if isinstance(value, Oracle) else value
        found += tensors(held, field.name)
    return found


def _stale(teacher: ModuleOracle) -> list[str]:
    """The tables of answers that are not what the teacher says."""
    if not isinstance(teacher, ClassifierOracle) or not teacher._tables or teacher._data is None:
        return []
    fresh = ClassifierOracle(teacher._module, teacher._data)
    fields = ("logits",) if teacher._tables.keys() == {"logits"} else tuple(teacher._tables)
    again = fresh._table(fields)
    return [name for name, table in teacher._tables.items() if not torch.allclose(table, again[name], rtol=1e-5, atol=1e-6)]
