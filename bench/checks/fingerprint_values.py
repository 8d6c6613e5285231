"""What methods and settings compute in float64 on one thread, as the few numbers that a fingerprint holds."""

from __future__ import annotations

import ast
import contextlib
import copy
import dataclasses
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distillbench.assets import cache_folder
from distillbench.cards import registry
from distillbench.cards.card import Budget, Card, Choice, Flag, Setting
from distillbench.cards.reading import resolve
from distillbench.checks.checksums import brief, checksum, describe, weights
from distillbench.checks.core import analytic_tracks
from distillbench.checks.doubles import doubles
from distillbench.errors import UserError
from distillbench.problems.classification.problem import Classification
from distillbench.problems.image_generation.problem import ImageGeneration
from distillbench.problems.language_modeling.problem import LanguageModeling
from distillbench.runs.identities import seeds_by_role
from distillbench.runs.suite import JudgeContext, TrainContext, suite_of
from distillbench.training import pace as engine
from distillbench.training.learner import Learner
from distillbench.training.observer import Observer
from distillbench.training.run import Run
from distillbench.training.student import Student

ROWS = 64  # examples of a batch, at most
UPDATES, FEWER = 5, 3  # updates of the student: with the card's defaults, and with another value of a choice or flag
DEFAULT = "default"
OF_THE_MACHINE = ("measured_speedup",)  # metrics that a clock says

Values = dict[str, Any]


class _Processor:
    """One CPU, whatever else the machine has: what :class:`Run` asks of an accelerator."""

    device = torch.device("cpu")
    num_processes, process_index, is_main_process = 1, 0, True
    clip_grad_norm_ = staticmethod(nn.utils.clip_grad_norm_)


class _Uncounted(contextlib.nullcontext[None]):
    """Stands for torch's counter of operations, which takes most of the time of so short a training."""

    def __init__(self, **_: Any) -> None:
        super().__init__()

    def get_total_flops(self) -> int:
        return 0


def smaller(entry: registry.Entry, name: str) -> Setting:
    """The setting as it is fingerprinted: with the options that the suite's ``FINGERPRINT`` gives for it, and small batches."""
    setting = registry.suite_card(entry).settings[name]
    less = getattr(entry.load(), "FINGERPRINT", {}).get(name, {})
    training = dataclasses.replace(setting.training, batch_size=min(ROWS, setting.training.batch_size), precision="float32")
    return dataclasses.replace(setting, options={**setting.options, **less}, training=training)


def _package(entry: registry.Entry) -> str:
    return (entry.module or entry.slug).rpartition(".")[0]


# --- methods --------------------------------------------------------------------------------------------------------


def others(card: Card) -> dict[str, dict[str, Any]]:
    """Every value of a choice or flag that is not its default, by the name of its run."""
    found: dict[str, dict[str, Any]] = {}
    for name, hyper in card.hyperparameters.items():
        if isinstance(hyper, Choice):
            found |= {f"{name}={option}": {name: option} for option in hyper.options if option != hyper.default}
        elif isinstance(hyper, Flag):
            found[f"{name}={str(not hyper.default).lower()}"] = {name: not hyper.default}
    return found


def of_method(entry: registry.Entry) -> Values:
    """What the method at ``entry`` computes in a few updates on its analytic track: a run with the card's defaults and one for every
    other value of a choice or flag.

    A run is ``terms`` and ``gradients``, of every update; ``trained``, the way that every trained network went; ``student``, what was
    exported. What a track refuses is computed on the problem's next analytic one, or is ``refused`` by all.

    Raises:
        UserError: the method cannot be imported, or no track takes it with its defaults.
    """
    card = registry.method_card(entry)
    first = _somewhere(entry, card, {}, UPDATES)
    if "refused" in first:
        raise UserError(f"{card.slug} has no fingerprint: no analytic setting takes it: {first['refused']}")
    # A student whose rivals are updated too has many updates in few batches; a loop of its own needs one batch at least.
    loops = first.pop("loops")
    fewer = max(FEWER - 1 if len(first["terms"]) > UPDATES + 3 else FEWER, loops)
    runs = {DEFAULT: first}
    for name, given in others(card).items():
        runs[name] = _somewhere(entry, card, given, fewer)
        if runs[name].pop("loops", None) is None:
            runs[name] = {"refused": 1}
    return runs


def _somewhere(entry: registry.Entry, card: Card, given: dict[str, Any], updates: int) -> Values:
    refused = f"no installed suite has an analytic setting for {card.problem}"
    for suite, name in analytic_tracks(card.problem):
        try:
            return _train(entry, card, suite, name, given, updates)
        except UserError as error:
            refused = str(error)
    return {"refused": refused}


