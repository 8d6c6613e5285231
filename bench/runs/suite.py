"""The contract of a suite: a fixed setting on one side, a judge on the other, and what each of the two is told.

A suite's package offers one object, ``SUITE``. What trains gets a :class:`TrainContext`, which holds neither the evaluation seed nor the
judged split; what judges gets a :class:`JudgeContext`, and never meets a method. Importing this leaves torch alone.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from distillbench.assets import locate, place
from distillbench.cards.card import Budget, Setting, Training
from distillbench.cards.options import Options, options_of
from distillbench.cards.registry import Entry
from distillbench.errors import UserError, unknown
from distillbench.identity import canonical, derive_seed, sha256
from distillbench.runs.record import Measurement

if TYPE_CHECKING:
    from torch import Tensor, nn

    from distillbench.training.observer import Observer
    from distillbench.training.problem import Problem
    from distillbench.training.run import Run
    from distillbench.training.student import Student


@dataclass(frozen=True)
class Context:
    """What both sides are told.

    Attributes:
        name: what the suite calls the setting.  setting: as it is run.  seeds: role -> seed.
        data: the user's folder of data sets and models, or None.
        cache: folder for what is computed once, keyed by the bytes it comes from, or None to keep nothing.
    """

    name: str
    setting: Setting
    seeds: Mapping[str, int]
    data: Path | None = field(default=None, kw_only=True)
    cache: Path | None = field(default=None, kw_only=True)

    def options(self, kind: type[Options]) -> Options:
        """The setting's options, typed. Raises UserError as :func:`options.options_of`."""
        return options_of(self.setting, kind, self.name)

    def place(self, role: str) -> Path:
        """Where the user's folder holds an asset. Raises UserError as :func:`assets.place`."""
        return place(self.setting.options, role, self.data)

    def locate(self, role: str) -> Path:
        """The file of a pinned asset. Raises UserError as :func:`assets.locate`, or where the setting has none of that role."""
        if role not in self.setting.assets:
            raise unknown(f"asset of {self.name}", role, self.setting.assets)
        return locate(self.setting.assets[role], self.setting.options, role, self.data)


@dataclass(frozen=True)
class TrainContext(Context):
    """What the side that trains is told: no seed of the role ``evaluation``, whoever makes it, and not what will be judged.

    Attributes:
        tuning: whether this is a trial for hyper-parameters, which keeps the examples that trials are judged on out of training.
    """

    tuning: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "seeds", {role: seed for role, seed in self.seeds.items() if role != "evaluation"})


@dataclass(frozen=True)
class JudgeContext(Context):
    """What the judge is told.

    Attributes:
        split: ``test`` or ``tune``.  device: where networks are evaluated, as torch writes it.
        key: digest of what a kept result of :meth:`fit` rests on besides the student (the track and the code), or None to keep nothing.
        checkpoint_seconds, observer: of the trainings of :meth:`fit`, as for a run.
        bill: what these trainings have cost so far, meter -> amount.
    """

    split: str = field(default="test", kw_only=True)
    device: str = field(default="cpu", kw_only=True)
    key: str | None = field(default=None, kw_only=True)
    checkpoint_seconds: float = field(default=30.0, kw_only=True)
    observer: Observer | None = field(default=None, kw_only=True)
    bill: dict[str, float] = field(default_factory=dict, kw_only=True, compare=False)

    def fit(
        self, student: Student, role: str, index: int, train: Callable[[Run], Student], *, examples: int, training: Training | None = None
    ) -> Student:
        """A network of the judge's own, trained to judge ``student``: a probe on its features, a fresh network on its data set.

        The network is trained once for each student, role and index. A training that was killed goes on from its checkpoint, and one
        that was done before is found in the cache. Its cost is the judge's, and no part of the student's budget.

        Args:
            role, index: what the network is for and which of several it is; its seeds follow from these and the evaluation seed.
            train: as a method's ``distill``: builds a network from ``run.seeds["init"]`` and returns what ``run.fit`` gives.
            examples: the budget of ``train``.  training: its optimizer; the setting's by default.

        Raises:
            Diverged: the loss left the finite numbers.  SaveError: the cache cannot be written.
        """
        import torch
        from accelerate import Accelerator
        from accelerate.utils import broadcast

        from distillbench.training.run import Run

        accelerator = Accelerator(cpu=torch.device(self.device).type == "cpu")
        seed = derive_seed(f"judge {role} {index}", self.seeds["evaluation"])
        path = None
        if self.cache is not None and self.key is not None:
            about = [self.key, sha256(student.to_bytes()), role, index, seed]
            path = self.cache / "judge" / f"{sha256(canonical(about))}.kept"
            there = torch.tensor(int(accelerator.is_main_process and _kept(path) is not None), device=accelerator.device)
            if broadcast(there) and (kept := _kept(path)) is not None:
                return self._billed(*kept)
        run = Run(
            seeds={name: derive_seed(name, seed) for name in self.seeds},
            budget=Budget(student_examples=examples),
            training=training or self.setting.training,
            folder=None if path is None else path.with_suffix(""),
            checkpoint_seconds=self.checkpoint_seconds,
            accelerator=accelerator,
            observer=self.observer,
            code=self.key,
        )
        fitted = train(run)
        cost = run.cost()["total"]
        if path is not None and accelerator.is_main_process:
            _keep(path, fitted, cost)
            shutil.rmtree(path.with_suffix(""), ignore_errors=True)
        return self._billed(fitted, cost)

    def _billed(self, fitted: Student, cost: Mapping[str, float]) -> Student:
        for meter, amount in cost.items():
            self.bill[meter] = self.bill.get(meter, 0.0) + amount
        return fitted


