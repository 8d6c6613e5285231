"""Checks of ``distill`` itself, by short trainings on the problem's analytic track."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench import registry
from bench.card import Budget, Setting, from_data
from bench.checks.core import Failed, Skipped, Subject, check
from bench.plan import plan
from bench.run import Run
from bench.student import Student, tensor_digest

SHORT = 24  # batches of a short training
SEEDS = 3


class _Killed(BaseException):
    """Stands for kill -9: nothing after the checkpoint is written."""


@dataclasses.dataclass
class Trial:
    """One short training: the student, the run, the problem and what the teacher was seen doing."""

    student: Student
    run: Run
    problem: Any
    suite: Any
    teacher_faults: list[str]


def train(
    subject: Subject,
    *,
    batches: int | None = SHORT,
    seeds: Mapping[str, int] | None = None,
    seed: int = 0,
    method: str | None = None,
    folder: Path | None = None,
    kill_at: int | None = None,
    micro_batches: int = 1,
) -> Trial:
    """Distil once on the subject's track. ``batches`` None is the whole budget; ``kill_at`` dies at that checkpoint."""
    track = subject.track
    [spec] = plan(track, [method or subject.name], [seed], controls=False)
    entry = registry.find("suite", spec.suite)
    suite = entry.load()
    setting: Setting = from_data(spec.resolved["suite"]["card"]["settings"][spec.setting])
    if batches is not None:
        setting = dataclasses.replace(setting, budget=Budget(student_examples=batches * setting.training.batch_size))
    roles = dict(seeds or spec.resolved["seeds"])
    torch.set_num_threads(1)
    problem = suite.problem(spec.setting, setting, roles)
    faults = _watch(problem.oracle._module)
    run = Run(seeds=roles, budget=setting.budget, training=setting.training, meter=problem.oracle.meter, folder=folder,
              checkpoint_seconds=0.0, micro_batches=micro_batches)  # fmt: skip
    if kill_at is not None:
        _kill_after(run, kill_at)
    module = subject.module if method is None else registry.find("method", method, suite.CARD.problem).load()
    student = module.distill(problem, run, **spec.resolved["method"]["hyperparameters"])
    if not isinstance(student, Student):
        raise Failed(f"distill returned {type(student).__name__}; return run.fit(...) or run.export(...)")
    digest = tensor_digest(dict(problem.oracle._module.state_dict()))
    if digest != problem.oracle.digest:
        faults.append("its weights or buffers were changed")
    if problem.oracle._module.training:
        faults.append("it was left in train mode")
    if any(p.requires_grad or p.grad is not None for p in problem.oracle._module.parameters()):
        faults.append("a gradient reached its parameters")
    return Trial(student, run, problem, suite, faults)


def _watch(teacher: nn.Module) -> list[str]:
    """Notes what is wrong with any forward pass of the teacher."""
    faults: list[str] = []

    def hook(module: nn.Module, *_: Any) -> None:
        for wrong, note in ((module.training, "it answered in train mode"), (torch.is_grad_enabled(), "it was asked with gradients on")):
            if wrong and note not in faults:
                faults.append(note)

    teacher.register_forward_pre_hook(hook)
    return faults


def _kill_after(run: Run, saves: int) -> None:
    original: Callable[..., None] = run._save
    count = 0

    def save(*args: Any) -> None:
        nonlocal count
        original(*args)
        count += 1
        if count >= saves:
            raise _Killed

    run._save = save  # type: ignore[assignment,method-assign]


def _digest(trial: Trial) -> str:
    return tensor_digest(trial.student.weights)


def _trains(trial: Trial) -> bool:
    return trial.run.meter.counts["student_steps"] > 0


@check
def teacher_intact(subject: Subject) -> None:
    """The teacher answers in evaluation mode and without a graph, and leaves as it came."""
    faults = train(subject).teacher_faults
    if faults:
        raise Failed(f"the teacher is to be asked through problem.teacher only: {'; '.join(faults)}")


@check
def seeds(subject: Subject) -> str:
    """The same seeds give the same student bit for bit; another init or data order gives another one."""
    first, again = train(subject), train(subject)
    if _digest(first) != _digest(again):
        raise Failed("two trainings with the same seeds differ: draw randomness from run.generator(...) or torch's global generator only")
    if not _trains(first):
        return "the same student twice (nothing is trained)"
    base = plan(subject.track, [subject.name], [0], controls=False)[0].resolved["seeds"]
    for role in ("init", "order"):
        if _digest(train(subject, seeds={**base, role: base[role] + 1})) == _digest(first):
            raise Failed(f"another seed for {role!r} gives the same student: use problem.student (or new_student) and problem.batches")
    return "bit-identical; init and order matter"


