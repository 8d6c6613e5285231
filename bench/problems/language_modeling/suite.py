"""What the suites of language models share: the problem and the judge of a setting, from the world that it names.

Importing this leaves torch alone, so that a card's module stays light.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from distillbench.cards.card import Setting
from distillbench.cards.worlds import Worlds

if TYPE_CHECKING:
    from distillbench.problems.language_modeling.models import LanguageModel
    from distillbench.problems.language_modeling.problem import LanguageModeling
    from distillbench.runs.record import Measurement
    from distillbench.training.student import Student


@dataclass(frozen=True)
class LanguageSuite:
    """``problem`` and ``evaluate`` of a suite whose every world is a module with the functions ``problem`` and ``measure``.

    Attributes:
        worlds: those modules.  rebuild: the network of an exported student.
    """

    worlds: Worlds
    rebuild: Callable[[Student], LanguageModel]

    def problem(
        self,
        name: str,
        setting: Setting,
        seeds: Mapping[str, int],
        *,
        split: str = "test",
        data: Path | None = None,
        cache: Path | None = None,
    ) -> LanguageModeling:
        """The problem of one setting for one set of seeds.

        Args:
            split: where the student will be judged.  data: the user's folder of data sets and models.
            cache: for the teacher's responses and laws, keyed by the bytes they come from.
        """
        found: LanguageModeling = self.worlds.of(setting).problem(name, setting, seeds, split=split, data=data, cache=cache)
        return found

    def evaluate(
        self, student: Student, name: str, setting: Setting, seeds: Mapping[str, int], *, split: str = "test", data: Path | None = None
    ) -> list[Measurement]:
        """Judge plain weights on a split.

        Raises:
            UserError: the student cannot be rebuilt, or is one that the setting's world refuses to judge.
        """
        world = self.worlds.of(setting)
        found: list[Measurement] = world.measure(self.rebuild(student), setting, seeds, split, data)
        return found
