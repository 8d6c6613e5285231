"""What methods may ask: known by its digest, and every question metered."""

from __future__ import annotations

import copy

import torch
from torch import nn

from distillbench.training.meter import Meter
from distillbench.training.student import tensor_digest


class Oracle:
    """What methods may ask and cannot see into: a teacher's network, a verifier, a reward, an endpoint.

    ``examples`` asked are metered whether or not a cache holds the answer, so cost does not depend on who ran before; answers computed
    are metered too.

    Attributes:
        digest: identifies what answers, by its bytes; keys what is kept of its answers.
        meter: where questions are counted: the run's, once there is one.
    """

    def __init__(self, digest: str) -> None:
        self.digest = digest
        self.meter = Meter()

    def _asked(self, rows: int, computed: bool = True) -> None:
        self.meter.add("teacher_examples", rows)
        if computed:
            self.meter.add("teacher_forwards", rows)

    def to(self, device: torch.device) -> None:
        """Answer on ``device`` from now on. What holds no tensors has nothing to do."""


class ModuleOracle(Oracle):
    """A frozen network. Methods never touch it: they ask, it answers in evaluation mode and without a graph."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(tensor_digest(dict(module.state_dict())))
        self._module = module.eval().requires_grad_(False)

    def trainable_copy(self) -> nn.Module:
        """A copy of the network that may be trained (teacher-side methods); the oracle itself stays as it is."""
        return copy.deepcopy(self._module).requires_grad_(True).train()

    def to(self, device: torch.device) -> None:
        """Move the network to ``device``."""
        self._module.to(device)
