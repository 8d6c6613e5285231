"""The teacher behind one door: evaluation mode, no gradient, metered, cached by bytes."""

from __future__ import annotations

import copy

import torch
from torch import nn

from distillbench.training.meter import Meter
from distillbench.training.student import tensor_digest


class Oracle:
    """A frozen network behind one door.

    Methods never touch the network: they ask, the oracle answers without a graph. ``examples`` asked are metered
    whether or not a cache holds the answer, so cost does not depend on who ran before; forwards computed are metered too.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module.eval().requires_grad_(False)
        self.meter = Meter()
        self.digest = tensor_digest(dict(module.state_dict()))

    def _asked(self, rows: int, computed: bool = True) -> None:
        self.meter.add("teacher_examples", rows)
        if computed:
            self.meter.add("teacher_forwards", rows)

    def trainable_copy(self) -> nn.Module:
        """A copy of the teacher that may be trained (teacher-side methods); the oracle itself stays as it is."""
        return copy.deepcopy(self._module).requires_grad_(True).train()

    def to(self, device: torch.device) -> None:
        """Move the network."""
        self._module.to(device)