def _keep(path: Path, fitted: Student, cost: Mapping[str, float]) -> None:
    """Write both in one file, which is there whole or not at all."""
    import torch

    from distillbench.training.checkpoint import save_checkpoint

    save_checkpoint(path, {"student": torch.frombuffer(bytearray(fitted.to_bytes()), dtype=torch.uint8), "cost": dict(cost)})


def _kept(path: Path) -> tuple[Student, dict[str, float]] | None:
    """What :func:`_keep` wrote, or None where there is none or it is damaged."""
    from distillbench.training.checkpoint import load_checkpoint
    from distillbench.training.student import Student

    try:
        state = load_checkpoint(path)
        return Student.from_bytes(state["student"].numpy().tobytes(), str(path)), state["cost"]
    except (OSError, UserError):
        return None


@dataclass(frozen=True)
class Artifact:
    """Something to look at that judging gave: a sheet of samples, texts, a curve. The store keeps it under the hash of its bytes."""

    content: bytes
    kind: Literal["png", "text", "json"]

    @staticmethod
    def png(values: Tensor) -> Artifact:
        """``values`` in [0, 1], (H, W) grey or (H, W, 3) colour, as a PNG."""
        from PIL import Image

        buffer = io.BytesIO()
        Image.fromarray((values.clamp(0, 1) * 255).round().byte().cpu().numpy()).save(buffer, "PNG", optimize=True)
        return Artifact(buffer.getvalue(), "png")


@dataclass(frozen=True)
class Judgement:
    """What a judge says of a student. A PNG called ``picture`` among the artifacts is shown on boards."""

    measurements: Sequence[Measurement]
    artifacts: Mapping[str, Artifact] = field(default_factory=dict)


@runtime_checkable
class Suite(Protocol):
    """What the object ``SUITE`` of a suite's package does. Inherit from this class: then what is optional has its default."""

    def problem(self, ctx: TrainContext) -> Problem:
        """What a method gets; never the examples that its student is judged on.

        Raises:
            UserError: data or weights are missing, or are not what the card pins.
        """
        ...

    def rebuild(self, student: Student, ctx: Context) -> nn.Module | Mapping[str, nn.Module]:
        """The network of an exported student, in evaluation mode; of one with several parts its networks, by part.

        Raises:
            UserError: weights and architecture do not fit.
        """
        ...

    def evaluate(self, student: Student, ctx: JudgeContext) -> Judgement:
        """Judge plain weights on the context's split.

        Raises:
            UserError: the student cannot be rebuilt, or is one that the setting refuses to judge.
        """
        ...

    def exceeds(self, student: Student, ctx: JudgeContext) -> str | None:
        """Which cap of the setting a student passes and by how much, or None. Yardsticks are not asked."""
        return None


def suite_of(entry: Entry) -> Suite:
    """The object ``SUITE`` of a suite that was found. Raises UserError where the module fails to import or offers none."""
    found = vars(entry.load()).get("SUITE")
    if isinstance(found, type) or not isinstance(found, Suite):
        raise UserError(
            f"{entry.path}: offers no SUITE, an object with problem, rebuild, evaluate and exceeds (distillbench.runs.suite.Suite); "
            "'distillbench new suite' writes one"
        )
    return found
