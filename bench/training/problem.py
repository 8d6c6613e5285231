"""What every problem has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import nn

from distillbench.training.examples import Input
from distillbench.training.nets import Architecture
from distillbench.training.oracle import Oracle


@dataclass(frozen=True)
class Problem:
    """A teacher to ask, a student to train.

    Attributes:
        setting: its name.  student: the fresh student, initialised from the seed of the role ``init``.
        build: ``build(Architecture)`` gives a network with fresh weights from the same seed; see :meth:`new_student`.
    """

    setting: str
    student: nn.Module
    build: Callable[[Architecture], nn.Module]

    @classmethod
    def examples(cls) -> Mapping[str, Input]:
        """Small inputs of this kind's objectives, by argument name; a kind that has none leaves its methods' objectives unproven."""
        return MappingProxyType({})

    @property
    def oracle(self) -> Oracle:
        """The teacher, whatever its kind."""
        return self.teacher  # type: ignore[attr-defined,no-any-return]

    def new_student(self, **arguments: Any) -> nn.Module:
        """Another student of the setting's architecture, with ``arguments`` over its own (for example ``groups=4``)."""
        own: Architecture = self.student.architecture  # type: ignore[assignment]
        return self.build(Architecture(own.name, {**own.arguments, **arguments}))
