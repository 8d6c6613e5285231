"""What every problem has."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

from torch import nn

from distillbench.training.examples import Input
from distillbench.training.nets import Architecture
from distillbench.training.oracle import Oracle
from distillbench.training.trees import Tree


class Build(Protocol):
    """What makes networks: ``functools.partial(build, seed=seeds["init"])`` of a suite's ``build(architecture, seed)`` is one."""

    def __call__(self, architecture: Architecture, /, *, seed: int = ...) -> nn.Module:
        """A network with fresh weights, from the seed of the role ``init`` unless another one is given."""
        ...


@dataclass(frozen=True)
class Problem:
    """Students to train, and whom to ask about what.

    A kind is a subclass with fields of its own. Those that are oracles are its :attr:`teachers`, the usual one being called ``teacher``;
    a kind may have none. Those that are networks are its :attr:`students`.

    Attributes:
        setting: its name.  student: the fresh student, initialised from the seed of the role ``init``.
        build: ``build(Architecture)`` gives a network with fresh weights from the same seed, ``build(Architecture, seed=...)`` from
            another one; see :meth:`new_student`.
    """

    setting: str
    student: nn.Module
    build: Build

    @classmethod
    def examples(cls) -> Mapping[str, Input]:
        """Small inputs of this kind's objectives, by argument name; a kind that has none leaves its methods' objectives unproven."""
        return MappingProxyType({})

    @property
    def teachers(self) -> Mapping[str, Oracle]:
        """All that can be asked, by name; empty where a kind has no teacher."""
        return {name: value for name, value in self._fields() if isinstance(value, Oracle)}

    @property
    def students(self) -> Mapping[str, nn.Module]:
        """All networks that are trained and exported, by name: ``student``, and others where a kind has several."""
        return {name: value for name, value in self._fields() if isinstance(value, nn.Module)}

    def call(self) -> tuple[Tree, ...] | None:
        """What one call of the student gets, one row of it, for counting its operations; None where a kind does not say."""
        return None

    def new_student(self, **arguments: Any) -> nn.Module:
        """Another student of the setting's architecture, with ``arguments`` over its own (for example ``groups=4``)."""
        own: Architecture = self.student.architecture  # type: ignore[assignment]
        return self.build(Architecture(own.name, {**own.arguments, **arguments}))

    def _fields(self) -> list[tuple[str, object]]:
        return [(f.name, getattr(self, f.name)) for f in dataclasses.fields(self)]