@check
def resume(subject: Subject) -> str:
    """A training that is killed and resumed gives the same student bit for bit."""
    whole = train(subject)
    if not _trains(whole):
        raise Skipped("nothing is trained")
    points = (1, SHORT // 2, SHORT - 2)
    for point in points:
        with tempfile.TemporaryDirectory() as name:
            try:
                train(subject, folder=Path(name), kill_at=point)
            except _Killed:
                resumed = train(subject, folder=Path(name))
            else:
                continue
        if _digest(resumed) != _digest(whole):
            raise Failed(
                f"killed after checkpoint {point} and resumed, the student differs: is there state outside modules and generators?"
            )
        if resumed.run.meter.counts["student_examples"] != whole.run.meter.counts["student_examples"]:
            raise Failed("a resumed run is metered differently")
    return f"killed after checkpoints {', '.join(map(str, points))}"


@check
def micro_batches(subject: Subject) -> str:
    """Two micro-batches whose gradients are summed train the same student: the denominator is the whole batch."""
    whole = train(subject, batches=6)
    if not _trains(whole):
        raise Skipped("nothing is trained")
    parts = train(subject, batches=6, micro_batches=2)
    worst = max(float((whole.student.weights[n] - parts.student.weights[n]).abs().max()) for n in whole.student.weights)
    if worst > 2e-4:
        raise Failed(f"weights differ by {worst:.2g} after 6 steps in 2 micro-batches")
    return f"weights differ by {worst:.1g} after 6 steps"


@check
def export(subject: Subject) -> None:
    """The exported weights, rebuilt without the method's code, answer as the network that was trained."""
    trial = train(subject)
    module = trial.run.trained
    if module is None:
        raise Failed("nothing was exported through run.fit or run.export")
    if not trial.student.averaged and _trains(trial) and not _was_trained(trial, module):
        raise Failed("the exported network is not one that was trained, and is not declared as an average (run.export(..., averaged=True))")
    rebuilt = trial.suite.rebuild(Student.from_bytes(trial.student.to_bytes()))
    module.eval()
    batch = next(trial.problem.batches.stream(0))
    with torch.no_grad():
        ours, theirs = _answer(rebuilt, batch), _answer(module, batch)
    if not torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6):
        raise Failed(
            f"the rebuilt student answers differently (by {float((ours - theirs).abs().max()):.2g}) from the network that was trained"
        )


def _was_trained(trial: Trial, module: nn.Module) -> bool:
    """Whether ``module`` is, or is part of, a network that a loop of this run has trained."""
    return any(module is m or any(module is s for s in m.modules()) for m in trial.run.seen)


def _answer(module: nn.Module, batch: Any) -> torch.Tensor:
    inputs = batch.inputs
    try:
        answer: torch.Tensor = module(inputs)
    except TypeError:  # a denoiser also wants a noise level
        answer = module(inputs, torch.ones(len(inputs)), None)
    return answer


@check
def beats_scratch(subject: Subject) -> str:
    """Better than the same student without a teacher, on the analytic track, on average over three seeds."""
    if subject.card.control:
        raise Skipped("a control is a yardstick")
    from bench.store import Store

    [first, *_] = plan(subject.track, [subject.name], [0], controls=False)
    card = registry.suite_card(registry.find("suite", first.suite))
    metric = card.metric()
    from bench.runner import execute

    means = {}
    with tempfile.TemporaryDirectory() as name:
        for who in (subject.name, "scratch"):
            values = []
            for spec in plan(subject.track, [who], range(SEEDS), controls=False):
                record = execute(spec, Store(name))
                value = record.value(metric.name)
                if value is None or record.status != "ok":
                    raise Failed(f"{who} seed {spec.seed} {record.status}: {record.reason}")
                values.append(value)
            means[who] = sum(values) / len(values)
    ours, scratch = means[subject.name], means["scratch"]
    line = f"{metric.name} {ours:.4f}, scratch {scratch:.4f} over {SEEDS} seeds"
    if not (ours > scratch if metric.better == "higher" else ours < scratch):
        raise Failed(line)
    return line