def _train(entry: registry.Entry, card: Card, suite: registry.Entry, name: str, given: dict[str, Any], updates: int) -> Values:
    setting, seeds, module = smaller(suite, name), seeds_by_role(0), entry.load()
    with doubles(_package(suite)), _uncounted():
        problem = suite_of(suite).problem(TrainContext(name, setting, seeds))
        budget = Budget(student_examples=updates * setting.training.batch_size)
        seen = _Seen()
        run = Run(
            seeds=seeds,
            budget=budget,
            training=setting.training,
            oracles=problem.teachers.values(),
            accelerator=_Processor(),  # type: ignore[arg-type]
            observer=seen,
        )
        student = module.distill(problem, run, **resolve(card, given))
        if not isinstance(student, Student):
            raise UserError(f"{card.slug}: distill returned {type(student).__name__}, not a Student")
        trained = [checksum(_differences(weights(net), before)) for net, before in seen.starts.items()]
        networks = [part.architecture for part in student.parts.values() if part.architecture is not None]
        fresh = [w for network in networks for w in weights(problem.build(network))]
        exported = list(student.tensors.values())
        found = {
            "terms": seen.terms,
            "gradients": seen.gradients,
            "trained": trained,
            "student": {
                "weights": {"float": checksum(exported)},
                "way": {"float": checksum(_differences(exported, fresh))},
                "recipe": describe(student.recipe) or {},
                "averaged": int(any(part.kind == "averaged" for part in student.parts.values())),
            },
            "loops": seen.loops,
        }
    return found


@contextlib.contextmanager
def _uncounted() -> Iterator[None]:
    module: Any = engine
    was = module.FlopCounterMode
    module.FlopCounterMode = _Uncounted
    try:
        yield
    finally:
        module.FlopCounterMode = was


class _Seen(Observer):
    """What a fingerprint keeps of a run.

    Attributes:
        terms, gradients: of every update.  starts: every trained network's state before its first loop.  loops: how many there were.
    """

    def __init__(self) -> None:
        self.terms: list[list[float]] = []
        self.gradients: list[list[float]] = []
        self.starts: dict[nn.Module, list[Tensor]] = {}
        self.loops = 0

    def began(self, learners: Sequence[Learner]) -> None:
        self.loops += 1
        for net in (net for learner in learners for net in (learner.module, *learner.extra)):
            self.starts.setdefault(net, weights(net))

    def updated(self, learner: Learner, terms: Mapping[str, Tensor]) -> None:
        self.terms.append([brief(float(v)) for v in terms.values()])
        # Adam's first step is the same for a gradient of any size, and some gradients belong to no value: so they are looked at too.
        self.gradients.append(checksum(p.grad for p in learner.parameters if p.grad is not None))


def _differences(now: list[Tensor], before: list[Tensor]) -> list[Tensor]:
    """What changed, tensor by tensor; those whose shape did are left out."""
    return [a.double() - b.double() for a, b in zip(now, before, strict=False) if a.shape == b.shape]


# --- lines ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def traced(path: Path) -> Iterator[set[int]]:
    """The numbers of the lines of one file that are executed while this lasts."""
    seen: set[int] = set()
    was, wanted = sys.gettrace(), str(path)

    def line(frame: Any, event: str, _: Any) -> Any:
        if event == "line":
            seen.add(frame.f_lineno)
        return line

    def call(frame: Any, event: str, _: Any) -> Any:
        return line if frame.f_code.co_filename == wanted else None

    sys.settrace(call)
    try:
        yield seen
    finally:
        sys.settrace(was)


def never(path: Path, seen: set[int]) -> list[str]:
    """The statements of functions in a file of which no line was executed: the first line of each, in the file's order."""
    source = path.read_text(encoding="utf-8")
    lines, found = source.splitlines(), []
    functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    for statement in {s for f in functions for s in ast.walk(f) if isinstance(s, ast.stmt) and s is not f}:
        words = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
        if words or isinstance(statement, ast.Pass | ast.Global | ast.Nonlocal):
            continue
        body = getattr(statement, "body", None)
        last = body[0].lineno - 1 if body else statement.end_lineno or statement.lineno
        if not seen & set(range(statement.lineno, max(last, statement.lineno) + 1)):
            found.append(statement.lineno)
    return [lines[n - 1].strip() for n in sorted(set(found))]


# --- settings -------------------------------------------------------------------------------------------------------


def offline(setting: Setting) -> bool:
    """Whether a setting runs from installed packages alone: those of the paper tier need what a user fetches."""
    return setting.tier != "paper"


@contextlib.contextmanager
def _empty_cache() -> Iterator[None]:
    """What was computed once and kept, such as teachers' texts, is computed again and thrown away. Models that were converted stay."""
    was, models = os.environ.get("DISTILLBENCH_CACHE"), cache_folder() / "models"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "models").mkdir()
        for model in models.glob("*/"):  # one by one: what is converted here, in float64, is not to lie among the user's
            (Path(folder) / "models" / model.name).symlink_to(model.resolve())
        os.environ["DISTILLBENCH_CACHE"] = folder
        try:
            yield
        finally:
            os.environ.pop("DISTILLBENCH_CACHE")
            if was is not None:
                os.environ["DISTILLBENCH_CACHE"] = was


