"""Random numbers that code draws while it is watched, and a clock that stands on another day."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterator
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

LEAST, MASK = 8, 64  # numbers that two draws must share before they count as one; of a mask, which has two values
OWN = ((np.random, "default_rng"), (np.random, "RandomState"), (np.random, "seed"), (random, "seed"), (random, "Random"))


class Draws:
    """What was drawn: digests of random tensors, and the seeds that generators of numpy and Python were made with."""

    def __init__(self) -> None:
        self.tensors: set[tuple[str, bytes]] = set()
        self.seeded: set[str] = set()

    def alike(self, other: Draws) -> str | None:
        """What was drawn, or seeded, in both trainings, in words; None where nothing was."""
        if names := sorted({name for name, _ in self.tensors & other.tensors}):
            return f"the same numbers are drawn by {', '.join(names)}"
        if seeded := sorted(self.seeded & other.seeded):
            return f"{', '.join(seeded)} is made"
        return None

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Notes all that is drawn inside."""
        with contextlib.ExitStack() as stack:
            for module, name in OWN:
                stack.enter_context(mock.patch.object(module, name, self._seeding(module, name)))
            stack.enter_context(_Mode(self))
            yield

    def _seeding(self, module: ModuleType, name: str) -> Any:
        made = getattr(module, name)

        def make(*args: Any, **named: Any) -> Any:
            if args or named:
                self.seeded.add(f"{module.__name__}.{name}({', '.join(map(repr, (*args, *named.values())))})")
            return made(*args, **named)

        if not isinstance(made, type):
            return make

        class Stand(type):  # for a class, which others ask isinstance of
            def __call__(cls, *args: Any, **named: Any) -> Any:
                return make(*args, **named)

            def __instancecheck__(cls, instance: Any) -> bool:
                return isinstance(instance, made)

        return Stand(name, (), {})


class _Mode(TorchDispatchMode):
    def __init__(self, draws: Draws) -> None:
        super().__init__()
        self._draws = draws

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in func.tags:
            for x in out if isinstance(out, tuple | list) else [out]:
                if isinstance(x, Tensor) and x.numel() >= LEAST and len(x.unique()) > (2 if x.numel() < MASK else 1):
                    self._draws.tensors.add((str(func.overloadpacket), x.detach().cpu().contiguous().numpy().tobytes()))
        return out


@contextlib.contextmanager
def another_day() -> Iterator[None]:
    """The clock of the world stands some days ahead: what asks it for a seed, however coarsely, gets another one."""
    shift, now, precise = 12_345_678, time.time, time.time_ns

    def later() -> float:
        return now() + shift

    def later_ns() -> int:
        return precise() + shift * 10**9

    with mock.patch.object(time, "time", later), mock.patch.object(time, "time_ns", later_ns):
        yield
