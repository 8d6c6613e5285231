"""What the suites of language models share: the problem and the judge of a setting, from the world that it names.

Importing this leaves torch alone, so that a card's module stays light.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from distillbench.cards.worlds import Worlds
from distillbench.runs.suite import Context, JudgeContext, Judgement, Suite, TrainContext

if TYPE_CHECKING:
    from distillbench.problems.language_modeling.models import LanguageModel
    from distillbench.problems.language_modeling.problem import LanguageModeling
    from distillbench.runs.record import Measurement
    from distillbench.training.student import Student


class LanguageWorld(Protocol):
    """The functions of a world's module."""

    def problem(self, ctx: TrainContext) -> LanguageModeling:
        """What a method gets; the teacher's responses and answers are kept in the context's cache."""
        ...

    def measure(self, net: LanguageModel, ctx: JudgeContext) -> list[Measurement]:
        """Judge a student's network."""
        ...


@dataclass(frozen=True)
class LanguageSuite(Suite):
    """A suite whose every world is such a module.

    Attributes:
        worlds: those modules.  network: the network of an exported student.
    """

    worlds: Worlds[LanguageWorld]
    network: Callable[[Student], LanguageModel]

    def problem(self, ctx: TrainContext) -> LanguageModeling:
        """As :meth:`Suite.problem`."""
        return self.worlds.of(ctx.setting).problem(ctx)

    def rebuild(self, student: Student, ctx: Context) -> LanguageModel:
        """As :meth:`Suite.rebuild`."""
        return self.network(student)

    def evaluate(self, student: Student, ctx: JudgeContext) -> Judgement:
        """As :meth:`Suite.evaluate`."""
        return Judgement(self.worlds.of(ctx.setting).measure(self.network(student), ctx))