def of_setting(entry: registry.Entry, name: str, *, setting: Setting | None = None, data: Path | None = None) -> Values:
    """What a setting hands to methods and how it judges two fixed students.

    Args:
        setting: in place of :func:`smaller`.  data: the user's folder.

    Raises:
        UserError: the setting cannot be loaded here.
    """
    suite, seeds = suite_of(entry), seeds_by_role(0)
    setting = smaller(entry, name) if setting is None else setting
    with doubles(_package(entry)), _empty_cache():
        problem: Any = suite.problem(TrainContext(name, setting, seeds, data=data))
        stream = problem.batches if hasattr(problem, "batches") else problem.data
        batch = next(iter(stream.stream(0)))
        rest = {f.name: getattr(problem, f.name) for f in dataclasses.fields(problem) if f.name not in ("student", "teacher", "batches")}
        found: Values = {
            "first batch": describe(batch),
            "initial student": describe(problem.student),
            "teacher's answers": describe(_answers(problem, batch)),
            **{k.replace("_", " "): v for k, v in (describe(rest) or {}).items()},
        }
        if getattr(problem, "once", None) is not None:
            found["pass without augmentation"] = describe(next(iter(problem.once(setting.training.batch_size))))
        for which, student in _students(problem):
            for m in suite.evaluate(student, JudgeContext(name, setting, seeds, data=data)).measurements:
                if m.metric not in OF_THE_MACHINE:
                    examples = None if m.per_example is None else torch.tensor(m.per_example)
                    found[f"{m.metric} of {which}"] = describe({"value": float(m.value), "examples": examples})
    return found


def _students(problem: Any) -> list[tuple[str, Student]]:
    """Two students that no training made: the initial one, and one whose scores lie at no end of their range.

    For generators that is the teacher in seven steps; for others a pattern does.
    """
    if isinstance(problem, ImageGeneration):
        teacher = Student.of(problem.teacher.trainable_copy(), problem.heun(7))
        return [("the initial student", Student.of(problem.student, problem.recipe())), ("the teacher in seven steps", teacher)]
    return [("the initial student", Student.of(problem.student)), ("a patterned student", Student.of(patterned(problem.student)))]


def scattered(count: int, k: int = 0) -> Tensor:
    """``count`` numbers spread over [-1, 1), the same on every processor: a hash of i and ``k`` in integers."""
    h = torch.arange(count) * 2654435761 + k * 40503
    for shift, factor in ((16, 2246822519), (13, 3266489917)):
        h = h & 0xFFFFFFFF
        h = (h ^ (h >> shift)) * factor
    return (h & 0xFFFFFFFF).double() / 2**31 - 1


@torch.no_grad()
def patterned(module: nn.Module) -> nn.Module:
    """A copy of ``module`` with weights that no random numbers made: :func:`scattered`, as large as He et al. 2015 draw matrices and
    kernels; elsewhere a tenth of it is added.
    """
    made = copy.deepcopy(module)
    for k, p in enumerate(made.parameters()):
        wave = scattered(p.numel(), k).view(p.shape)
        if p.dim() > 1:
            p.copy_(wave * math.sqrt(6 * len(p) / p.numel()))
        else:
            p.add_(0.1 * wave)
    return made


def _answers(problem: Any, batch: Any) -> Any:
    """What the teacher says about a batch, by the kind of problem. None for a kind that is not known here."""
    ask: dict[type, Callable[[Any, Any], Any]] = {Classification: _classes, ImageGeneration: _denoised, LanguageModeling: _tokens}
    return next((f(problem, batch) for kind, f in ask.items() if isinstance(problem, kind)), None)


def _classes(problem: Classification, batch: Any) -> Any:
    return problem.teacher.outputs(batch)


def _denoised(problem: ImageGeneration, batch: Any) -> Any:
    """Denoised from noise that follows the same pattern, at levels from the least to the most."""
    x: Tensor = batch.inputs
    place = torch.linspace(0, 1, len(x))
    sigma = problem.sigma_min ** (1 - place) * problem.sigma_max**place
    wave = torch.cos(0.1 + 1.7 * torch.arange(x.numel(), dtype=x.dtype)).view(x.shape)
    return {"denoised": problem.teacher.denoise(x + sigma.view(-1, *[1] * (x.dim() - 1)) * wave, sigma, batch.labels)}


def _tokens(problem: LanguageModeling, batch: Any) -> Any:
    """Its log-probabilities of the references, and its own text."""
    return {"log_probs": problem.teacher.log_probs(problem.teacher_view(batch)), "text": problem.teacher_text()}
