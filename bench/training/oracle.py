"""What methods may ask: known by its digest, and every question metered."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any, Literal, Protocol

import torch
from torch import nn

from distillbench.training.flops import flops_per_row, shape_of
from distillbench.training.meter import Meter
from distillbench.training.student import tensor_digest


class Onlooker(Protocol):
    """Who watches the networks of a run (:class:`watch.Watch`), as far as oracles need to know."""

    def add(self, network: nn.Module, role: Literal["teacher"]) -> None:
        """Watch one more network."""
        ...

    def paused(self) -> contextlib.AbstractContextManager[None]:
        """What passes inside is billed by the oracle itself."""
        ...


class Oracle:
    """What methods may ask and cannot see into: a teacher's network, a verifier, a reward, an endpoint.

    ``examples`` asked are metered whether or not a cache holds the answer, so cost does not depend on who ran before; answers computed
    are metered too.

    Attributes:
        digest: identifies what answers, by its bytes; keys what is kept of its answers.
        meter: where questions are counted: the run's, once there is one.
        watch: who sees what passes through its network; None where nobody does.
    """

    watch: Onlooker | None = None

    def __init__(self, digest: str) -> None:
        self.digest = digest
        self.meter = Meter()

    def _asked(self, rows: int, computed: bool = True) -> None:
        self.meter.add("teacher_examples", rows)
        if computed:
            self.meter.add("teacher_forwards", rows)

    def to(self, device: torch.device) -> None:
        """Answer on ``device`` from now on. What holds no tensors has nothing to do."""

    def state(self) -> dict[str, Any]:
        """What answers depend on besides the question (a budget of queries, a list of what was asked): checkpoints carry it."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state`."""


class ModuleOracle(Oracle):
    """Wrapper around a frozen network. Methods query it only through this class; answers carry no gradient, every query is metered.

    Attributes:
        differentiable: true while it answers with a graph from its input, as a method asked it to.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(tensor_digest(dict(module.state_dict())))
        self._module = module.eval().requires_grad_(False)
        self.differentiable = False
        self._prices: dict[object, float] = {}

    @contextlib.contextmanager
    def _open(self, differentiable: bool) -> Iterator[None]:
        self.differentiable = differentiable
        try:
            yield
        finally:
            self.differentiable = False

    def trainable_copy(self) -> nn.Module:
        """A copy of the network that may be trained (teacher-side methods); the oracle itself stays as it is."""
        made = copy.deepcopy(self._module).requires_grad_(True).train()
        if self.watch is not None:
            self.watch.add(made, "teacher")
        return made

    def billed(self) -> contextlib.AbstractContextManager[None]:
        """Inside, who uses the network bills what it does in a unit of its own (tokens that are generated), so rows are not counted."""
        return contextlib.nullcontext() if self.watch is None else self.watch.paused()

    def _price(self, *inputs: Any) -> float:
        """Operations of an answer to one row, where ``inputs`` is what the network would be called with."""
        key = shape_of(inputs)
        if key not in self._prices:
            with self.billed():
                self._prices[key] = flops_per_row(self._module, inputs)
        return self._prices[key]

    def _worth(self, rows: int, *inputs: Any) -> None:
        """Count the operations of an answer to ``rows`` rows, with ``inputs`` as in :meth:`_price`."""
        self.meter.add("teacher_flops", rows * self._price(*inputs))

    def to(self, device: torch.device) -> None:
        """Move the network to ``device``."""
        self._module.to(device)
